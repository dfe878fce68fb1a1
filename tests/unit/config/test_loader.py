"""Files and drop-ins: which are read, in which order, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.config import loader
from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import Bytes, Match
from caam_hotplug.config.rules import BUILT_IN, Action, KeySource, MountSettings, OnStop, Rule
from caam_hotplug.config.templates import Template
from caam_hotplug.errors import ConfigError
from caam_hotplug.formats.crypt_table import Crypt
from caam_hotplug.kernel.config_files import AnyonesFiles, RootsFiles
from caam_hotplug.model import Bus, DevType
from unit.config.files import (
    documents,
    faults,
    faults_of,
    in_rule,
    loaded,
    single_keys,
)


def test_an_empty_file_is_the_defaults(file: Path) -> None:
    assert loaded(file, "") == Config()


def test_every_key_of_the_agent_itself_is_read(file: Path) -> None:
    text = """
        source = "kernel"
        blob_directory = "/srv/blobs"
        mount_root = "/media"
        log_level = "debug"
        stuck_after_s = 3
        rule = []
    """
    assert loaded(file, text) == Config(
        source="kernel",
        blob_directory=Path("/srv/blobs"),
        mount_root=Path("/media"),
        log_level="debug",
        stuck_after_s=3.0,
        rule=(),
    )


def test_every_key_of_a_rule_is_read(file: Path) -> None:
    text = """
        [[rule]]
        name = "all of it"
        action = "unlock"
        on_stop = "keep"
        match.partlabel = ["a*", "b"]
        match.serial = "1"
        match.bus = "mmc"
        match.removable = false
        match.devtype = "disk"
        match.min_size = 4096
        match.max_size = "64 GiB"
        key.backend = "trusted"
        key.blob = "{serial}.bb"
        key.length = 64
        key.options = "keyhandle=0x81000001"
        crypt.cipher = "capi:tk(cbc(aes))-plain64"
        crypt.sector_size = 4096
        crypt.offset = 2048
        crypt.iv_offset = 8
        crypt.flags = ["allow_discards"]
        mount.name = "{serial}"
        mount.filesystems = ["ext4"]
        mount.options = ["nosuid", "nodev"]
        mount.read_only = true
        mount.filesystem_options = { ext4 = ["errors=continue"] }
    """
    (rule,) = loaded(file, text).rule
    assert rule == Rule(
        name="all of it",
        action=Action.UNLOCK,
        on_stop=OnStop.KEEP,
        match=Match(
            partlabel=("a*", "b"),
            serial="1",
            bus=Bus.MMC,
            removable=False,
            devtype=DevType.DISK,
            min_size=Bytes(4096),
            max_size=Bytes(2**36),
        ),
        key=KeySource(
            backend="trusted",
            blob=Template("{serial}.bb"),
            length=64,
            options="keyhandle=0x81000001",
        ),
        crypt=Crypt(
            cipher="capi:tk(cbc(aes))-plain64",
            sector_size=4096,
            offset=2048,
            iv_offset=8,
            flags=("allow_discards",),
        ),
        mount=MountSettings(
            name=Template("{serial}"),
            filesystems=("ext4",),
            options=("nosuid", "nodev"),
            read_only=True,
            filesystem_options={"ext4": ("errors=continue",)},
        ),
    )


def test_a_missing_file_is_a_fault(file: Path) -> None:
    assert faults_of(file) == [": cannot be read: No such file or directory"]


def test_a_directory_is_refused(file: Path) -> None:
    file.mkdir()
    assert faults_of(file) == [": cannot be read: is a directory"]


def test_a_fifo_is_refused_without_a_wait(file: Path) -> None:
    os.mkfifo(file)
    assert faults_of(file) == [": cannot be read: is not a regular file"]


def test_an_endless_device_is_refused(file: Path) -> None:
    file.symlink_to("/dev/zero")
    assert faults_of(file) == [": cannot be read: is not a regular file"]


def test_a_file_of_a_disks_size_is_refused(file: Path) -> None:
    file.touch()
    os.truncate(file, 10**12)
    assert faults_of(file) == [": cannot be read: has more than 262144 bytes"]


def test_a_link_that_leads_nowhere_is_not_a_missing_file(file: Path) -> None:
    file.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="cannot be read: is a link that leads nowhere"):
        loader.load(file, AnyonesFiles(), required=False)


def test_the_built_in_rule_applies_without_a_file_and_drop_ins(file: Path) -> None:
    assert loader.load(file, AnyonesFiles(), required=False) == Config()


def test_the_built_in_rule_applies_for_root_where_nothing_is_installed(
    roots_folder: Path,
) -> None:
    for file in (roots_folder / "agent.toml", roots_folder / "caam-hotplug" / "agent.toml"):
        assert loader.load(file, RootsFiles(), required=False) == Config()


def test_a_file_in_place_of_the_drop_ins_directory_is_a_fault(file: Path) -> None:
    (file.parent / "rules.d").write_text("")
    assert faults(file, "") == [": cannot be read: Not a directory"]


def drop_in(file: Path, name: str, text: str) -> Path:
    path = file.parent / "rules.d" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_rules_of_drop_ins_are_asked_first_in_the_order_of_the_files_names(file: Path) -> None:
    drop_in(file, "20-b.toml", '[[rule]]\nname = "third"')
    drop_in(file, "10-a.toml", '[[rule]]\nname = "first"\n[[rule]]\nname = "second"')
    drop_in(file, "30-c.conf", "not read")
    names = [rule.name for rule in loaded(file, '[[rule]]\nname = "last"').rule]
    assert names == ["first", "second", "third", "last"]


def test_drop_ins_replace_the_built_in_rule(file: Path) -> None:
    drop_in(file, "a.toml", '[[rule]]\nname = "mine"')
    assert [rule.name for rule in loaded(file, 'log_level = "debug"').rule] == ["mine"]


def test_the_built_in_rule_applies_beside_drop_ins_without_rules(file: Path) -> None:
    drop_in(file, "a.toml", "")
    assert loaded(file, "").rule == BUILT_IN


def test_a_drop_in_holds_rules_only(file: Path) -> None:
    drop_in(file, "a.toml", 'mount_root = "/media"')
    assert faults(file, "") == ["mount_root: is not a key here; known are rule"]


def test_the_faults_of_all_files_are_named_together(file: Path) -> None:
    first = drop_in(file, "a.toml", in_rule("action = 1"))
    second = drop_in(file, "b.toml", "not toml")
    file.write_text("xyzzy = 1")
    with pytest.raises(ConfigError) as caught:
        loader.load(file, AnyonesFiles())
    assert [fault.file for fault in caught.value.faults] == [file, first, second]


def test_names_must_differ_across_files(file: Path) -> None:
    drop_in(file, "a.toml", '[[rule]]\nname = "a"')
    (fault,) = faults(file, '[[rule]]\nname = "a"')
    assert fault.startswith("rule: 2 rules are called 'a'")


@given(documents.map(str.encode) | single_keys.map(str.encode) | st.binary(max_size=60))
def test_a_file_of_any_content_is_read_or_refused_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / f"any-{os.getpid()}.toml"
    file.write_bytes(content)
    try:
        read = loader.load(file, AnyonesFiles())
    except ConfigError as error:
        assert error.faults
        assert all(fault.problem for fault in error.faults)
    else:
        assert len({rule.name for rule in read.rule}) == len(read.rule)

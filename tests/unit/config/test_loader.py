from __future__ import annotations

import os
import re
import tomllib
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

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

INSTALLED = Path(__file__).parents[3] / "config" / "agent.toml"
COMMENTED = re.compile(r"^# (\[.+\]|[a-z_0-9]+ = .+)$", re.MULTILINE)
"""A key or a table header behind a comment sign, as opposed to prose."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test writes its configuration."""
    return tmp_path / "agent.toml"


def loaded(file: Path, text: str) -> Config:
    file.write_text(text)
    return loader.load(file, AnyonesFiles())


def faults(file: Path, text: str) -> list[str]:
    """Every fault of the text as `KEY PATH: PROBLEM`."""
    file.write_text(text)
    return faults_of(file)


def faults_of(file: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loader.load(file, AnyonesFiles())
    assert str(caught.value) == "\n".join(str(fault) for fault in caught.value.faults)
    return [f"{fault.key_path}: {fault.problem}" for fault in caught.value.faults]


def in_rule(line: str) -> str:
    return f'[[rule]]\nname = "r"\n{line}\n'


def test_the_installed_file_does_what_the_agent_does_without_one() -> None:
    installed = loader.load(INSTALLED, AnyonesFiles())
    rules = tuple(replace(rule, name=BUILT_IN[0].name) for rule in installed.rule)
    assert replace(installed, rule=rules) == Config()


@pytest.mark.parametrize("described", [Config, Rule, Match, KeySource, Crypt, MountSettings])
def test_the_installed_file_shows_every_key(described: type[Any]) -> None:
    text = INSTALLED.read_text(encoding="utf-8")
    for field in fields(described):
        key = rf"^(# )?(\[+(rule\.)?{field.name}\]+|{field.name} = .+)$"
        assert re.search(key, text, re.MULTILINE), field.name


def test_the_installed_file_is_valid_with_every_comment_sign_taken_away(file: Path) -> None:
    everything = loaded(file, COMMENTED.sub(r"\1", INSTALLED.read_text(encoding="utf-8")))
    assert [rule.name for rule in everything.rule] == ["removable", "cartridge"]
    cartridge = everything.rule[1]
    assert cartridge.crypt.sector_size == 4096
    assert cartridge.mount.filesystem_options["vfat"] == ("utf8",)


def test_what_the_installed_file_shows_as_a_default_is_the_default() -> None:
    text = INSTALLED.read_text(encoding="utf-8")
    table = tomllib.loads(COMMENTED.sub(r"\1", text))
    first = table["rule"][0]
    del table["rule"], first["name"]
    shown_match = first.pop("match")
    assert table == {key: plain(getattr(Config(), key)) for key in table}
    builtin = BUILT_IN[0]
    for part in ("key", "crypt", "mount"):
        shown = first.pop(part)
        assert shown == {key: plain(getattr(getattr(builtin, part), key)) for key in shown}
    assert first == {key: plain(getattr(builtin, key)) for key in first}
    for key in ("bus", "removable", "partlabel", "devtype"):
        assert shown_match[key] == plain(getattr(builtin.match, key))


def plain(value: Any) -> Any:
    """A value as TOML gives it."""
    match value:
        case Enum():
            return value.value
        case Path():
            return str(value)
        case Template():
            return value.text
        case tuple():
            return [plain(item) for item in value]
        case dict():
            return {key: plain(item) for key, item in value.items()}
    return value


SINGLE = COMMENTED.findall(INSTALLED.read_text(encoding="utf-8").split("\n# [[rule]]\n")[0])


@pytest.mark.parametrize("line", SINGLE)
def test_every_commented_key_is_valid_where_it_stands(line: str, file: Path) -> None:
    text = INSTALLED.read_text(encoding="utf-8")
    assert loaded(file, text.replace(f"\n# {line}\n", f"\n{line}\n", 1)).rule[0].name == "removable"


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
        mount.options = ["noexec"]
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
            options=("noexec",),
            read_only=True,
            filesystem_options={"ext4": ("errors=continue",)},
        ),
    )


def test_a_fault_is_shown_with_file_key_and_problem(file: Path) -> None:
    file.write_text('log_level = "loud"')
    with pytest.raises(ConfigError) as caught:
        loader.load(file, AnyonesFiles())
    assert str(caught.value) == (
        f"{file}: log_level: expected debug, info, warning, error; found 'loud'"
    )


FILE_FAULTS = [
    ("mount_rot = 1", "mount_rot: is not a key here; did you mean 'mount_root'?"),
    (
        "xyzzy = 1",
        "xyzzy: is not a key here; known are source, await_udev, blob_directory, "
        "mount_root, log_level, stuck_after_s, stop_within_s, rule",
    ),
    (
        'source = "udve"',
        "source: expected auto, udev, kernel; found 'udve'; did you mean 'udev'?",
    ),
    ("log_level = {}", "log_level: expected debug, info, warning, error; found a table"),
    ('mount_root = "media"', "mount_root: expected an absolute path without .., found 'media'"),
    (
        'blob_directory = "/data/../etc"',
        "blob_directory: expected an absolute path without .., found '/data/../etc'",
    ),
    ("blob_directory = true", "blob_directory: expected a text, found true"),
    (
        'mount_root = "//run/media"',
        "mount_root: expected an absolute path without .., found '//run/media'",
    ),
    ('stuck_after_s = "10"', "stuck_after_s: expected a number, found '10'"),
    ('log_level = "INFO"',
     "log_level: expected debug, info, warning, error; found 'INFO'; did you mean 'info'?"),
    ("stuck_after_s = 0", "stuck_after_s: expected seconds above 0, found 0.0"),
    ("stuck_after_s = nan", "stuck_after_s: expected seconds above 0, found nan"),
    ("rule = 3", "rule: expected tables [[rule]], found 3"),
    ("rule = [3]", "rule[1]: expected a table, found 3"),
    ("[rule]", "rule: expected tables [[rule]], found a table"),
    ("[[rule]]", "rule[1]: needs the key 'name'"),
]  # fmt: skip
"""A text and the fault that is found in it."""


@pytest.mark.parametrize(("text", "fault"), FILE_FAULTS)
def test_a_fault_of_the_file_is_told_with_what_was_expected(
    text: str, fault: str, file: Path
) -> None:
    assert faults(file, text) == [fault]


RULE_FAULTS = [
    ("matsch = {}", "matsch: is not a key here; did you mean 'match'?"),
    ("match = 3", "match: expected a table, found 3"),
    ("match.partlable = 'x'", "match.partlable: is not a key here; did you mean 'partlabel'?"),
    (
        "match.bus = ['usb', 'mcm']",
        "match.bus: expected usb, mmc, scsi, ata, nvme, virtio, loop, other; found 'mcm'; "
        "did you mean 'mmc'?",
    ),
    ("match.devtype = 'disc'",
     "match.devtype: expected partition, disk; found 'disc'; did you mean 'disk'?"),
    (
        "match.min_size = '64MB'",
        "match.min_size: expected a size such as 512MiB or 64GiB, found '64MB'",
    ),
    ("action = 'ignroe'",
     "action: expected mount, unlock, ignore; found 'ignroe'; did you mean 'ignore'?"),
    ("on_stop = 1", "on_stop: expected lock, keep; found 1"),
    (
        "key.backend = 'truste'",
        "key.backend: expected auto, tagged, trusted, encrypted; found 'truste'; did you mean "
        "'trusted'?",
    ),
    (
        "key.options = 'blobauth=sword.fish'",  # which is not repeated
        "key.options: expected options such as keyhandle=0x81000001, with values of "
        "A-Z a-z 0-9 : _ - and one space between two of them",
    ),
    ("key.length = 8", "key.length: expected bytes from 16 to 128, or 0, found 8"),
    (
        "key.blob = '../{partlabel}'",
        "key.blob: '../{partlabel}' names a path; expected one file name",
    ),
    ("key.blob = 3", "key.blob: expected a text, found 3"),
    ("crypt.sector_size = 513", "crypt.sector_size: expected 512, 1024, 2048, 4096; found 513"),
    (
        "crypt.sector_size = '512'",
        "crypt.sector_size: expected 512, 1024, 2048, 4096; found '512'",
    ),
    ("match.partlabel = 5", "match.partlabel: expected a text or a list of texts, found 5"),
    ("match.partlabel = []", "match.partlabel: expected at least one entry in the list"),
    ("match.removable = 'yes'", "match.removable: expected true or false, found 'yes'"),
    ("mount.filesystems = []", "mount.filesystems: expected at least one entry in the list"),
    ("crypt.offset = -1", "crypt.offset: expected sectors from 0 on, found -1"),
    ("crypt.iv_offset = -8", "crypt.iv_offset: expected sectors from 0 on, found -8"),
    (
        "crypt.cipher = 'aes xts'",
        "crypt.cipher: expected a cipher such as capi:tk(cbc(aes))-plain, found 'aes xts'",
    ),
    (
        "mount.options = 'noexec'",
        "mount.options: expected a list of nosuid, nodev, noexec, nosymfollow, noatime, "
        "nodiratime, relatime, strictatime; found 'noexec'",
    ),
    (
        "mount.filesystems = ['ext4', 'exfta']",
        "mount.filesystems: expected a list of ext4, xfs, btrfs, f2fs, vfat, exfat; found "
        "'exfta'; did you mean 'exfat'?",
    ),
]  # fmt: skip
"""A line of a rule and the fault that is found in it."""


@pytest.mark.parametrize(("line", "fault"), RULE_FAULTS)
def test_a_fault_of_a_rule_is_told_with_the_rules_number(line: str, fault: str, file: Path) -> None:
    assert faults(file, in_rule(line)) == [f"rule[1].{fault}"]


@pytest.mark.parametrize(
    "line", ["match.removable = 1", "match.partlabel = 5", "crypt.offset = 0.5"]
)
def test_a_value_of_another_type_is_told(line: str, file: Path) -> None:
    (fault,) = faults(file, in_rule(line))
    assert fault.startswith(f"rule[1].{line.partition(' ')[0]}: expected ")


@pytest.mark.parametrize("name", ["", " a", "a/b", "a\\u0000", "ü", "a\\n", "-a"])
def test_a_rules_name_must_be_fit_for_messages(name: str, file: Path) -> None:
    (fault,) = faults(file, f'[[rule]]\nname = "{name}"')
    assert fault.startswith("rule[1].name: expected a name of A-Z a-z 0-9 . _ - and spaces, found")


def test_one_fault_does_not_hide_the_next(file: Path) -> None:
    text = """
        log_level = "loud"
        [[rule]]
        name = "a"
        crypt.offset = -1
        match.partlable = "x"
        [[rule]]
        key.blob = "/"
    """
    assert [fault.partition(": ")[0] for fault in faults(file, text)] == [
        "log_level",
        "rule[1].crypt.offset",
        "rule[1].match.partlable",
        "rule[2].key.blob",
        "rule[2]",
    ]


def test_rules_of_the_same_name_are_refused(file: Path) -> None:
    assert faults(file, '[[rule]]\nname = "a"\n[[rule]]\nname = "b"\n[[rule]]\nname = "a"\n') == [
        "rule: 2 rules are called 'a'; the name tells them apart in messages"
    ]


def test_a_file_that_is_not_there_is_told(file: Path) -> None:
    assert faults_of(file) == [": cannot be read: No such file or directory"]


def test_a_directory_is_no_configuration(file: Path) -> None:
    file.mkdir()
    assert faults_of(file) == [": cannot be read: is a directory"]


@pytest.mark.parametrize("text", ["source = ", "= 1", "[rule", "a = 1\na = 2", "a = 'x", "\0"])
def test_what_is_not_toml_is_told(text: str, file: Path) -> None:
    (fault,) = faults(file, text)
    assert fault.startswith(": is not TOML: ")


def test_what_is_not_utf8_is_told(file: Path) -> None:
    file.write_bytes(b'source = "\xff"')
    (fault,) = faults_of(file)
    assert fault.startswith(": is not TOML: 'utf-8' codec can't decode byte 0xff")


HUGE = "0x1" + "0" * 5000
"""More digits than Python prints (sys.int_info.default_max_str_digits)."""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"log_level = {HUGE}", "log_level: expected debug, info, warning, error; found a number "
         "of more than 64 bits"),
        (in_rule(f"crypt.offset = {HUGE}"), "rule[1].crypt.offset: "),
        (in_rule(f"match.min_size = {HUGE}"), "rule[1].match.min_size: "),
        (in_rule(f'match.max_size = "{"9" * 5000}"'),
         "rule[1].match.max_size: expected a size such as 512MiB or 64GiB, found "),
        (f'log_level = "{"x" * 1000}"', "log_level: expected debug, info, warning, error; found "
         f"'{'x' * 60}' and 940 characters more"),
        ('"\\u001b[2J" = 1', "'\\x1b[2J': is not a key here; known are source"),
        (f"{'x' * 1000} = 1", f"'{'x' * 60}…': is not a key here"),
        (f"a = {'[' * 5000}", ": is not TOML that can be read: nested too deeply"),
        (f"a{'.a' * 5000} = 1", ": cannot be read: has a key of more than 100 parts"),
    ],
)  # fmt: skip
def test_what_is_absurdly_large_is_told_in_a_line_that_people_read(
    text: str, fault: str, file: Path
) -> None:
    (told,) = faults(file, text)
    assert told.startswith(fault)
    assert len(told) < 500
    assert told.isprintable()


def test_dots_in_prose_are_no_parts_of_a_key(file: Path) -> None:
    assert loaded(file, f"# {'.' * 300}\nrule = [] # {'.' * 90}\n").rule == ()


def test_a_fifo_is_no_configuration_and_is_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    assert faults_of(file) == [": cannot be read: is not a regular file"]


def test_a_device_without_end_is_no_configuration(file: Path) -> None:
    file.symlink_to("/dev/zero")
    assert faults_of(file) == [": cannot be read: is not a regular file"]


def test_a_file_of_a_disks_size_is_no_configuration(file: Path) -> None:
    file.touch()
    os.truncate(file, 10**12)
    assert faults_of(file) == [": cannot be read: has more than 262144 bytes"]


def test_a_link_that_leads_nowhere_is_not_a_missing_file(file: Path) -> None:
    file.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="cannot be read: is a link that leads nowhere"):
        loader.load(file, AnyonesFiles(), required=False)


def test_without_a_file_and_drop_ins_the_built_in_rule_stands(file: Path) -> None:
    assert loader.load(file, AnyonesFiles(), required=False) == Config()


def test_where_nothing_is_installed_the_built_in_rule_stands_for_root_too(
    roots_folder: Path,
) -> None:
    for file in (roots_folder / "agent.toml", roots_folder / "caam-hotplug" / "agent.toml"):
        assert loader.load(file, RootsFiles(), required=False) == Config()


def test_a_folder_of_drop_ins_that_is_a_file_is_told(file: Path) -> None:
    (file.parent / "rules.d").write_text("")
    assert faults(file, "") == [": cannot be read: Not a directory"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            'match = { min_size = "2MiB", max_size = "1MiB" }',
            "match.min_size: expected at most max_size, which is 1048576, found 2097152",
        ),
        (
            'mount.options = ["noatime", "strictatime"]',
            "mount.options: expected one of noatime, relatime, strictatime; found noatime, "
            "strictatime",
        ),
        (
            'mount.filesystem_options.ext4 = ["ro", "rw"]',
            "mount.filesystem_options: expected one of 'ro' and 'rw' for ext4, found both",
        ),
        (
            'mount.filesystem_options.ext4 = ["exec", "noexec"]',
            "mount.filesystem_options: expected one of 'exec' and 'noexec' for ext4, found both",
        ),
        (
            'mount.filesystem_options.ext4 = ["errors=panic", "errors=continue"]',
            "mount.filesystem_options: expected one of 'errors=panic' and 'errors=continue' for "
            "ext4, found both",
        ),
        (
            'mount = { read_only = true, filesystem_options = { xfs = ["rw"] } }',
            "mount.read_only: expected false, as filesystem_options ask for 'rw', found true",
        ),
        (
            'mount.filesystem_options.ext4 = ["noload\\u0000"]',
            "mount.filesystem_options: expected an option such as errors=continue or noquota for "
            "ext4, found 'noload\\x00'",
        ),
        (
            'mount.filesystem_options.ext4 = [""]',
            "mount.filesystem_options: expected an option such as errors=continue or noquota for "
            "ext4, found ''",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_told(line: str, fault: str, file: Path) -> None:
    assert faults(file, in_rule(line)) == [f"rule[1].{fault}"]


@pytest.mark.parametrize(
    "line",
    [
        'match = { min_size = "1MiB", max_size = "1MiB" }',
        'mount.options = ["noatime", "nodiratime"]',
        'mount.filesystem_options = { ext4 = ["ro"], xfs = ["rw"] }',
        'mount.filesystem_options.ext4 = ["errors=continue", "errors=continue", "noload"]',
        'mount = { read_only = true, filesystem_options.ext4 = ["ro"] }',
        'mount.filesystem_options.ext4 = ["context=system_u:object_r:removable_t:s0:c1,c2"]',
    ],
)
def test_keys_that_go_together_are_read(line: str, file: Path) -> None:
    assert loaded(file, in_rule(line)).rule[0].name == "r"


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


def test_drop_ins_without_rules_leave_the_built_in_rule(file: Path) -> None:
    drop_in(file, "a.toml", "")
    assert loaded(file, "").rule == BUILT_IN


def test_a_drop_in_holds_rules_only(file: Path) -> None:
    drop_in(file, "a.toml", 'mount_root = "/media"')
    assert faults(file, "") == ["mount_root: is not a key here; known are rule"]


def test_faults_of_every_file_are_told_together(file: Path) -> None:
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


keys = st.sampled_from(
    [
        f.name
        for kind in (Config, Rule, Match, KeySource, Crypt, MountSettings)
        for f in fields(kind)
    ]
) | st.just("xyzzy")
values = st.recursive(
    st.sampled_from(
        ["true", "0", "-1", "4096", "nan", "inf", "1.5", '""', '"usb"', '"ext4"', "1979-05-27",
         "07:32:00", '"{partlabel}"', '"64MiB"', '"/x"', '"\\u0000"', "{}", "[]"]
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
    | st.tuples(keys, inner).map(lambda pair: f"{{ {pair[0]} = {pair[1]} }}"),
    max_leaves=4,
)  # fmt: skip
headers = st.sampled_from(
    ["[[rule]]", "[rule.match]", "[rule.key]", "[rule.crypt]", "[rule.mount]", 'name = "r"']
)
lines = headers | st.tuples(keys, values).map(lambda pair: f"{pair[0]} = {pair[1]}")
documents = st.lists(lines, max_size=8).map("\n".join)
single_keys = st.tuples(st.sampled_from(["match", "key", "crypt", "mount"]), keys, values).map(
    lambda parts: in_rule(f"{parts[0]}.{parts[1]} = {parts[2]}")
)


@given(documents.map(str.encode) | single_keys.map(str.encode) | st.binary(max_size=60))
def test_whatever_a_file_holds_it_is_read_or_refused_in_words(
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

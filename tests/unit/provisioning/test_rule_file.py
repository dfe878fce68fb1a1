from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.cli.provision import FILESYSTEMS
from caam_hotplug.config import loader
from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import KeySource, Rule
from caam_hotplug.errors import HotplugError
from caam_hotplug.formats import blobs
from caam_hotplug.formats.blobs import Backend
from caam_hotplug.formats.crypt_table import CIPHERS, Crypt
from caam_hotplug.kernel import config_files
from caam_hotplug.keys.backends import SealMethod
from caam_hotplug.provisioning import rule_file
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.rule_file import (
    differences,
    partition_of,
    plan_rule,
    require_writable,
    rule_for,
)
from unit.provisioning.asked import DISK, options_for

BLOB: Final = blobs.Tagged(b"", 1, "ecb", 16)
OF_THE_CAAM: Final = blobs.Trusted(bytes(64 + 48))
OF_A_TPM: Final = blobs.Trusted(bytes(213))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A board without blobs, whose udev knows nothing more of a disk."""
    monkeypatch.setattr(rule_file, "_known_to_udev", lambda disk, _config: disk)
    return Config(blob_directory=tmp_path / "caam")


def refusal(options: ProvisionOptions, config: Config) -> str:
    with pytest.raises(HotplugError) as refused:
        require_writable(options, config)
    return str(refused.value)


def test_the_options_defaults_are_those_of_a_rule() -> None:
    rule, _ = rule_for("cartridge-01")
    assert rule.crypt == Crypt(cipher=CIPHERS["logon"])


@given(
    label=st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,35}\Z"),
    filesystem=st.sampled_from(FILESYSTEMS),
    sector_size=st.sampled_from([512, 1024, 2048, 4096]),
)
def test_the_drop_in_is_a_rule_for_the_label_alone(
    tmp_path_factory: pytest.TempPathFactory, label: str, filesystem: str, sector_size: int
) -> None:
    rule, text = rule_for(label, filesystem=filesystem, sector_size=sector_size)
    folder = tmp_path_factory.mktemp("etc")
    (folder / "rules.d").mkdir()
    (folder / "rules.d" / f"{label}.toml").write_text(text)
    loaded = loader.load(folder / "agent.toml", config_files.AnyonesFiles(), required=False)
    assert loaded.rule == (rule,)
    assert (rule.name, rule.match.partlabel) == (label, label)
    assert rule.mount.filesystems == (filesystem,)
    assert rule.crypt.sector_size == sector_size


def test_the_drop_in_of_a_trusted_key_has_what_its_blob_may_not_have() -> None:
    rule, text = rule_for(
        "x", backend="trusted", key_bytes=64, key_options="keyhandle=0x81000001 migratable=0"
    )
    assert (rule.key.backend, rule.key.length) == ("trusted", 64)
    assert rule.key.options == "keyhandle=0x81000001 migratable=0"
    assert "\n\n[rule.crypt]\n" in text
    under, _ = rule_for("x", backend="encrypted", key_bytes=64, key_options="keyhandle=1")
    assert (under.key.length, under.key.options) == (0, "keyhandle=1")
    assert "[rule.key]" not in rule_for("x", key_bytes=16)[1]


@given(st.text(max_size=40))
def test_any_cipher_is_one_or_refused(cipher: str) -> None:
    try:
        rule, _ = rule_for("x", cipher=cipher)
    except HotplugError:
        return
    assert rule.crypt.cipher == cipher


def test_a_rule_with_the_name_must_be_changed_by_hand(config: Config, roots_folder: Path) -> None:
    options = options_for(rule_file=roots_folder / "rules.d" / "cartridge-01.toml")
    taken = replace(config, rule=(options.rule,))
    assert "there is a rule 'cartridge-01' already" in refusal(options, taken)


def test_a_rule_is_written_once(config: Config, roots_folder: Path) -> None:
    file = roots_folder / "etc" / "rules.d" / "cartridge-01.toml"
    options = options_for(
        rule_file=file, config_file=roots_folder / "etc" / "agent.toml", sector_size=4096
    )
    for is_written in (False, True):
        plan = plan_rule(options, config, partition_of(options, config, DISK), BLOB)
        assert plan.is_written is is_written
        assert plan.step() == (None if is_written else f"write the rule to {file}")
        plan.write()
        assert file.read_text() == options.rule_text
        (note,) = plan.notes
        assert "built-in one no longer applies" in note
    other = replace(options_for(rule_file=file), config_file=options.config_file)
    assert "says something else; it is not overwritten" in refusal(other, config)


@pytest.mark.parametrize(
    ("key", "differs"),
    [
        (KeySource(length=64, options="keyhandle=1 blobauth=x"), []),
        (KeySource(length=64, options="blobauth=x"), []),
        (KeySource(length=64, options="blobauth=y"), ["key.options"]),
        (KeySource(options="blobauth=x"), ["key.length"]),
        (KeySource(length=32, options="blobauth=x"), ["key.length"]),
        (KeySource(), ["key.length", "key.options"]),
    ],
)
def test_a_rule_without_the_options_that_a_tpms_key_needs_does_not_open_it(
    key: KeySource, differs: list[str]
) -> None:
    method = SealMethod(backend="trusted", options="keyhandle=1 blobauth=x")
    options = options_for(method=method, key_bytes=64, cipher="aes-xts-plain64")
    rule = Rule(name="x", key=key)
    assert differences(options, rule, "cartridge-01.bb", OF_A_TPM) == differs


@pytest.mark.parametrize(("length", "differs"), [(0, []), (64, []), (32, ["key.length"])])
def test_a_rule_need_not_have_the_length_of_the_caams_keys(length: int, differs: list[str]) -> None:
    method = SealMethod(backend="trusted")
    options = options_for(method=method, key_bytes=64, cipher="aes-xts-plain64")
    rule = Rule(name="x", key=KeySource(length=length))
    assert differences(options, rule, "cartridge-01.bb", OF_THE_CAAM) == differs


def test_a_rule_needs_the_length_of_a_key_whose_blob_does_not_have_it() -> None:
    method = SealMethod(backend="trusted")
    options = options_for(method=method, key_bytes=64, cipher="aes-xts-plain64")
    assert differences(options, Rule(name="x"), "cartridge-01.bb", OF_A_TPM) == ["key.length"]


def test_a_folder_of_rules_that_others_may_write_to_is_refused(
    config: Config, roots_folder: Path
) -> None:
    (roots_folder / "rules.d").mkdir()
    (roots_folder / "rules.d").chmod(0o777)
    options = options_for(rule_file=roots_folder / "rules.d" / "cartridge-01.toml")
    assert "can be written by others than root" in refusal(options, config)


@pytest.mark.parametrize("backend", ["tagged", "trusted"])
def test_a_rule_for_a_partition_without_a_label_knows_it_by_its_identifier(
    backend: Backend,
) -> None:
    rule, text = rule_for("recorder", backend=backend, partuuid="1234abcd-02")
    assert 'match = { partuuid = "1234abcd-02" }' in text
    assert rule.key.blob.text == "recorder.bb"
    assert rule.mount.name.text == "recorder"
    assert rule.match.partlabel is None

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.cli.provision import FILESYSTEMS, rule_for
from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import KeySource, Rule
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import mkfs
from caam_hotplug.keys.sealing import SealMethod
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId
from caam_hotplug.provisioning.options import Wish, _differences, require_sense, write_rule

TIB = 1 << 31  # sectors
DISK = Volume(
    VolumeId(9, 0), "sdb", DeviceNumber(8, 16), DevType.DISK, Sectors(1 << 24), Bus.USB, True, False
)


def wish_for(*, size: int = 1 << 24, **more: Any) -> tuple[Wish, Volume]:
    """What is to be made, and the disk."""
    choices = {k: more.pop(k) for k in ("filesystem", "cipher", "sector_size") if k in more}
    rule, text = rule_for("cartridge-01", **choices)
    made = Wish(
        device="/dev/sdb",
        rule=rule,
        rule_text=text,
        key_bytes=16,
        method=SealMethod(backend="tagged"),
    )
    return replace(made, **more), replace(DISK, size=Sectors(size))


def refusal(wish: Wish, disk: Volume, config: Config) -> str:
    with pytest.raises(HotplugError) as refused:
        require_sense(wish, config, disk)
    return str(refused.value)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A board without blobs."""
    return Config(blob_directory=tmp_path / "caam")


def test_what_makes_sense_is_taken(config: Config) -> None:
    require_sense(*reversed_to(wish_for(), config))
    require_sense(*reversed_to(wish_for(erase="sdb"), config))


def reversed_to(both: tuple[Wish, Volume], config: Config) -> tuple[Wish, Config, Volume]:
    wish, disk = both
    return wish, config, disk


def test_an_iv_that_would_repeat_is_refused_with_the_cipher_to_use(config: Config) -> None:
    require_sense(*reversed_to(wish_for(size=2 * TIB), config))
    assert refusal(*wish_for(size=2 * TIB + 8), config).endswith("use plain64")
    plain64 = "capi:tk(cbc(aes))-plain64"
    require_sense(*reversed_to(wish_for(size=8 * TIB, cipher=plain64), config))


def test_a_disk_that_is_too_small_for_the_filesystem_is_refused(config: Config) -> None:
    for filesystem in FILESYSTEMS:
        least = mkfs.least(filesystem) // 2048 + 2
        words = refusal(*wish_for(size=least * 2048 - 8, filesystem=filesystem), config)
        assert words.endswith(f"{filesystem} needs {least} MiB at least")


def test_another_disks_name_erases_nothing(config: Config) -> None:
    for name in ("sdc", "/dev/sdb", "", "SDB", "\x1b[2J"):
        words = refusal(*wish_for(erase=name), config)
        assert words.endswith("this is sdb; nothing was erased")
        assert words.isprintable()


@pytest.mark.parametrize("name", ["a\nb.recovery", "a\udcff.recovery"])
def test_a_recovery_file_whose_name_it_could_not_say_is_refused(name: str, config: Config) -> None:
    words = refusal(*wish_for(recovery_file=Path("/root", name)), config)
    assert words.endswith("the file says its own name, and this one is no text; choose another")
    assert words.isprintable()


def test_a_rule_of_the_name_must_be_changed_by_hand(config: Config, roots_folder: Path) -> None:
    wish, disk = wish_for(rule_file=roots_folder / "rules.d" / "cartridge-01.toml")
    taken = replace(config, rule=(wish.rule,))
    assert "there is a rule 'cartridge-01' already" in refusal(wish, disk, taken)


def test_a_rule_is_written_once(config: Config, roots_folder: Path) -> None:
    file = roots_folder / "etc" / "rules.d" / "cartridge-01.toml"
    wish, disk = wish_for(rule_file=file, sector_size=4096)
    for _ in range(2):
        require_sense(wish, config, disk)
        notes = list(write_rule(wish, config))
        assert file.read_text() == wish.rule_text
        assert notes[0] == f"the rule is in {file}"
    assert "built-in one no longer applies" in notes[1]
    other, _ = wish_for(rule_file=file)
    assert "says something else; it is not overwritten" in refusal(other, disk, config)


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
def test_a_rule_that_does_not_say_what_a_tpms_key_needs_is_not_one_for_it(
    key: KeySource, differs: list[str]
) -> None:
    method = SealMethod(backend="trusted", options="keyhandle=1 blobauth=x")
    wish, _ = wish_for(method=method, key_bytes=64, cipher="aes-xts-plain64")
    assert _differences(wish, Rule(name="x", key=key), "cartridge-01.bb") == differs


@pytest.mark.parametrize(("length", "differs"), [(0, []), (64, []), (32, ["key.length"])])
def test_of_the_caams_keys_a_rule_need_not_say_the_length(length: int, differs: list[str]) -> None:
    wish, _ = wish_for(method=SealMethod(backend="trusted"), key_bytes=64, cipher="aes-xts-plain64")
    rule = Rule(name="x", key=KeySource(length=length))
    assert _differences(wish, rule, "cartridge-01.bb") == differs


def test_a_folder_of_rules_that_others_may_write_to_is_refused(
    config: Config, roots_folder: Path
) -> None:
    (roots_folder / "rules.d").mkdir()
    (roots_folder / "rules.d").chmod(0o777)
    wish, disk = wish_for(rule_file=roots_folder / "rules.d" / "cartridge-01.toml")
    assert "can be written by others than root" in refusal(wish, disk, config)

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.cli.provision import FILESYSTEMS
from caam_hotplug.config.loader import Config
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import mkfs
from caam_hotplug.model import Sectors
from caam_hotplug.provisioning.checks import require_provisionable
from unit.provisioning.asked import DISK, options_for

TIB = 1 << 31  # sectors


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A board without blobs."""
    return Config(blob_directory=tmp_path / "caam")


def check(config: Config, *, size: int = 1 << 24, **more: Any) -> None:
    require_provisionable(options_for(**more), config, replace(DISK, size=Sectors(size)))


def refusal(config: Config, **more: Any) -> str:
    with pytest.raises(HotplugError) as refused:
        check(config, **more)
    return str(refused.value)


def test_sensible_options_are_accepted(config: Config) -> None:
    check(config)
    check(config, erase="sdb")


def test_an_iv_that_would_repeat_is_refused_with_the_cipher_to_use(config: Config) -> None:
    check(config, size=2 * TIB)
    assert refusal(config, size=2 * TIB + 8).endswith("use plain64")
    check(config, size=8 * TIB, cipher="capi:tk(cbc(aes))-plain64")


def test_a_disk_that_is_too_small_for_the_filesystem_is_refused(config: Config) -> None:
    for filesystem in FILESYSTEMS:
        least = mkfs.least(filesystem) // 2048 + 2
        words = refusal(config, size=least * 2048 - 8, filesystem=filesystem)
        assert words.endswith(f"{filesystem} needs {least} MiB at least")


def test_another_disks_name_erases_nothing(config: Config) -> None:
    for name in ("sdc", "/dev/sdb", "", "SDB", "\x1b[2J"):
        words = refusal(config, erase=name)
        assert words.endswith("this is sdb; nothing was erased")
        assert words.isprintable()


@pytest.mark.parametrize("name", ["a\nb.recovery", "a\udcff.recovery"])
def test_a_recovery_file_whose_name_it_could_not_say_is_refused(name: str, config: Config) -> None:
    words = refusal(config, recovery_file=Path("/root", name))
    assert words.endswith("the file says its own name, and this one is no text; choose another")
    assert words.isprintable()

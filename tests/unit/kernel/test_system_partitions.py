"""A partition that the running system needs is known, also while nothing has it mounted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from caam_hotplug.errors import DeviceInUseError
from caam_hotplug.kernel import system_partitions
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.kernel.table_entry import TableEntry
from caam_hotplug.model import Sectors
from unit.volumes import stick

VOLUME = replace(stick(), uuid="0A1B-2C3D", label="BOOT")
UUID = "11111111-2222-4333-8444-555555555555"
ENTRY = TableEntry(Place(2, Sectors(400), Sectors(200)), "a type", "recorder", UUID)


class System:
    """A system with these files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name in ("_COMMAND_LINE", "_FSTAB", "_LOADER"):
            monkeypatch.setattr(system_partitions, name, folder / name)

    def has(self, name: str, content: str | bytes) -> None:
        """Write the file."""
        encoded = content.encode() if isinstance(content, str) else content
        (self.folder / name).write_bytes(encoded)

    def why(self, entry: TableEntry = ENTRY) -> str:
        """Return why the partition is the system's; empty if it is not."""
        try:
            system_partitions.require_not_the_systems(VOLUME, entry, Path("/data/caam"))
        except DeviceInUseError as error:
            said = str(error)
            prefix = f"use {VOLUME.node}: it is the system's own: "
            assert said.startswith(prefix)
            return said.removeprefix(prefix)
        return ""


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


def test_a_board_without_any_of_the_files_needs_nothing(system: System) -> None:
    assert system.why() == ""


def test_what_the_table_says_of_the_partition_is_passed_on(system: System) -> None:
    assert system.why(replace(ENTRY, boots="it is an EFI system partition")) == (
        "it is an EFI system partition"
    )


NAMES = [f"PARTUUID={UUID}", f"PARTUUID={UUID.upper()}", "PARTLABEL=recorder", "UUID=0a1b-2c3d",
         "LABEL=BOOT", 'LABEL="BOOT"']  # fmt: skip
OTHERS = ["PARTUUID=11111111-2222-4333-8444-555555555556", "LABEL=recorder", "PARTLABEL=BOOT",
          "/dev/nothing", "tmpfs", "server:/export", "=", "UUID=", "ID=x", "/dev/\x01"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameter", ["root", "resume", "mount.usr"])
def test_the_kernels_command_line_names_it(system: System, parameter: str, name: str) -> None:
    system.has("_COMMAND_LINE", f"quiet {parameter}={name} ro rootwait\n")
    assert system.why() == f"the kernel's command line has {parameter}={name}"


@pytest.mark.parametrize("name", [f"PARTUUID={UUID}", "PARTLABEL=recorder", 'LABEL="BOOT"'])
@pytest.mark.parametrize("point", ["/", "/boot", "/boot/efi", "/efi", "/usr", "/var", "/var/lib",
                                   "/data", "/data/caam"])  # fmt: skip
def test_fstab_mounts_it_as_a_part_of_the_system(system: System, name: str, point: str) -> None:
    system.has("_FSTAB", f"# a comment\n\nproc /proc proc\n{name}\t{point} ext4 noauto 0 0\n")
    assert system.why() == f"{system.folder}/_FSTAB mounts it at {point}"


@pytest.mark.parametrize("point", ["/srv/recorder", "/mnt", "none", "/bootable", "/data/caam/x"])
def test_a_mount_elsewhere_is_not_the_systems(system: System, point: str) -> None:
    system.has("_FSTAB", f"PARTLABEL=recorder {point} ext4 defaults 0 2\n")
    assert system.why() == ""


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_partitions_do_not_count(system: System, name: str) -> None:
    system.has("_COMMAND_LINE", f"root={name} root quiet")
    system.has("_FSTAB", f"{name} / ext4\n{name}\n#{name} /\n")
    assert system.why() == ""


def test_the_boot_loader_was_read_from_it(system: System) -> None:
    system.has("_LOADER", bytes(4) + f"{UUID.upper()}\0".encode("utf-16-le"))
    assert system.why() == "the boot loader was read from it"
    assert system.why(replace(ENTRY, uuid="x")) == ""


@pytest.mark.parametrize("content", [b"", b"\x07", bytes(5), b"\xff" * 9])
def test_files_of_any_content_are_read(system: System, content: bytes) -> None:
    for name in ("_COMMAND_LINE", "_FSTAB", "_LOADER"):
        system.has(name, content)
    assert system.why() == ""

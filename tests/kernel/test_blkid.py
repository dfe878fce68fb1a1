"""What libblkid finds on real devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import blkid
from kernel.real import RealWorld
from kernel.witness import Medium, loop_medium, run

PARTUUID = "11111111-2222-3333-4444-555555555555"
LINUX_DATA = "0fc63daf-8483-4772-8e79-3d69d8477de4"


def test_a_probe_of_what_is_no_device_is_an_error(world: RealWorld) -> None:
    with pytest.raises(KernelError) as refused:
        blkid.probe(str(world.kernel.mount_root / "nothing"), ("ext4",))
    assert refused.value.errno == errno.ENOENT


CIPHERS: Final = {"xts": f"aes-xts-plain64 {'5a' * 64}", "cbc": f"aes-cbc-plain64 {'5a' * 16}"}


@contextmanager
def encrypted(medium: Medium, sector_size: int, cipher: str) -> Iterator[str]:
    """Map the medium through dm-crypt, in sectors of this size; yield the mapping's device."""
    options = f" 1 sector_size:{sector_size}" if sector_size != 512 else ""
    table = f"0 {medium.sectors} crypt {CIPHERS[cipher]} 0 {medium.device} 0{options}"
    run("dmsetup", "create", "witness", "--table", table)
    try:
        yield "/dev/mapper/witness"
    finally:
        run("dmsetup", "remove", "--retry", "witness")


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize(
    ("made", "opened", "sector"), [(4096, 512, 4096), (512, 4096, 512), (512, 4096, 4096)]
)
@pytest.mark.parametrize("fat", [12, 16, 32])
def test_a_vfat_that_is_decrypted_with_another_sector_size_is_none(
    nothing_left: None, fat: int, made: int, opened: int, sector: int, cipher: str
) -> None:
    with loop_medium((4 if fat == 12 else 80) << 20) as medium:
        with encrypted(medium, made, cipher) as device:
            run("mkfs.vfat", "-F", str(fat), "-S", str(sector), device)
            assert blkid.probe(device, ["vfat"]) == "vfat"
        with encrypted(medium, opened, cipher) as device:
            assert blkid.probe(device, ["vfat"]) is None


@pytest.mark.parametrize("tables", [1, 2])
def test_a_vfat_whose_tables_differ_after_a_pull_is_one(nothing_left: None, tables: int) -> None:
    with loop_medium(80 << 20) as medium:
        run("mkfs.vfat", "-F", "16", "-S", "4096", "-f", str(tables), "-R", "2", medium.device)
        with open(medium.device, "r+b", buffering=0) as file:
            file.seek(2 * 4096 + 1024)
            file.write(bytes([0xFF] * 512))  # in the first table only
            os.fsync(file.fileno())
        assert blkid.probe(medium.device, ["vfat"]) == "vfat"

"""Checks of the CAAM."""

from __future__ import annotations

import os
import struct

import pytest

from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import Rule
from caam_hotplug.doctor import caam
from caam_hotplug.doctor.result import Status, ok
from caam_hotplug.formats.crypt_table import Crypt
from unit.doctor.boards import BoardFiles

CRYPTO = """\
name         : tk(cbc(aes))
driver       : tk-cbc-aes-caam
module       : kernel
priority     : 3000
refcnt       : 1
selftest     : {selftest}
internal     : no
type         : skcipher

name         : cbc(aes)
driver       : cbc-aes-caam
module       : kernel
priority     : 3000
selftest     : passed

name         : cbc(aes)
driver       : cbc(aes-generic)
priority     : 100
selftest     : unknown
"""


def test_algorithms_are_read_one_by_one() -> None:
    tagged, *others = caam.algorithms(CRYPTO.format(selftest="passed"))
    assert tagged == caam.Algorithm("tk(cbc(aes))", "tk-cbc-aes-caam", 3000, "passed")
    assert [a.driver for a in others] == ["cbc-aes-caam", "cbc(aes-generic)"]
    assert caam.algorithms("") == []
    assert caam.algorithms("name : x\npriority : high\n\n\nnoise\n") == [
        caam.Algorithm("x", "", 0, "unknown")
    ]


@pytest.mark.parametrize(
    ("selftest", "status"), [("passed", Status.OK), ("unknown", Status.FAILURE)]
)
def test_an_algorithm_of_the_caam_without_a_passed_self_test_is_a_failure(
    selftest: str, status: Status, board: BoardFiles
) -> None:
    board.has("/proc/crypto", CRYPTO.format(selftest=selftest))
    assert board.status(caam.of_the_caam) is status
    assert board.status(caam.ciphers) is status


def test_a_cipher_is_judged_by_the_driver_that_the_kernel_would_take(board: BoardFiles) -> None:
    board.has("/proc/crypto", CRYPTO.format(selftest="passed"))
    config = Config(rule=(Rule(name="x", crypt=Crypt(cipher="aes-cbc-essiv:sha256")),))
    (verdict,) = board.seen(caam.ciphers, config)
    assert verdict.found == "cbc(aes) by cbc-aes-caam, self-test passed"


def test_a_kernel_without_caam_and_cipher_fails(board: BoardFiles) -> None:
    board.has("/proc/crypto", "name : cbc(aes)\ndriver : cbc(aes-generic)\nselftest : passed\n")
    assert board.status(caam.of_the_caam) is Status.FAILURE
    assert board.status(caam.ciphers) is Status.FAILURE


@pytest.mark.parametrize(
    ("cipher", "name"),
    [
        ("capi:tk(cbc(aes))-plain", "tk(cbc(aes))"),
        ("capi:tk(cbc(aes))-plain64", "tk(cbc(aes))"),
        ("capi:cbc(aes)-essiv:sha256", "cbc(aes)"),
        ("capi:xts(ecb(aes-generic))-plain64", "xts(ecb(aes-generic))"),
        ("aes-xts-plain64", "xts(aes)"),
        ("aes-cbc-essiv:sha256", "cbc(aes)"),
        ("aes:64-cbc-lmk", "cbc(aes)"),
        ("aes", "cbc(aes)"),
    ],
)
def test_a_cipher_of_dm_crypt_has_a_name_in_the_crypto_api(cipher: str, name: str) -> None:
    assert caam.api_name(cipher) == name


def test_a_missing_device_and_a_file_in_its_place_differ(board: BoardFiles) -> None:
    (missing,) = board.seen(caam.device)
    assert missing.found == "/dev/caam-keygen is not there, and there are no trusted keys either"
    board.has("/dev/caam-keygen")
    (file,) = board.seen(caam.device)
    assert file.found == "/dev/caam-keygen is a file, not a device"


def test_a_device_that_only_an_unconfined_root_may_open_is_a_failure(board: BoardFiles) -> None:
    (board.root / "dev").mkdir()
    device = board.root / "dev/caam-keygen"
    os.mknod(device, 0o020600, os.makedev(1, 3))
    assert board.status(caam.device) is Status.OK
    os.chown(device, 1000, 1000)
    (verdict,) = board.seen(caam.device)
    assert verdict.status is Status.FAILURE
    assert "belongs to user 1000 with mode 0600" in verdict.found


def test_job_rings_are_those_that_linux_drives(board: BoardFiles) -> None:
    assert board.status(caam.job_rings) is Status.UNKNOWN
    tree = "/sys/firmware/devicetree/base/soc@0/bus@30800000/crypto@30900000"
    for ring, status in (("jr@1000", "disabled\0"), ("jr@2000", "okay\0")):
        board.has(f"{tree}/{ring}/compatible", "fsl,sec-v4.0-job-ring\0")
        board.has(f"{tree}/{ring}/status", status)
    (none,) = board.seen(caam.job_rings)
    assert none.status is Status.FAILURE
    assert none.found.endswith("has 2, and Linux drives none of them; kept from Linux: jr@1000")
    driver = board.root / "sys/bus/platform/drivers/caam_jr"
    driver.mkdir(parents=True)
    (driver / "30902000.jr").symlink_to("nowhere")
    (driver / "module").symlink_to("nowhere")
    (some,) = board.seen(caam.job_rings)
    assert some == ok("Linux has 1: 30902000.jr; kept from Linux: jr@1000")


@pytest.mark.parametrize(
    ("compatible", "word", "bit"),
    [
        ("fsl,imx8mm-evk\0fsl,imx8mm\0", 7, 1 << 25),
        ("vendor,board\0fsl,imx8mp\0", 7, 1 << 25),
        ("fsl,imx7d-sdb\0fsl,imx7d\0", 7, 1 << 25),
        ("vendor,board\0fsl,imx6ull\0", 6, 1 << 1),
    ],
)
def test_whether_the_part_is_closed_is_read_from_its_fuse(
    compatible: str, word: int, bit: int, board: BoardFiles
) -> None:
    board.has("/sys/firmware/devicetree/base/compatible", compatible)
    assert board.status(caam.security_state) is Status.UNKNOWN
    fuses = [~bit & 0xFFFFFFFF if at == word else 0xFFFFFFFF for at in range(16)]
    file = "/sys/bus/nvmem/devices/imx-ocotp0/nvmem"
    board.has(file, struct.pack("<16I", *fuses))
    assert board.status(caam.security_state) is Status.WARNING
    board.has(file, struct.pack("<16I", *(bit if at == word else 0 for at in range(16))))
    assert board.status(caam.security_state) is Status.OK
    board.has(file, b"")
    assert board.status(caam.security_state) is Status.UNKNOWN


def test_the_fuse_of_an_unknown_part_is_not_guessed(board: BoardFiles) -> None:
    board.has("/sys/firmware/devicetree/base/compatible", "fsl,imx93\0")
    board.has("/sys/bus/nvmem/devices/imx-ocotp0/nvmem", b"\xff" * 64)
    assert board.status(caam.security_state) is Status.UNKNOWN

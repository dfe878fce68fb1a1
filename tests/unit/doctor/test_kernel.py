"""Checks of the kernel."""

from __future__ import annotations

import gzip

import pytest

from caam_hotplug.doctor import kernel
from caam_hotplug.doctor.result import Status, ok
from unit.doctor.boards import RELEASE, BoardFiles


@pytest.mark.parametrize(
    ("release", "status"),
    [("5.15.71-imx", Status.OK), ("6.6.52", Status.OK), ("5.4.70-2.3.0", Status.FAILURE),
     ("5.10.9", Status.FAILURE), ("strange", Status.FAILURE)],
)  # fmt: skip
def test_a_kernel_that_does_not_number_insertions_is_too_old(
    release: str, status: Status, board: BoardFiles
) -> None:
    (verdict,) = kernel.kernel(board.board(release=release))
    assert verdict.status is status


def test_a_kernel_that_numbers_them_all_the_same_will_do(board: BoardFiles) -> None:
    board.has("/sys/block/sda/diskseq", "3\n")
    (verdict,) = kernel.kernel(board.board(release="5.4.0-vendor"))
    assert verdict.status is Status.OK


ALL_OPTIONS = "\n".join(
    f"CONFIG_{name}=y"
    for name in (
        "BLK_DEV_DM", "DM_CRYPT", "KEYS", "TMPFS", "DEVTMPFS", "EXT4_FS", "CRYPTO_DEV_FSL_CAAM",
        "CRYPTO_DEV_FSL_CAAM_JR", "CRYPTO_DEV_FSL_CAAM_CRYPTO_API", "CRYPTO_DEV_FSL_CAAM_TK_API",
    )
)  # fmt: skip


def test_options_are_read_from_the_kernel_itself_before_a_file_in_boot(board: BoardFiles) -> None:
    board.has(f"/boot/config-{RELEASE}", "# CONFIG_KEYS is not set\n")
    board.has("/proc/config.gz", gzip.compress(ALL_OPTIONS.encode()))
    (verdict,) = board.seen(kernel.kernel_options)
    assert verdict == ok("all that are needed are set (/proc/config.gz)")


def test_options_that_are_missing_are_named_from_a_file_in_boot(board: BoardFiles) -> None:
    options = ALL_OPTIONS.replace("CONFIG_DM_CRYPT=y", "# CONFIG_DM_CRYPT is not set")
    board.has(f"/boot/config-{RELEASE}", options.replace("CONFIG_KEYS=y", ""))
    (verdict,) = board.seen(kernel.kernel_options)
    assert verdict.status is Status.FAILURE
    assert verdict.found == (f"/boot/config-{RELEASE} does not set CONFIG_DM_CRYPT, CONFIG_KEYS")


def test_an_option_whose_work_is_done_otherwise_is_not_missing(board: BoardFiles) -> None:
    board.has("/proc/config.gz", gzip.compress(ALL_OPTIONS.replace("EXT4", "X").encode()))
    board.has("/proc/filesystems", "nodev\ttmpfs\n\text4\n")
    (verdict,) = board.seen(kernel.kernel_options)
    assert verdict.status is Status.OK
    assert "done by other drivers: CONFIG_BTRFS_FS or CONFIG_EXFAT_FS" in verdict.found


def test_without_any_configuration_options_are_unknown(board: BoardFiles) -> None:
    assert board.status(kernel.kernel_options) is Status.UNKNOWN


@pytest.mark.parametrize(
    ("key_users", "used"),
    [
        ("    0:    80 79/79 60/1000000 1280/25000000\n", 60 / 1000000),
        ("  100:     1 1/1 1/200 9/20000\n    0:   80 79/79 190/200 1280/20000\n", 0.95),
        ("    0:    80 79/79 1/200 20000/20000\n", 1.0),
        ("  100:     1 1/1 1/200 9/20000\n", None),
        ("", None),
    ],
)
def test_the_quota_of_keys_is_that_of_keys_or_of_bytes(key_users: str, used: float | None) -> None:
    assert kernel.quota_used(key_users, 0) == used


def test_the_libraries_can_be_loaded_here(board: BoardFiles) -> None:
    assert board.status(kernel.libraries) is Status.OK

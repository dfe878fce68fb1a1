"""What the kernel says of a device is yes, no, or nothing; the last is an error of its own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from caam_hotplug.errors import KernelError, UnknownError
from caam_hotplug.kernel import sysfs, sysfs_tree


def failing(number: int) -> str:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
def test_what_the_kernel_does_not_have_is_not_there(number: int) -> None:
    assert sysfs_tree.known("sda1", lambda: failing(number)) is None


@pytest.mark.parametrize(
    "number",
    [
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.EINTR),
        *(errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.EBADF),
    ],
)
def test_every_other_error_is_no_answer(number: int) -> None:
    with pytest.raises(UnknownError, match=f"^look at sda1: {os.strerror(number)}"):
        sysfs_tree.known("sda1", lambda: failing(number))


def test_a_number_that_is_none_is_no_answer() -> None:
    with pytest.raises(UnknownError, match="expected a whole number"):
        sysfs_tree.known("sda1", lambda: int(sysfs.number("x")))


def test_too_many_open_files_are_reported_with_the_cure() -> None:
    with pytest.raises(UnknownError, match="raise LimitNOFILE= of the service"):
        sysfs_tree.known("sda1", lambda: failing(errno.EMFILE))


def test_a_directory_that_is_not_of_sysfs_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysfs_tree, "_opened", lambda: os.open(tmp_path, os.O_PATH))
    with pytest.raises(KernelError, match="something covers it: umount /sys"):
        sysfs_tree.root.__wrapped__()


def test_without_the_right_to_mount_the_one_at_sys_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(sysfs_tree.Libc, "fsopen", refuse)
    opened = sysfs_tree.root.__wrapped__()
    try:
        assert sysfs_tree.is_there(opened, "class/block")
        assert not sysfs_tree.is_there(opened, "class/no-such-class")
    finally:
        os.close(opened)


def test_a_medium_is_the_one_that_the_files_describe(tmp_path: Path) -> None:
    disk = tmp_path / "devices/usb1/block/sdb"
    (disk / "sdb1").mkdir(parents=True)
    (tmp_path / "class/block").mkdir(parents=True)
    (tmp_path / "class/block/sdb1").symlink_to("../../devices/usb1/block/sdb/sdb1")
    for name, text in {"dev": "8:17", "size": "8", "ro": "0", "partition": "1"}.items():
        (disk / "sdb1" / name).write_text(f"{text}\n")
    (disk / "diskseq").write_text("7\n")
    root = os.open(tmp_path, os.O_PATH)
    try:
        which = sysfs.present_id("sdb1", root)
        assert str(which) == "7-1"
        (disk / "sdb1/size").write_text("0\n")
        assert sysfs.present_id("sdb1", root) is None
        (disk / "sdb1/size").write_text("many\n")
        with pytest.raises(UnknownError, match=r"look at sdb1: .*expected a whole number"):
            sysfs.present_id("sdb1", root)
        (tmp_path / "class/block/sdb1").unlink()
        assert sysfs.present_id("sdb1", root) is None
    finally:
        os.close(root)

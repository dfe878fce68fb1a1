"""What the kernel's steps say of a path that cannot be walked. /proc lets nobody make anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from caam_hotplug.errors import HotplugError, MountError
from caam_hotplug.kernel.linux import LinuxKernel

NOWHERE = Path("/proc/no-such-directory")


def mount(host: LinuxKernel) -> None:
    host.mount(
        "/dev/null", "ext4", "x", read_only=True, options=(), filesystem_options=()
    )  # fmt: skip


def unmount(host: LinuxKernel) -> None:
    host.unmount("x", {1})


@pytest.mark.parametrize(("step", "operation"), [(mount, "make mount point"), (unmount, "unmount")])
def test_the_error_for_a_missing_mount_root_has_operation_subject_and_cause(
    step: Callable[[LinuxKernel], None], operation: str
) -> None:
    with pytest.raises(MountError) as refused:
        step(LinuxKernel(NOWHERE, NOWHERE))
    assert str(refused.value) == f"{operation} {NOWHERE}/x: No such file or directory"


def test_the_error_for_a_mount_root_that_is_a_file_has_operation_subject_and_cause() -> None:
    host = LinuxKernel(NOWHERE, Path("/proc/version"))
    with pytest.raises(HotplugError, match=r"^open /proc/version: .* is not a directory"):
        host.our_mount_points()


def test_a_mount_root_that_is_not_there_has_no_mount_points() -> None:
    host = LinuxKernel(NOWHERE, NOWHERE)
    host.remove_mount_point("x")
    assert host.our_mount_points() == []


def test_mounts_are_those_of_this_process() -> None:
    assert "/" in {mount.point for mount in LinuxKernel(NOWHERE, NOWHERE).mounts()}

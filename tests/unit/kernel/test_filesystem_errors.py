from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import filesystem_errors
from caam_hotplug.kernel.filesystem_errors import FilesystemErrors


class Kernel:
    """A kernel whose events are those of a pipe; its calls may fail."""

    def __init__(self) -> None:
        self.events, self.report = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.fails = 0
        self.added: list[tuple[Any, ...]] = []

    def fanotify_init(self, *_flags: int) -> int:
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        return self.events

    def fanotify_mark(self, *arguments: Any) -> None:
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        self.added.append(arguments)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(filesystem_errors, "Libc", made)
    return made


def test_an_error_makes_it_readable_until_it_is_read(kernel: Kernel, tmp_path: Path) -> None:
    errors = FilesystemErrors()
    errors.begin()
    errors.add(7, "name")
    assert kernel.added == [(kernel.events, 0x101, 0x8000, 7, b"name")]
    errors.read()
    os.write(kernel.report, b"an event")
    assert errors.fileno() == kernel.events
    errors.read()
    with pytest.raises(BlockingIOError):
        os.read(kernel.events, 1)
    errors.close()
    errors.close()
    os.close(kernel.report)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EMFILE])
def test_a_kernel_that_reports_no_errors_is_said(kernel: Kernel, number: int) -> None:
    kernel.fails = number
    errors = FilesystemErrors()
    with pytest.raises(KernelError):
        errors.begin()
    errors.add(7, "name")
    errors.close()


@pytest.mark.parametrize(
    "number",
    [errno.EOPNOTSUPP, errno.ENODEV, errno.EXDEV, errno.ENOSPC, errno.EMFILE, errno.ENOMEM],
)
def test_a_filesystem_that_reports_none_is_mounted_all_the_same(
    kernel: Kernel, number: int
) -> None:
    errors = FilesystemErrors()
    errors.begin()
    kernel.fails = number
    errors.add(7, "name")
    errors.close()
    os.close(kernel.report)

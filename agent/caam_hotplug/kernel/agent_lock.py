"""The locks that only one agent of a machine can hold. They end with its process.

One is on a file in /run. It is another file for a process with a /run of its own, as in a mount
namespace. So there is a second one, on the control device of device-mapper: all namespaces share
device-mapper, and what makes mappings opens that device. The kernel has one devtmpfs, so the node
is one inode wherever /dev is the machine's. Only root can open either.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Final

from caam_hotplug.errors import HotplugError, KernelError
from caam_hotplug.kernel import paths
from caam_hotplug.kernel.ctypes_lib import reported_as

LOCK: Final = Path("/run/caam-hotplug/agent.lock")
CONTROL: Final = Path("/dev/mapper/control")

_OPEN: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_NO_DEVICE: Final = {errno.ENOENT, errno.ENODEV, errno.ENXIO}
_ENDS_WITHIN_S: Final = 5.0
"""How long the end of a killed process is awaited. A call in the kernel can keep it longer."""
_SIGKILL: Final = 1 << (signal.SIGKILL - 1)


class AnotherAgentError(HotplugError):
    """An agent runs already. Two would release each other's volumes."""

    exit_status: ClassVar[int] = 75
    """EX_TEMPFAIL of sysexits(3). The unit's RestartPreventExitStatus= has it, too."""

    def __init__(self, process: int) -> None:
        """`process`: that agent's, or 0 if it cannot be seen from here."""
        who = f"process {process}" if process else "a process of another PID namespace"
        super().__init__(
            f"run the agent: {who} is the agent already, and goes on; to replace it, stop it first"
        )


class AgentLock:
    """The locks of this process. A forked child and a started program do not have them.

    They are of flock(2): a lock of fcntl(2) would end when libdevmapper closes the same device.
    """

    def __init__(self, lock: Path = LOCK, control: Path = CONTROL) -> None:
        """Take the locks. Raises: AnotherAgentError; KernelError; UnsafePathError."""
        self._held: list[int] = []
        os.register_at_fork(after_in_child=self.close)
        try:
            self._held += _locked_device(control)
            self._held.append(_locked_file(lock))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the locks."""
        while self._held:
            os.close(self._held.pop())


def _locked_file(lock: Path) -> int:
    """Lock the file, which is made if missing, and return its descriptor."""
    with _directory(lock.parent) as folder:
        while True:
            opened = _opened(lock, folder)
            try:
                if _is_locked(opened, lock):
                    if _is_at(opened, lock.name, folder):
                        return opened
                else:
                    _replace(opened, lock, folder)
            except BaseException:
                os.close(opened)
                raise
            os.close(opened)


def _locked_device(control: Path) -> list[int]:
    """Lock the device. Returns its descriptor; none if there is no device to make mappings with."""
    try:
        opened = os.open(control, _OPEN)
    except OSError as error:
        if error.errno in _NO_DEVICE:
            return []
        raise KernelError("open", str(control), error.errno or errno.EIO) from error
    try:
        _is_locked(opened, control)
    except BaseException:
        os.close(opened)
        raise
    return [opened]


@contextmanager
def _directory(folder: Path) -> Iterator[int]:
    with (
        reported_as("make", str(folder)),
        paths.directory(folder.parent) as above,
        suppress(FileExistsError),
    ):
        os.mkdir(folder.name, 0o700, dir_fd=above)
    with paths.directory(folder) as opened:
        yield opened


def _opened(file: Path, folder: int) -> int:
    try:
        return os.open(file.name, _OPEN | os.O_CREAT, 0o600, dir_fd=folder)
    except OSError as error:
        raise KernelError("open", str(file), error.errno or errno.EIO) from error


def _is_at(opened: int, name: str, folder: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(opened), os.lstat(name, dir_fd=folder))
    return False


def _replace(opened: int, lock: Path, folder: int) -> None:
    """Put a new file in place of one that a process which runs no more still has locked."""
    successor = lock.with_suffix(".next")
    made = _opened(successor, folder)
    try:
        # Of several that come here, one has this lock until the name is that of its file.
        if _is_locked(made, successor) and _is_at(opened, lock.name, folder):
            os.rename(successor.name, lock.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(made)


def _is_locked(opened: int, subject: Path) -> bool:
    """Lock the open file. Returns False if what has it is killed, and held by a call in the kernel.

    Raises: AnotherAgentError if a running process has it.
    """
    if _flock(opened, subject):
        return True
    holder = _holder(opened)
    if holder:
        _await_end_if_killed(holder)
    if _flock(opened, subject):
        return True
    if holder and _holder(opened) == holder:
        return False
    raise AnotherAgentError(_holder(opened))


def _flock(opened: int, subject: Path) -> bool:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise KernelError("lock", str(subject), error.errno or errno.EIO) from error
    return True


def _holder(opened: int) -> int:
    """Return the process with the lock; 0 if it is in another PID namespace, or has ended.

    Source: proc_locks(5).
    """
    status = os.fstat(opened)
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5] == where:
            return max(0, int(fields[4]))
    return 0


def _await_end_if_killed(holder: int) -> None:
    """Wait for the end of a killed process, for a while. Raises: AnotherAgentError if it runs."""
    try:
        process = os.pidfd_open(holder)
    except ProcessLookupError:
        return
    try:
        if not _is_killed(holder):
            raise AnotherAgentError(holder)
        select.select([process], [], [], _ENDS_WITHIN_S)
    finally:
        os.close(process)


def _is_killed(process: int) -> bool:
    """Return whether no code of the process runs any more, though a thread of it may be in a call.

    The first thread is a zombie then, or every thread has a SIGKILL before it (do_group_exit and
    complete_signal in kernel/signal.c; proc_pid_status(5)).
    """
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    return fields["State"][0] in "ZX" or bool(int(fields["SigPnd"], 16) & _SIGKILL)

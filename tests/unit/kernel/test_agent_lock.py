from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from caam_hotplug.errors import KernelError, UnsafePathError
from caam_hotplug.kernel import agent_lock
from caam_hotplug.kernel.agent_lock import AgentLock, AnotherAgentError


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory in which, and above which, only root can put anything."""
    made = Path(tempfile.mkdtemp(dir="/run"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def lock(folder: Path) -> Path:
    return folder / "agent" / "agent.lock"


@pytest.fixture
def control(folder: Path) -> Path:
    made = folder / "control"
    made.touch(0o600)
    return made


@contextmanager
def another_agent(lock: Path, control: Path) -> Iterator[int]:
    """Run a process that has the locks, and kill it afterwards."""
    ready, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = AgentLock(lock, control)
        os.write(say, b"r" if held else b"")
        signal.pause()
        os._exit(1)
    os.close(say)
    try:
        assert os.read(ready, 1) == b"r"
        yield pid
    finally:
        os.close(ready)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_agent_is_refused_by_the_number_of_the_first(lock: Path, control: Path) -> None:
    with another_agent(lock, control) as pid:
        with pytest.raises(AnotherAgentError, match=f"process {pid} is the agent already"):
            AgentLock(lock, control)
        kill(pid)
        AgentLock(lock, control).close()


def test_only_root_can_open_the_file_or_come_near_it(lock: Path, control: Path) -> None:
    with closing(AgentLock(lock, control)):
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        assert stat.S_IMODE(lock.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("shared", ["the file", "the device"])
def test_one_of_the_two_is_enough(lock: Path, control: Path, shared: str) -> None:
    own = control.with_name("own")
    own.touch(0o600)
    with another_agent(lock, control) as pid:
        at = (
            (lock, own)
            if shared == "the file"
            else (own.with_name("agent2") / "agent.lock", control)
        )
        with pytest.raises(AnotherAgentError, match=str(pid)):
            AgentLock(*at)


def test_a_lock_whose_file_was_removed_is_still_seen_at_the_device(
    lock: Path, control: Path
) -> None:
    with another_agent(lock, control):
        shutil.rmtree(lock.parent)
        with pytest.raises(AnotherAgentError):
            AgentLock(lock, control)


def test_without_device_mapper_the_file_alone_is_locked(lock: Path, control: Path) -> None:
    control.unlink()
    with another_agent(lock, control), pytest.raises(AnotherAgentError):
        AgentLock(lock, control)


def test_a_device_that_cannot_be_opened_is_no_missing_device(lock: Path, control: Path) -> None:
    control.unlink()
    control.symlink_to("elsewhere")
    with pytest.raises(KernelError, match="Too many levels"):
        AgentLock(lock, control)
    control.unlink()
    with another_agent(lock, control):  # nothing was left locked
        pass


def test_no_child_has_the_locks(lock: Path, control: Path) -> None:
    children = []
    held = AgentLock(lock, control)
    ready, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(say, b".")
        signal.pause()
        os._exit(1)
    with closing(os.fdopen(ready, "rb", buffering=0)) as reader:
        reader.read(
            1
        )  # it has closed what it has of the locks, as each fork of Python's does first
    os.close(say)
    children.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
    held.close()
    AgentLock(lock, control).close()
    kill(pid)
    for child in children:
        child.communicate(b"\n")


def test_a_directory_in_which_others_may_write_is_refused(lock: Path, control: Path) -> None:
    lock.parent.mkdir()
    lock.parent.chmod(0o777)
    with pytest.raises(UnsafePathError, match="can be written by others"):
        AgentLock(lock, control)


def test_a_run_of_its_own_that_everyone_may_write_hides_no_agent(lock: Path, control: Path) -> None:
    own = lock.parent.with_name("run")
    own.mkdir()
    own.chmod(0o1777)  # as mount(8) makes a tmpfs
    AgentLock(own / "agent" / "agent.lock", control).close()
    with another_agent(lock, control), pytest.raises(AnotherAgentError):
        AgentLock(own / "agent" / "agent.lock", control)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(errno.EROFS, "Read-only file system"), (errno.ENOSPC, "No space left on device")],
)
def test_a_run_without_room_for_the_file_is_named(
    lock: Path, control: Path, monkeypatch: pytest.MonkeyPatch, fault: int, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(KernelError, match=f"{lock.parent}: {words}"):
        AgentLock(lock, control)


def test_a_link_is_not_followed(lock: Path, control: Path, folder: Path) -> None:
    lock.parent.mkdir(0o700)
    lock.symlink_to(folder / "victim")
    with pytest.raises(KernelError, match="Too many levels of symbolic links"):
        AgentLock(lock, control)
    assert not (folder / "victim").exists()


def test_a_killed_process_that_the_kernel_holds_is_succeeded_by_one_agent(
    lock: Path, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_lock, "_ENDS_WITHIN_S", 0)
    with another_agent(lock, control) as pid:
        monkeypatch.setattr(agent_lock, "_is_killed", lambda process: process == pid)
        held = AgentLock(lock, control)
        with pytest.raises(AnotherAgentError, match=str(os.getpid())):
            AgentLock(lock, control)
        kill(pid)
        with pytest.raises(AnotherAgentError, match=str(os.getpid())):
            AgentLock(lock, control)
        held.close()
        AgentLock(lock, control).close()
        assert os.listdir(lock.parent) == [lock.name]


def test_a_killed_process_is_awaited(
    lock: Path, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with another_agent(lock, control) as pid:
        monkeypatch.setattr(agent_lock, "_is_killed", lambda _: os.kill(pid, 9) is None)
        inode = lock.stat().st_ino
        with closing(AgentLock(lock, control)):
            assert lock.stat().st_ino == inode


def test_a_zombie_is_killed_and_a_running_or_stopped_process_is_not() -> None:
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert not agent_lock._is_killed(pid)
    assert not agent_lock._is_killed(os.getpid())
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert agent_lock._is_killed(pid)
    os.waitpid(pid, 0)
    assert agent_lock._is_killed(pid)


def outcomes(lock: Path, control: Path, count: int) -> bytes:
    """Have processes take the locks at the same time; return a letter for each, `y` with locks."""
    begin, release = os.pipe()
    told, tell = os.pipe()
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(release)
            os.read(begin, 1)  # until the other end is closed
            try:
                held = AgentLock(lock, control)
                os.write(tell, b"y")
                signal.pause()
                held.close()
            except AnotherAgentError:
                os.write(tell, b"n")
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(release)
    said = b""
    while len(said) < count:
        said += os.read(told, count)
    for pid in pids:
        kill(pid)
    for end in (begin, told, tell):
        os.close(end)
    return said


@pytest.mark.parametrize("is_held_by_a_killed_process", [False, True])
def test_of_many_that_start_at_the_same_time_one_is_the_agent(
    lock: Path, control: Path, monkeypatch: pytest.MonkeyPatch, is_held_by_a_killed_process: bool
) -> None:
    if not is_held_by_a_killed_process:
        for _ in range(10):
            assert outcomes(lock, control, 8).count(b"y") == 1
        return
    monkeypatch.setattr(agent_lock, "_ENDS_WITHIN_S", 0)
    for _ in range(10):
        with another_agent(lock, control) as pid:
            monkeypatch.setattr(agent_lock, "_is_killed", lambda process, pid=pid: process == pid)
            assert outcomes(lock, control, 8).count(b"y") == 1

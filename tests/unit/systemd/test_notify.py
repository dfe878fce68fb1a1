from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.systemd.notify import Notifier


@pytest.fixture(autouse=True)
def unmanaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of a service manager that may have started the tests."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def service_manager() -> Iterator[socket.socket]:
    """A datagram socket, not yet bound, whose reads fail rather than wait."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.setblocking(False)
        yield receiver


def test_with_no_descriptor_left_the_watchdog_is_still_pinged(
    service_manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service_manager.bind(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    notifier = Notifier()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        notifier.send("WATCHDOG=1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert service_manager.recv(4096) == b"WATCHDOG=1"


def test_assignments_arrive_in_one_datagram(
    service_manager: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "notify")
    service_manager.bind(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notifier = Notifier()
    notifier.send("READY=1", "STATUS=2 mounted")
    notifier.send("WATCHDOG=1")
    assert service_manager.recv(4096) == b"READY=1\nSTATUS=2 mounted"
    assert service_manager.recv(4096) == b"WATCHDOG=1"


def test_an_abstract_address_is_written_with_an_at_sign(
    service_manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    service_manager.bind("")  # the kernel chooses a free abstract address
    chosen = service_manager.getsockname()
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + chosen[1:].decode())
    Notifier().send("READY=1")
    assert service_manager.recv(4096) == b"READY=1"


def test_without_a_service_manager_nothing_is_sent(service_manager: socket.socket) -> None:
    notifier = Notifier()
    notifier.send("READY=1")
    assert notifier.watchdog_s is None
    with pytest.raises(BlockingIOError):
        service_manager.recv(4096)


def test_a_service_manager_that_is_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(address))
    Notifier().send("READY=1")
    assert not address.exists()


def test_programs_that_the_agent_starts_get_neither_the_socket_nor_the_watchdog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    Notifier()
    assert {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}.isdisjoint(os.environ)


def test_the_watchdogs_time_is_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1500000")
    assert Notifier().watchdog_s == 1.5


def test_a_watchdog_of_this_process_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert Notifier().watchdog_s == 60


def test_a_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    assert Notifier().watchdog_s is None

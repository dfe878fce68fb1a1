"""Whatever interrupts the making of a medium, it is what it was or is completed. In the guest."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fakes.contract import until
from kernel.forked import Stop, kill_self
from kernel.provisioning import (
    CALLS,
    LABEL,
    RECOVERY_CALLS,
    RECOVERY_SETTLED,
    Bench,
    opened_on_a_pc,
    refused,
)
from kernel.witness import attempt, run


def numbered(calls: tuple[str, ...], every: int = 1) -> list[object]:
    """All calls by their numbers; those between, if not `every` call is tried, in the soak."""
    return [
        pytest.param(n, id=f"{n}-{call.replace(' ', '-')}", marks=sampled(n, every))
        for n, call in enumerate(calls, 1)
    ]


def sampled(number: int, every: int) -> list[pytest.MarkDecorator]:
    return [] if number % every == 0 else [pytest.mark.soak]


@pytest.mark.parametrize("call", numbered(CALLS, every=3))
def test_killed_after_any_call_the_medium_is_as_it_was_or_has_its_key_and_is_completed(
    bench: Bench, call: int
) -> None:
    before = bench.bytes()
    assert bench.provision(stop=Stop(call, kill_self)).status == -signal.SIGKILL
    changed = bench.bytes() != before
    blob = bench.blob.read_bytes() if bench.blob.exists() else b""
    assert blob or not changed
    done = bench.provision()
    assert (done.status, done.out.endswith(f"{bench.blob}\n")) == (0, True), done.err
    bench.is_made()
    if changed:
        assert bench.blob.read_bytes() == blob


KEYS = CALLS[:9] + RECOVERY_CALLS + CALLS[9:17] + RECOVERY_SETTLED
"""Until the medium relies on its keys."""


@pytest.mark.parametrize("call", numbered(KEYS, every=3))
def test_killed_after_any_call_that_makes_its_keys_the_recovery_key_stays_the_mediums(
    bench: Bench, call: int
) -> None:
    file = bench.folder / "recovery"
    first = bench.provision("--recovery-key", str(file), stop=Stop(call, kill_self))
    assert first.status == -signal.SIGKILL
    assert bench.provision("--recovery-key", str(file)).status == 0
    bench.is_made()
    assert opened_on_a_pc(bench, file) == "ext4"
    assert not list(bench.folder.glob(".*"))


@pytest.mark.parametrize(
    "write", [pytest.param(n, marks=sampled(n, every=5)) for n in range(1, 12)]
)
def test_killed_between_any_two_writes_to_the_table_an_erased_medium_is_completed(
    bench: Bench, write: int
) -> None:
    # Eleven: an old signature, and the five parts of a table twice.
    run("mkfs.ext4", "-q", "-F", bench.node)
    run("udevadm", "settle")
    erase = ("--erase", bench.medium.disk.name)
    command = ("caam-hotplug", "provision", bench.node, "--label", LABEL, *erase)
    killed = traced(bench, f"inject=write:signal=KILL:when={write}", command)
    assert killed.returncode in {-signal.SIGKILL, 137}, killed.stderr
    done = bench.provision(*erase)
    assert done.status == 0, done.err
    bench.is_made()


def traced(bench: Bench, inject: str, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The command under strace, which acts at its writes to the disk."""
    python = ("python3", "-m", "caam_hotplug.cli.main", *command[1:], "--config", str(bench.config))
    environment = ("env", "PYTHONPATH=/src/agent")
    strace = ("strace", "-f", "-qq", "-o", "/dev/null", "-P", bench.node, "-e", "trace=write")
    return attempt(*environment, *strace, "-e", inject, *python)


BEGUN = CALLS.index("unlink") + 1
"""The medium is marked, and its blob settled."""


def test_a_medium_that_was_begun_goes_on_only_with_the_same_options(bench: Bench) -> None:
    assert bench.provision(stop=Stop(BEGUN, kill_self)).status == -signal.SIGKILL
    other = refused(bench, bench.node, "--label", LABEL, "--key-bytes", "32")
    assert "it was begun with --backend tagged --key-bytes 16 --seal ecb" in other
    file = str(bench.folder / "recovery")
    late = refused(bench, bench.node, "--label", LABEL, "--recovery-key", file)
    assert f"it was begun without {file}" in late
    other = refused(bench, bench.node, "--label", "other")
    assert "a medium that is not finished, begun with another label, key or recovery file" in other
    assert bench.provision().status == 0
    bench.is_made()


def test_a_medium_that_was_begun_with_a_recovery_file_goes_on_only_with_that(
    bench: Bench, tmp_path: Path
) -> None:
    file, other = bench.folder / "recovery", tmp_path / "other"
    first = bench.provision("--recovery-key", str(other), stop=Stop(9 + 2, kill_self))
    assert (first.status, other.exists()) == (-signal.SIGKILL, True)
    stop = Stop(BEGUN + len(RECOVERY_CALLS), kill_self)
    assert bench.provision("--recovery-key", str(file), stop=stop).status == -signal.SIGKILL
    for options in ((), ("--recovery-key", str(other))):
        said = refused(bench, bench.node, "--label", LABEL, *options)
        assert "begun with another label, key or recovery file" in said
    assert bench.provision("--recovery-key", str(file)).status == 0
    assert opened_on_a_pc(bench, file) == "ext4"


def test_a_medium_that_was_begun_and_lost_its_blob_is_begun_anew_if_it_may_be_erased(
    bench: Bench,
) -> None:
    assert bench.provision(stop=Stop(BEGUN, kill_self)).status == -signal.SIGKILL
    bench.blob.unlink()
    said = refused(bench, bench.node, "--label", LABEL)
    assert "a medium that is not finished, begun with another label, key or recovery file" in said
    assert bench.provision("--erase", bench.medium.disk.name).status == 0
    bench.is_made()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_program_that_formats_ends_with_the_command(
    bench: Bench, tmp_path: Path, number: signal.Signals
) -> None:
    slow = tmp_path / "mkfs"
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 1000\n")
    slow.chmod(0o755)
    run("mount", "--bind", str(slow), "/usr/sbin/mkfs.ext4")
    try:
        with bench.started("provision", bench.node, "--label", LABEL) as process:
            until((tmp_path / "started").exists)
            os.kill(process.pid, number)
            done = process.ended()
    finally:
        run("umount", "/usr/sbin/mkfs.ext4")
    until(lambda: attempt("pgrep", "-x", "sleep").returncode != 0)
    if number == signal.SIGKILL:
        assert done.status == -number
    else:
        assert (done.status, bench.left()) == (1, [])
        assert f"interrupted by {number.name}; the same command goes on" in done.err
    assert bench.provision().status == 0
    bench.is_made()

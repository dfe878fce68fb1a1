"""Runs in the guest: executes the host's requests from a virtio-serial port.

There is one JSON object per line in each direction. Each request has a thread, so that a command
can wait while another one acts.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import select
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PORT = "/dev/virtio-ports/agent"
LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY = 1
INTERVAL_S = 0.2
"""Interval of checks for a condition that the kernel does not announce."""


def run(argv: list[str], stdin: str, timeout_s: float, env: dict[str, str]) -> dict[str, Any]:
    """Write output to files, so that a child left in the background cannot delay the answer."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(
                argv,
                input=base64.b64decode(stdin),
                stdout=out,
                stderr=err,
                timeout=timeout_s,
                env={**os.environ, **env},
                check=False,
            )
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        except FileNotFoundError as error:
            code = 127
            err.write(str(error).encode())
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": encoded(out.read()), "err": encoded(err.read())}


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def until(script: str, deadline_s: float) -> dict[str, Any]:
    """Check a condition again and again in one shell, since a spawn is slow here."""
    end = time.monotonic() + deadline_s
    with subprocess.Popen(
        ["/bin/bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as shell:
        assert shell.stdin is not None and shell.stdout is not None
        try:
            while True:
                shell.stdin.write(f"( {script}\n) >/dev/null </dev/null; echo $?\n".encode())
                shell.stdin.flush()
                if shell.stdout.readline().strip() == b"0":
                    return {"held": True}
                if time.monotonic() > end:
                    return {"held": False}
                time.sleep(INTERVAL_S)
        finally:
            shell.kill()


def until_mount(point: str, present: bool, deadline_s: float) -> dict[str, Any]:
    """Wait for the kernel's own announcement of changes to the mount table (proc(5))."""
    end = time.monotonic() + deadline_s
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        poller = select.poll()
        poller.register(mountinfo, select.POLLPRI | select.POLLERR)
        while True:
            mountinfo.seek(0)
            points = [line.split()[4] for line in mountinfo]
            if (point.encode() in points) is present:
                return {"held": True}
            left = end - time.monotonic()
            if left <= 0:
                return {"held": False}
            poller.poll(left * 1000)


def resume(now: float, source: str, target: str, options: str) -> None:
    """Set the host's time and mounts in a restored guest, by system calls: a spawn is slow here."""
    time.clock_settime(time.CLOCK_REALTIME, now)
    arguments = (source.encode(), target.encode(), b"9p", MS_RDONLY, options.encode())
    if LIBC.mount(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target}: {os.strerror(number)}")


def serve(request: dict[str, Any]) -> dict[str, Any]:
    match request.pop("do"):
        case "run":
            return run(**request)
        case "read":
            return {"data": encoded(Path(request["path"]).read_bytes())}
        case "write":
            path = Path(request["path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(request["data"]))
            path.chmod(request["mode"])
            return {}
        case "until":
            return until(**request)
        case "until_mount":
            return until_mount(**request)
        case "resume":
            resume(**request)
            return {}
        case unknown:
            raise ValueError(f"unknown request {unknown!r}")


def main() -> None:
    port = os.open(PORT, os.O_RDWR)
    turn = threading.Lock()

    def answer(line: bytes) -> None:
        request = json.loads(line)
        number = request.pop("id")
        try:
            reply = serve(request)
        except Exception as error:  # the host must see every fault
            reply = {"error": f"{type(error).__name__}: {error}"}
        data = json.dumps({"id": number, **reply}).encode() + b"\n"
        with turn:
            while data:
                data = data[os.write(port, data) :]

    pending: list[bytes] = []
    while True:
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(port, 65536)
            if not chunk:  # the host has closed the port, and poll(2) would return at once
                time.sleep(INTERVAL_S)
            first, *more = chunk.split(b"\n")
            pending.append(first)
            for rest in more:
                if line := b"".join(pending):
                    threading.Thread(target=answer, args=(line,), daemon=True).start()
                pending = [rest]


if __name__ == "__main__":
    main()

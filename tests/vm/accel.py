"""Which accelerator QEMU gets: KVM where a guest answers on it in time, else its own translation.

On some machines /dev/kvm is there and a guest on it never runs, or QEMU gives up.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from vm import cache

Accelerator = Literal["kvm", "tcg"]

DEVICE: Final = Path("/dev/kvm")
DEADLINE_S: Final = 20.0
"""How long the guest may take; with KVM it takes a second."""
ANSWER: Final = b"BusyBox v"
"""What the initrd's only program says when it is started as itself."""
OPTIONS: Final[dict[Accelerator, Sequence[str]]] = {
    "kvm": ("-accel", "kvm", "-cpu", "max"),
    # With AVX the C library and the kernel use what takes more to translate than it saves.
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-avx,-avx2,-f16c,-fma,-xsave"),
}
"""QEMU's arguments."""
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_LOOKED_AT_EVERY_S: Final = 0.05
_KILLED_WITHIN_S: Final = 2.0
_left_behind: Final[list[subprocess.Popen[bytes]]] = []


@lru_cache(maxsize=1)
def chosen(kernel: Path, initrd: Path) -> Accelerator:
    """The one to use: $ACCEL, or with `auto`, the default, whichever works on this machine.

    A probe's outcome is kept in the cache until the machine is booted anew.
    """
    wanted = os.environ.get("ACCEL") or "auto"
    match wanted:
        case "kvm" | "tcg":
            return wanted
        case "auto":
            works = os.access(DEVICE, os.R_OK | os.W_OK) and _works(kernel, initrd)
            return "kvm" if works else "tcg"
    raise ValueError(f"ACCEL is {wanted!r}, not kvm, tcg or auto")


def _works(kernel: Path, initrd: Path) -> bool:
    record = cache.root() / "kvm"
    boot = _BOOT.read_text().strip()
    with contextlib.suppress(FileNotFoundError, ValueError):
        tried_at, outcome = record.read_text().split()
        if tried_at == boot:
            return outcome == "answers"
    found = answers(
        ["qemu-system-x86_64", *OPTIONS["kvm"], "-m", "256", "-nodefaults", "-display", "none",
         "-no-reboot", "-kernel", str(kernel), "-initrd", str(initrd),
         "-append", "console=ttyS0 quiet panic=-1 rdinit=/bin/busybox"],
    )  # fmt: skip
    record.write_text(f"{boot} {'answers' if found else 'silent'}\n")
    return found


def answers(command: Sequence[str], deadline_s: float = DEADLINE_S) -> bool:
    """Whether the guest that QEMU runs by this command says something within the deadline.

    A QEMU that cannot be killed is left behind: a call of KVM may never return.
    """
    with tempfile.TemporaryDirectory(prefix="caam-bed-") as scratch:
        console = Path(scratch) / "console"
        console.touch()
        guest = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, "-serial", f"file:{console}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + deadline_s
        try:
            while time.monotonic() < end:
                has_ended = guest.poll() is not None
                if ANSWER in console.read_bytes():
                    return True
                if has_ended:
                    return False
                with contextlib.suppress(subprocess.TimeoutExpired):
                    guest.wait(_LOOKED_AT_EVERY_S)
            return False
        finally:
            guest.kill()
            try:
                guest.wait(_KILLED_WITHIN_S)
            except subprocess.TimeoutExpired:
                _left_behind.append(guest)

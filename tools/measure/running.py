"""How a measurement ends: its errors, its signals, its exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from caam_hotplug.errors import HotplugError


class MeasureError(HotplugError):
    """It cannot be measured; the message says why, and what to do."""


def exit_status(name: str, command: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run the command and report its failure in one line. Returns: the exit status.

    `name`: what the line begins with. `interrupted`: what to say after Control-C.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _end)
    try:
        command()
    except (HotplugError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def require_root(task: str) -> None:
    """Refuse to go on as anybody but root. Raises: MeasureError."""
    if os.geteuid() != 0:
        raise MeasureError(f"only root can {task}; run it with sudo")

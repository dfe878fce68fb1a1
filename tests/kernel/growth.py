"""A check that the agent does not grow: media plugged and pulled under the installed service.

    python3 -m kernel.growth CYCLES

The service runs as on a board, and shares no memory with the tests. Python takes memory from the
kernel a MiB at a time and keeps the most that it ever needed. So the size is compared with the size
after the first hundred cycles, or a tenth of them.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Final

from fakes.contract import until
from kernel.cartridges import Cartridge, cartridges
from kernel.witness import RESTING, run

LABELS: Final = ["cartridge-01", "cartridge-02", "cartridge-03", "cartridge-04"]
MOUNT_ROOT: Final = Path("/run/media")
WARM_UP: Final = 100
BOUND_KIB: Final = 1024
TOLD_EVERY: Final = 25


def memory_kib(pid: int) -> int:
    """Return the process's memory that belongs to no file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(value)


def cycle(media: list[Cartridge], source: random.Random) -> None:
    """Plug one medium or all and pull them: mounted, or in the middle of it."""
    some = source.choice([media, [source.choice(media)], [source.choice(media)]])
    for medium in some:
        medium.plug()
    in_the_middle = source.random() < 1 / 3
    for medium in some:
        until(lambda medium=medium: medium.is_plugged)
        if not in_the_middle:
            until((MOUNT_ROOT / medium.label).is_mount)
    for medium in some:
        medium.pull()
    until(lambda: not list(MOUNT_ROOT.glob("*")))


def main() -> int:
    """Print the service's memory from time to time. Returns: 1 if it has grown, else 0."""
    count = int(sys.argv[1])
    pid = int(run("systemctl", "show", "-p", "MainPID", "--value", "caam-hotplug"))
    warm = min(WARM_UP, max(1, count // 10))
    source = random.Random(count)
    with cartridges(LABELS) as media:
        first = 0
        for number in range(1, count + 1):
            cycle(media, source)
            if number % TOLD_EVERY == 0 or number in {1, warm, count}:
                until(lambda: len(list(Path(f"/proc/{pid}/task").iterdir())) == RESTING)
                now = memory_kib(pid)
                first = now if number == warm else first
                print(f"cycle {number} of {count}: {now} KiB", flush=True)
    print(f"grown from cycle {warm} on: {now - first} KiB of {BOUND_KIB}", flush=True)
    return int(now - first >= BOUND_KIB)


if __name__ == "__main__":
    sys.exit(main())

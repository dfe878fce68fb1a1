"""Print how long `status` takes to start and the cost of sdbus: python3 tests/bus/benchmark.py

The budget: `status` takes no more than 1.5 times as long as `python3 -c 'import asyncio'`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ASYNCIO = ["-c", "import asyncio"]
STATUS = ["-m", "caam_hotplug.cli.main", "status"]
MEMORY = """
import asyncio, resource
from pathlib import Path
def rss():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0])
before = rss()
import caam_hotplug.dbus.objects
print(rss() - before)
"""


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="how often each is started")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _agent(Path(folder)) as environment:
        base, status, sdbus = [], [], []
        for _ in range(parsed.times):  # in turn, so that a busy moment affects all
            base.append(_seconds(ASYNCIO, environment))
            status.append(_seconds(STATUS, environment))
            sdbus.append(_seconds(["-c", "import asyncio, sdbus"], environment))
        memory = [int(_output(["-c", MEMORY], environment)) for _ in range(min(parsed.times, 5))]
    figures = {
        "status_ratio": round(statistics.median(status) / statistics.median(base), 2),
        "sdbus_ms": round((statistics.median(sdbus) - statistics.median(base)) * 1000, 1),
        "sdbus_kib": statistics.median(memory),
    }
    if parsed.json:
        print(json.dumps(figures))
        return
    print(f"import asyncio: {statistics.median(base) * 1000:.0f} ms")
    print(f"status:         {statistics.median(status) * 1000:.0f} ms, {figures['status_ratio']} x")
    print(f"sdbus:          {figures['sdbus_ms']} ms and {figures['sdbus_kib']:.0f} KiB more")


class _agent:
    """A bus and an agent with one volume, for `status`. Returns their environment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> dict[str, str]:
        sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "agent")]
        from bus.private import PrivateBus

        self._bus = PrivateBus(self._folder)
        self._bus.start()
        environment = {
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}/agent:{REPOSITORY}/tests",
            "DBUS_SYSTEM_BUS_ADDRESS": self._bus.address,
        }
        self._agent = subprocess.Popen(
            [sys.executable, "-c", AGENT], env=environment, stdout=subprocess.PIPE
        )
        assert self._agent.stdout is not None
        with self._agent.stdout as said:
            said.readline()
        return environment

    def __exit__(self, *_error: object) -> None:
        self._agent.kill()
        self._agent.wait()
        self._bus.stop()


AGENT = """
import asyncio
from bus.agents import FakeRegistry, mounted
from caam_hotplug.dbus.service import Service
async def main():
    registry = FakeRegistry()
    mounted(registry)
    async with Service(registry) as service:
        await service.first_attempt(30)
        print("ready", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def _seconds(arguments: list[str], environment: dict[str, str]) -> float:
    """Return processor time, which depends less on the load of the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _output(arguments, environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _output(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()

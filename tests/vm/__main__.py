"""`python3 -m vm`: the test bed from the command line."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from vm import bench, demo, installed, machine, soak, swaps, terminal


def main() -> int:
    """Build the bed, or open a restored guest. Returns: the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m vm", description=__doc__)
    parser.add_argument("--usb", metavar="IMAGE", type=Path, action="append", default=[])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build what is not in the cache yet")
    commands.add_parser("demo", help="the main job, narrated")
    commands.add_parser("shell", help="a root shell in a guest, on this terminal")
    running = commands.add_parser("run", help="run a shell script in a guest")
    running.add_argument("script")
    soaking = commands.add_parser("soak", help="media plugged and pulled for hours, with faults")
    soaking.add_argument("options", nargs="*", help="those of kernel.soak, after --")
    sabotaging = commands.add_parser("saboteur", help="what users do by hand, at random")
    sabotaging.add_argument("options", nargs="*", help="those of kernel.saboteur, after --")
    growing = commands.add_parser("growth", help="whether the installed agent grows, by cycles")
    growing.add_argument("cycles", type=int)
    throughput = commands.add_parser("throughput", help="dm-crypt's, by both kinds of keys")
    throughput.add_argument("options", nargs="*", help="those of measure throughput, after --")
    swapping = commands.add_parser("swaps", help="cards changed quickly under a filesystem")
    swapping.add_argument("options", nargs="*", help="those of vm/swaps.py, after --")
    benching = commands.add_parser("bench", help="the agent beside other ways to serve a medium")
    benching.add_argument("options", nargs="*", help="those of bench/measure.py, after --")
    options = parser.parse_args()
    match options.command:
        case "build":
            print(machine.saved(installed.layer()).folder)
            return 0
        case "bench":
            return asyncio.run(bench.bench(*options.options))
        case "demo":
            return asyncio.run(demo.demo())
        case "shell":
            return asyncio.run(_shell(options.usb))
        case "growth":
            return asyncio.run(soak.growth(options.cycles))
        case "soak":
            return asyncio.run(soak.soak(*options.options))
        case "saboteur":
            return asyncio.run(soak.sabotage(*options.options))
        case "swaps":
            return asyncio.run(swaps.swaps(*options.options))
        case "throughput":
            return asyncio.run(soak.throughput(*options.options))
        case _:
            return asyncio.run(_run(options.script, options.usb))


async def _shell(media: list[Path]) -> int:
    if not sys.stdin.isatty():
        print("vm shell needs a terminal", file=sys.stderr)
        return 2
    async with machine.restored() as guest:
        for medium in media:
            await guest.plug_usb(medium.resolve())
        await terminal.bridged(guest.shell_socket)
    return 0


async def _run(script: str, media: list[Path]) -> int:
    async with machine.restored() as guest:
        for medium in media:
            await guest.plug_usb(medium.resolve())
        done = await guest.sh(script, check=False, timeout_s=600)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())

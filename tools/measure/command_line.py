"""The command line `measure`.

It needs only the standard library, so `--help` works on any machine. A command imports the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from measure import package

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAM: Final = "measure"

DESCRIPTION: Final = """\
Measure on this board what the times of a virtual machine cannot tell.

It needs root, and the caam_hotplug package of its own version: installed, or beside it in a
checkout.
"""
EXAMPLES: Final = """\
examples:
  sudo python3 measure replug /dev/sda1             how soon a medium is mounted and released
  sudo python3 measure throughput                   how fast dm-crypt is with sealed keys
  python3 measure replug --help                     the options of one command

exit status: 0 it was measured; 1 it could not be; 2 wrong usage; 130 interrupted
"""
REPLUG: Final = """\
Measure how soon the agent mounts a medium that is plugged, and releases one that is pulled.

A medium that the agent has mounted goes and comes back several times: by software, or by your
hand. Before each time, all writes are flushed. A medium that is in use is not pulled. Only the
mount writes to the medium. The medium is put back at the end, also after an interruption.
docs/performance-on-a-board.md explains the table, and what to send.

It needs root, and the running agent with D-Bus.
"""
REPLUG_EXAMPLES: Final = """\
examples:
  sudo python3 measure replug /dev/sda1                       some seconds; the table
  sudo python3 measure replug cartridge-01 --json board.json  the same, and a file to send
  sudo python3 measure replug /dev/sda1 --by-hand --cycles 5  you pull and plug when it says so

exit status: 0 it was measured; 1 it could not be; 2 wrong usage; 130 interrupted
"""
THROUGHPUT: Final = """\
Measure dm-crypt over memory with each kind of key that this board's kernel can seal.

A volume in memory is encrypted with test keys: a tagged one (sealed by the CAAM through
/dev/caam-keygen), a trusted one (sealed by the kernel's trust source), and one in software as
the reference. Each is measured with two sector sizes and with dm-crypt's flags. No medium and no
file is touched, and nothing is left. docs/throughput.md explains the figures, and which settings
follow from them.

It needs root. The agent may run meanwhile.
"""
THROUGHPUT_EXAMPLES: Final = """\
examples:
  sudo python3 measure throughput                       some minutes; the table
  sudo python3 measure throughput --json > board.json   the same for programs, and to send
  sudo python3 measure throughput --rounds 2 --size 16  quickly, with few figures

exit status: 0 it was measured; 1 it could not be; 2 wrong usage; 130 interrupted
"""


def main() -> int:
    """Run the command that the arguments name. Returns: the exit status."""
    given = parser().parse_args()
    package.make_importable()
    try:
        run = _runner(given.command)
    except ImportError as error:
        print(
            f"{PROGRAM} {given.command}: caam_hotplug cannot be imported: {error}; install "
            "caam-hotplug of this program's version (for `replug` with sdbus), or run it with "
            "PYTHONPATH=CHECKOUT/agent",
            file=sys.stderr,
        )
        return 1
    return run(given)


def _runner(command: str) -> Callable[[argparse.Namespace], int]:
    """Import the command. Raises: ImportError."""
    if command == "replug":
        from measure.replug.program import run  # noqa: PLC0415
    else:
        from measure.throughput.program import run  # noqa: PLC0415
    return run


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    program = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = program.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_replug(commands)
    _add_throughput(commands)
    return program


def _add_replug(commands: Commands) -> None:
    replug = _added(
        commands, "replug", "how soon a medium is mounted and released", REPLUG, REPLUG_EXAMPLES
    )
    replug.add_argument(
        "which", metavar="LABEL|DEVICE", help="a mounted medium, as `caam-hotplug status` shows it"
    )
    replug.add_argument(
        "--cycles", type=_count, default=12, metavar="N", help="how often it goes and comes (12)"
    )
    replug.add_argument("--by-hand", action="store_true", help="ask a person to pull and plug")
    replug.add_argument(
        "--json", type=lambda text: Path(text).absolute(), metavar="FILE",
        help="write all that was measured to this file, for programs and to send to others",
    )  # fmt: skip


def _add_throughput(commands: Commands) -> None:
    throughput = _added(
        commands, "throughput", "how fast dm-crypt is with sealed keys",
        THROUGHPUT, THROUGHPUT_EXAMPLES,
    )  # fmt: skip
    throughput.add_argument(
        "--rounds", type=_count, default=5, metavar="N",
        help="how often each is measured, after one round that does not count (5)",
    )  # fmt: skip
    throughput.add_argument(
        "--size", type=_count, default=32, metavar="MIB",
        help="the volume's size; it takes as much memory (32)",
    )  # fmt: skip
    throughput.add_argument(
        "--in-flight", type=_count, default=4, metavar="N",
        help="sequential requests at a time, as readahead and writeback have them (4)",
    )  # fmt: skip
    throughput.add_argument(
        "--reads", type=_count, default=500, metavar="N",
        help="reads of 4 KiB in a round, one at a time (500)",
    )  # fmt: skip
    throughput.add_argument("--json", action="store_true", help="one JSON object, for programs")


def _added(
    commands: Commands, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)

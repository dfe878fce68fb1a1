"""What the command line knows of the running agent: `status`, `watch`, `eject` and their like.

What asks it is imported by the commands themselves, so that `--help` is quick and needs no bus.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from caam_hotplug import names
from caam_hotplug.errors import HotplugError

if TYPE_CHECKING:
    from caam_hotplug.dbus.client import Remote

NOT_RUNNING: Final = 3
EXIT_STATUS: Final = """\
exit status: 0 done; 1 refused or failed, the reason is on standard error; 2 wrong usage;
             3 the agent does not run, or there is no bus to ask it over
"""
_WHICH: Final = """\
LABEL|DEVICE: a label as `status` shows it, a device (/dev/sdb1, /dev/disk/by-...), or a mount point
"""
_JSON: Final = """\
Keys of a volume with --json, which stay: label, part_uuid, device, diskseq, partition, rule, state,
reason, mount_point, mapping_device, filesystem, size_bytes, read_only, since_us (microseconds since
1970), steps_s (seconds by step). Absent texts are "". Keys may be added.
"""

_EVENTS: Final = """\
A line of --json has the keys event (present, added, changed, removed, agent-started or
agent-stopped), time_us, and volume, except for the agent's own events.

"""

_Work = Callable[["Remote", argparse.Namespace], Coroutine[Any, Any, None]]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The parser knows the commands that ask the running agent."""
    status = _add(
        commands,
        "status",
        _status,
        "show the media and their states",
        examples=[
            "status",
            "status --json | jq -r '.volumes[] | select(.state==\"mounted\").mount_point'",
        ],
        more=_JSON
        + 'Beside "volumes" there are "version" and "counters" (how often each state was '
        "reached).\n",
    )
    status.add_argument("--all", action="store_true", help="also those that no rule admits")
    status.add_argument("--json", action="store_true", help="all, for programs")

    watch = _add(
        commands,
        "watch",
        _watch,
        "say what changes, a line each, until interrupted",
        examples=["watch", "watch --json"],
        more=_EVENTS + _JSON,
    )
    watch.add_argument("--json", action="store_true", help="a JSON object on every line")

    eject = _add(
        commands,
        "eject",
        _eject,
        "let a medium go, so that it can be pulled",
        examples=["eject cartridge-01", "eject --no-power-off /dev/sdb1"],
        more=_WHICH,
    )
    eject.add_argument(
        "--no-power-off", action="store_true", help="leave the medium powered, and its light on"
    )
    _add_which(eject)
    for name, words in (
        ("lock", "unmount a medium and forget its key; it stays until it is unlocked"),
        ("unlock", "unlock and mount a medium that was locked or ejected"),
        ("retry", "try a medium again that is failed, waiting or in conflict"),
    ):
        examples = [f"{name} cartridge-01", f"{name} /dev/sdb1"]
        _add_which(_add(commands, name, _change, words, examples=examples, more=_WHICH))
    _add(
        commands,
        "reload",
        _reload,
        "have the agent read its configuration again",
        examples=["reload"],
        more="A configuration with a mistake is refused whole and leaves the old one in force.\n",
    )


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    work: _Work,
    words: str,
    *,
    examples: list[str],
    more: str,
) -> argparse.ArgumentParser:
    shown = "".join(f"  {names.PROGRAM} {example}\n" for example in examples)
    parser = commands.add_parser(
        name,
        help=words,
        description=f"{words[0].upper()}{words[1:]}.",
        epilog=f"{more}\nexamples:\n{shown}\n{EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=lambda parsed: _ask(name, work, parsed), name=name)
    return parser


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("which", metavar="LABEL|DEVICE")


def _ask(name: str, work: _Work, parsed: argparse.Namespace) -> int:
    """The command has been run against the agent; the return value is the exit status."""
    # asyncio does without it, and the bus is a socket of this machine. It would be an eighth of the
    # time that a command takes to start.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    try:
        from caam_hotplug.dbus import client  # noqa: PLC0415  sdbus is an extra
    except ImportError as error:
        _complain(
            f"{name}: {error}; the agent is asked over D-Bus: install python3-sdbus, "
            "or the extra `dbus`"
        )
        return NOT_RUNNING
    try:
        client.run(name, lambda asked: work(asked, parsed))
        sys.stdout.flush()
    except client.NotRunningError as error:
        _complain(str(error))
        return NOT_RUNNING
    except HotplugError as error:
        _complain(str(error))
        return 1
    except BrokenPipeError:
        # Whoever read has had enough. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 0 if name == "watch" else 1
    return 0


def _complain(text: str) -> None:
    first, *more = text.split("\n")
    print(f"{names.PROGRAM}: {first}", file=sys.stderr)
    for line in more:
        print(f"  {line}", file=sys.stderr)


def is_coloured() -> bool:
    """Whether standard output is a terminal whose reader has nothing against colours."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


async def _status(asked: Remote, parsed: argparse.Namespace) -> None:
    from caam_hotplug.cli import listing  # noqa: PLC0415

    volumes = await asked.volumes()
    if parsed.json:
        manager = await asked.manager()
        print(listing.to_json(volumes, manager["Version"], manager["Counters"]))
        return
    for line in listing.table(volumes, everything=parsed.all, coloured=is_coloured()):
        print(line)


async def _watch(asked: Remote, parsed: argparse.Namespace) -> None:
    from caam_hotplug.cli import watch  # noqa: PLC0415

    await watch.follow(asked, as_json=parsed.json, coloured=is_coloured())


async def _eject(asked: Remote, parsed: argparse.Namespace) -> None:
    volume = await asked.volume(parsed.which)
    options = {"power-off": ("b", not parsed.no_power_off)}
    print(await asked.change(volume, "Eject", "a{sv}", options))


async def _change(asked: Remote, parsed: argparse.Namespace) -> None:
    volume = await asked.volume(parsed.which)
    await asked.change(volume, parsed.name.title())
    now = await asked.again(volume)
    print(f"{volume.called}: {now.said}")


async def _reload(asked: Remote, _parsed: argparse.Namespace) -> None:
    for notice in await asked.reload():
        print(f"note: {notice}")
    print("the configuration is in force")

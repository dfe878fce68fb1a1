"""The commands that ask the running agent: `status`, `watch`, `eject` and the like.

The client is imported by the commands themselves, so that `--help` is fast and needs no bus.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from caam_hotplug import names
from caam_hotplug.cli import options
from caam_hotplug.errors import HotplugError

if TYPE_CHECKING:
    from caam_hotplug.dbus.client import Remote, RemoteVolume

    _Work = Callable[[Remote, argparse.Namespace], Coroutine[Any, Any, None]]

NOT_RUNNING: Final = 3
EXIT_STATUS: Final = """\
exit status: 0 done; 1 refused or failed, the reason is on standard error; 2 wrong usage;
             3 the agent does not run, or there is no bus
"""
_WHICH: Final = """\
LABEL|DEVICE: a label as `status` shows it, a device (/dev/sdb1, /dev/disk/by-...), or a mount point
"""
_JSON: Final = """\
Keys of a volume with --json: label, part_uuid, device, diskseq, partition, rule, state, reason,
mount_point, mapping_device, filesystem, size_bytes, read_only, since_us (microseconds since 1970),
observed_us (when the agent last looked at the kernel), steps_s (seconds by step). Absent texts are
"". Later versions keep these keys, and may add others.
"""

_EVENTS: Final = """\
A line of --json has the keys event (present, added, changed, removed, agent-started or
agent-stopped), time_us, and volume, except for the agent's own events.

"""


def add_commands(commands: options.Commands) -> None:
    """Add the commands that ask the running agent to the parser."""
    _add_status(commands)
    _add_watch(commands)
    _add_eject(commands)
    for name, summary in (
        ("lock", "unmount a medium and remove its key; it stays locked until unlock"),
        ("retry", "try a medium again that is failed, waiting or in conflict"),
    ):
        examples = [f"{name} cartridge-01", f"{name} /dev/sdb1"]
        _add_which(_add(commands, name, _change, summary, examples=examples, more=_WHICH))
    _add_unlock(commands)
    _add(
        commands,
        "reload",
        _reload,
        "make the agent read its configuration again",
        examples=["reload"],
        more="A configuration with a mistake is refused whole; the previous one stays in force.\n",
    )


def explained(device: str) -> str | None:
    """Return what the running agent says of the device; None without an answer of it."""
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # as below
    try:
        from caam_hotplug.dbus import client  # noqa: PLC0415  sdbus is an extra
    except ImportError:
        return None
    answers: list[str] = []
    path = str(Path(device).absolute())

    async def ask(agent: Remote) -> None:
        answers.append(await agent.explain(path))

    with suppress(HotplugError):  # what is wrong with the device, the caller finds as well
        client.run("explain", ask)
    return next(iter(answers), None)


def _add_status(commands: options.Commands) -> None:
    counters = 'Beside "volumes" there are "version" and "counters" (how often each state was '
    status = _add(
        commands,
        "status",
        _status,
        "show the media and their states",
        examples=[
            "status",
            "status --json | jq -r '.volumes[] | select(.state==\"mounted\").mount_point'",
        ],
        more=f"{_JSON}{counters}reached).\n",
    )
    status.add_argument("--all", action="store_true", help="also those that no rule matches")
    status.add_argument("--json", action="store_true", help="all, for programs")


def _add_watch(commands: options.Commands) -> None:
    watch = _add(
        commands,
        "watch",
        _watch,
        "print a line for each change, until interrupted",
        examples=["watch", "watch --json"],
        more=_EVENTS + _JSON,
    )
    watch.add_argument("--json", action="store_true", help="a JSON object on every line")


def _add_unlock(commands: options.Commands) -> None:
    unlock = _add(
        commands,
        "unlock",
        _unlock,
        "unlock and mount a medium that was locked or ejected",
        examples=["unlock cartridge-01", "unlock --no-mount cartridge-01"],
        more=_WHICH,
    )
    unlock.add_argument(
        "--no-mount",
        action="store_true",
        help="do not mount it, as for a check of its filesystem; lock ends that",
    )
    _add_which(unlock)


def _add_eject(commands: options.Commands) -> None:
    eject = _add(
        commands,
        "eject",
        _eject,
        "release a medium, so that it can be pulled",
        examples=["eject cartridge-01", "eject --no-power-off /dev/sdb1"],
        more=_WHICH,
    )
    eject.add_argument(
        "--no-power-off",
        action="store_true",
        help="leave the medium powered, and its disk to others",
    )
    _add_which(eject)


def _add(
    commands: options.Commands,
    name: str,
    work: _Work,
    summary: str,
    *,
    examples: list[str],
    more: str,
) -> argparse.ArgumentParser:
    lines = "".join(f"  {names.PROGRAM} {example}\n" for example in examples)
    parser = options.add_command(
        commands,
        name,
        summary,
        epilog=f"{more}\nexamples:\n{lines}\n{EXIT_STATUS}",
        description=f"{summary[0].upper()}{summary[1:]}.",
    )
    parser.set_defaults(command=lambda parsed: _ask(name, work, parsed), name=name)
    return parser


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("which", metavar="LABEL|DEVICE")


def _ask(name: str, work: _Work, parsed: argparse.Namespace) -> int:
    """Run the command with the running agent, and return the exit status."""
    # asyncio works without ssl, and a local socket needs no TLS. The import would take an eighth of
    # the time in which a command starts.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    try:
        from caam_hotplug.dbus import client  # noqa: PLC0415  sdbus is an extra
    except ImportError as error:
        _print_error(
            f"{name}: {error}; the command needs D-Bus: install python3-sdbus, or the extra `dbus`"
        )
        return NOT_RUNNING
    try:
        client.run(name, lambda agent: work(agent, parsed))
        sys.stdout.flush()
    except client.NotRunningError as error:
        _print_error(str(error))
        return NOT_RUNNING
    except HotplugError as error:
        _print_error(str(error))
        return 1
    except BrokenPipeError:
        # The reader has closed the pipe. Python's flush at the end would fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 0 if name == "watch" else 1
    return 0


def _print_error(text: str) -> None:
    first, *more = text.split("\n")
    print(f"{names.PROGRAM}: {first}", file=sys.stderr)
    for line in more:
        print(f"  {line}", file=sys.stderr)


def is_coloured() -> bool:
    """Return whether standard output is a terminal and no variable turns colours off."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


async def _status(agent: Remote, parsed: argparse.Namespace) -> None:
    from caam_hotplug.cli import listing  # noqa: PLC0415

    volumes = await agent.looked_at_volumes()
    if parsed.json:
        manager = await agent.manager()
        print(listing.to_json(volumes, manager["Version"], manager["Counters"]))
        return
    for line in listing.table(volumes, include_ignored=parsed.all, coloured=is_coloured()):
        print(line)


async def _watch(agent: Remote, parsed: argparse.Namespace) -> None:
    from caam_hotplug.cli import watch  # noqa: PLC0415

    await watch.follow(agent, as_json=parsed.json, coloured=is_coloured())


async def _eject(agent: Remote, parsed: argparse.Namespace) -> None:
    volume = await agent.volume(parsed.which)
    options = {"power-off": ("b", not parsed.no_power_off)}
    print(await agent.change(volume, "Eject", "a{sv}", options))


async def _change(agent: Remote, parsed: argparse.Namespace) -> None:
    volume = await agent.volume(parsed.which)
    await _change_to(agent, volume, parsed.name.title())


async def _unlock(agent: Remote, parsed: argparse.Namespace) -> None:
    volume = await agent.volume(parsed.which)
    await _change_to(agent, volume, "UnlockWithoutMount" if parsed.no_mount else "Unlock")


async def _change_to(agent: Remote, volume: RemoteVolume, method: str) -> None:
    await agent.change(volume, method)
    now = await agent.read(volume)
    mapping = f" ({now.mapping_device})" if now.state == "unlocked" else ""
    print(f"{volume.display_name}: {now.status_text}{mapping}")


async def _reload(agent: Remote, _parsed: argparse.Namespace) -> None:
    for notice in await agent.reload():
        print(f"note: {notice}")
    print("the configuration is in force")

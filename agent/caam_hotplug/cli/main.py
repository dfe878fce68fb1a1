"""The command line `caam-hotplug`.

What only one command uses is imported by that command: on a board's processor a module that nobody
needs is felt.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, TextIO

from caam_hotplug import __version__, names, trace
from caam_hotplug.cli import lean_imports
from caam_hotplug.errors import ConfigError, HotplugError, shown

if TYPE_CHECKING:
    import argparse

    from caam_hotplug.config import loader

    Parsed = argparse.Namespace | SimpleNamespace

_EXAMPLES = """\
examples:
  caam-hotplug run                            with the installed configuration
  caam-hotplug run --config /root/my.toml     in the foreground, for a try
  caam-hotplug check /etc/caam-hotplug/agent.toml
  caam-hotplug explain /dev/sdb1              which rule, or why none
  caam-hotplug provision /dev/sdb --label cartridge-01    make a medium; erases nothing by itself
  caam-hotplug key list                       the keys of this board
  caam-hotplug migrate cartridge-01 --to trusted    to a key of another kind, where it is
  caam-hotplug doctor                         why it does not work on this board
  caam-hotplug status                         the media and their states
  caam-hotplug eject cartridge-01             let a medium go, so that it can be pulled

"""

_ENDED_BY_SIGINT: Final = 128 + 2
_ENDED_BY_SIGPIPE: Final = 128 + 13
"""As a shell has it of a program that the signal has ended."""

_DOCTOR: Final = """\
Looks at everything the agent needs, one line each, with the remedy where something is amiss.
It needs root, but not the agent, which may run meanwhile. It changes nothing on any medium:
its trial of the CAAM is a throwaway key over a volume in memory. docs/doctor.md explains every
line. Colours are for a terminal only, and NO_COLOR takes them away.
"""
_DOCTOR_EPILOG: Final = """\
examples:
  sudo caam-hotplug doctor
  sudo caam-hotplug doctor --json             for programs, or for a report to the maintainers

exit status: 0 all is well as far as it can be told; 1 failures, or it could not look;
2 wrong usage; 3 warnings
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; the return value is the exit status."""
    lean_imports.leave_out()
    words = sys.argv[1:] if arguments is None else arguments
    parsed = _as_the_service() if words == ["run"] else _parser().parse_args(words)
    try:
        with redirect_stdout(_Answer(sys.stdout)) as answer:
            status = int(parsed.command(parsed))
            answer.flush()
    except BrokenPipeError:  # whoever read has had enough
        _write_no_more()
        return _ENDED_BY_SIGPIPE
    except _UnwrittenError as error:
        _write_no_more()
        print(f"{names.PROGRAM}: {error}", file=sys.stderr)
    except ConfigError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr)
    except (HotplugError, OSError) as error:
        print(f"{names.PROGRAM}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{names.PROGRAM}: interrupted", file=sys.stderr)
        return _ENDED_BY_SIGINT
    else:
        return status
    return 1


class _UnwrittenError(Exception):
    """The answer could not be written, as on a disk that is full. No error of what was asked."""


class _Answer(io.TextIOBase):
    """Standard output, whose errors say what they are about."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    def close(self) -> None:
        """It stays open for Python's end."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _UnwrittenError(f"write the answer: {error.strerror}") from error


def _write_no_more() -> None:
    """Python does not complain again when it flushes standard output at its end."""
    with suppress(OSError, ValueError):  # what stands for it in a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_the_service() -> SimpleNamespace:
    """`run` alone, as the parser has it. The parser would stay in the agent's memory: 1 MB."""
    return SimpleNamespace(command=_run, config=None, trace=None)


def _parser() -> argparse.ArgumentParser:
    import argparse  # noqa: PLC0415

    from caam_hotplug.cli import agent_commands, keys, migrate, provision  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog=names.PROGRAM,
        description="Unlocks and mounts encrypted removable media with keys of the CAAM.",
        epilog=_EXAMPLES + agent_commands.EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{names.PROGRAM} {__version__}")
    # With `prog` given, argparse need not format a usage to find it out.
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, prog=names.PROGRAM
    )

    run = commands.add_parser("run", help="run the agent in the foreground, as the service does")
    _add_config(run)
    run.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write there what takes how long, for Perfetto or chrome://tracing",
    )
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="say what is wrong in a configuration file")
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(command=_check)

    explain = commands.add_parser("explain", help="say which rule admits a device, or why none")
    explain.add_argument("device", metavar="DEVICE", help="a device node such as /dev/sdb1")
    _add_config(explain)
    explain.set_defaults(command=_explain)
    provision.add_to(commands, _add_config, _load_to_act)
    keys.add_to(commands, _add_config, _load_to_act)
    migrate.add_to(commands, _add_config, _load_to_act)
    _add_doctor(commands, argparse.RawDescriptionHelpFormatter)
    # For the service that the agent asks; people ask `status`.
    holders = commands.add_parser("holders")
    holders.set_defaults(command=_holders)
    agent_commands.add_commands(commands)
    return parser


def _add_doctor(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    formatter: type[argparse.HelpFormatter],
) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what keeps the agent from working on this board, and what to do",
        description=_DOCTOR,
        epilog=_DOCTOR_EPILOG,
        formatter_class=formatter,
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object, for programs")
    _add_config(doctor)
    doctor.set_defaults(command=_doctor)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"instead of {names.CONFIG_FILE}; drop-ins are in {names.RULES_DIRECTORY}/ beside it",
    )


def _load(parsed: Parsed, reader: loader.Files) -> loader.Config:
    """The configuration that was named, or else the installed one, which need not be there."""
    from caam_hotplug.config import loader  # noqa: PLC0415

    file = names.CONFIG_FILE if parsed.config is None else parsed.config
    return loader.load(file, reader, required=parsed.config is not None)


def _load_to_act(parsed: argparse.Namespace) -> loader.Config:
    from caam_hotplug.kernel import config_files  # noqa: PLC0415

    return _load(parsed, config_files.RootsFiles())


def _warn_of_strangers(load: Callable[[loader.Files], loader.Config]) -> None:
    """What looks at a configuration that `run` would refuse for its owner or mode says so."""
    from caam_hotplug.kernel import config_files  # noqa: PLC0415

    try:
        load(config_files.RootsFiles())
    except ConfigError as error:
        for fault in error.faults:
            print(f"warning: `run` will refuse this: {fault}", file=sys.stderr)


def _run(parsed: Parsed) -> int:
    with nullcontext() if parsed.trace is None else trace.written_to(parsed.trace):
        from caam_hotplug.daemon import main as daemon  # noqa: PLC0415
        from caam_hotplug.kernel import config_files  # noqa: PLC0415

        daemon.run(lambda: _load(parsed, config_files.RootsFiles()))
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from caam_hotplug.config import loader  # noqa: PLC0415
    from caam_hotplug.kernel import config_files  # noqa: PLC0415

    loaded = loader.load(parsed.file, config_files.AnyonesFiles())
    _warn_of_strangers(lambda reader: loader.load(parsed.file, reader))
    rules = ", ".join(rule.name for rule in loaded.rule) or "none"
    print(f"{shown(parsed.file)}: valid; rules in the order they are asked: {rules}")
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    from caam_hotplug.daemon import explain  # noqa: PLC0415
    from caam_hotplug.kernel import config_files  # noqa: PLC0415

    loaded = _load(parsed, config_files.AnyonesFiles())
    _warn_of_strangers(lambda reader: _load(parsed, reader))
    for line in explain.explain(parsed.device, loaded):
        print(line)
    return 0


def _holders(_parsed: argparse.Namespace) -> int:
    from caam_hotplug.kernel import open_files  # noqa: PLC0415  only this command looks at processes

    open_files.answer(sys.stdin, sys.stdout)
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from caam_hotplug.doctor import runner  # noqa: PLC0415  only `doctor` needs its looks

    return runner.examine(parsed.config, sys.stdout, as_json=parsed.json)


if __name__ == "__main__":
    sys.exit(main())

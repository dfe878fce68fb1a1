"""The command line `caam-hotplug`.

A module that only one command needs is imported by that command: imports are slow on a board.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

from caam_hotplug import __version__, names
from caam_hotplug.cli import lean_imports, output
from caam_hotplug.errors import ConfigError, HotplugError, shown

if TYPE_CHECKING:
    import argparse

    from caam_hotplug.cli.options import Commands
    from caam_hotplug.config import loader

    Parsed = argparse.Namespace | SimpleNamespace

_EXAMPLES = """\
examples:
  caam-hotplug run                            with the installed configuration
  caam-hotplug run --config /root/my.toml     in the foreground, with another file
  caam-hotplug check /etc/caam-hotplug/agent.toml
  caam-hotplug explain /dev/sdb1              which rule, or why none
  caam-hotplug provision /dev/sdb --label cartridge-01    make a medium; erases only with --erase
  caam-hotplug key list                       the keys of this board
  caam-hotplug migrate cartridge-01 --to trusted    to a key of another kind, where it is
  caam-hotplug doctor                         why it does not work on this board
  caam-hotplug status                         the media and their states
  caam-hotplug eject cartridge-01             release a medium, so that it can be pulled

"""

_ENDED_BY_SIGINT: Final = 128 + 2
_ENDED_BY_SIGPIPE: Final = 128 + 13
"""The exit statuses that a shell reports for a program ended by these signals."""

_RUN_EPILOG: Final = """\
exit status: 0 stopped; 1 it did not start, or left a volume in use; 2 wrong usage; 75 another agent
runs, which goes on
"""
_DOCTOR: Final = """\
Checks everything that the agent needs. Each result is a line, with the remedy if a check fails.
It needs root. The agent may run meanwhile, but need not. It changes nothing on any medium: it tests
the CAAM with a test key over a volume in memory. docs/doctor.md explains every line. Colours are
for a terminal only; NO_COLOR turns them off.
"""
_DOCTOR_EPILOG: Final = """\
examples:
  sudo caam-hotplug doctor
  sudo caam-hotplug doctor --json             for programs, or for a report to the maintainers

exit status: 0 no check failed; 1 failures, or the checks could not run; 2 wrong usage;
3 warnings
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; the return value is the exit status."""
    lean_imports.leave_out()
    words = sys.argv[1:] if arguments is None else arguments
    parsed = _run_without_options() if words == ["run"] else _parser().parse_args(words)
    try:
        with redirect_stdout(output.Output(sys.stdout)) as standard:
            status = int(parsed.command(parsed))
            standard.flush()
    except BrokenPipeError:  # the reader has closed the pipe
        output.discard()
        return _ENDED_BY_SIGPIPE
    except output.UnwrittenError as error:
        output.discard()
        print(f"{names.PROGRAM}: {error}", file=sys.stderr)
    except ConfigError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr)
    except (HotplugError, OSError) as error:
        print(f"{names.PROGRAM}: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except KeyboardInterrupt:
        print(f"{names.PROGRAM}: interrupted", file=sys.stderr)
        return _ENDED_BY_SIGINT
    else:
        return status
    return 1


def _run_without_options() -> SimpleNamespace:
    """Return what the parser makes of `run` alone. The parser would take 1 MB of memory."""
    return SimpleNamespace(command=_run, config=None, trace=None)


def _parser() -> argparse.ArgumentParser:
    import argparse  # noqa: PLC0415

    from caam_hotplug.cli import agent_commands, keys, migrate, provision, sleep  # noqa: PLC0415

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
    _add_run(commands)
    _add_check_and_explain(commands)
    provision.add_to(commands, _add_config, _load_to_act)
    keys.add_to(commands, _add_config, _load_to_act)
    migrate.add_to(commands, _add_config, _load_to_act)
    _add_doctor(commands)
    # Without help: only the agent asks it, through its socket. Users have `status`.
    holders = commands.add_parser("holders")
    holders.set_defaults(command=_holders)
    sleep.add_to(commands)
    agent_commands.add_commands(commands)
    return parser


def _add_run(commands: Commands) -> None:
    from caam_hotplug.cli import options  # noqa: PLC0415

    summary = "run the agent in the foreground, as the service does"
    run = options.add_command(commands, "run", summary, epilog=_RUN_EPILOG)
    _add_config(run)
    run.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a timeline there, for Perfetto or chrome://tracing",
    )
    run.set_defaults(command=_run)


def _add_check_and_explain(commands: Commands) -> None:
    check = commands.add_parser("check", help="report the mistakes in a configuration file")
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(command=_check)

    explain = commands.add_parser("explain", help="show which rule matches a device, or why none")
    explain.add_argument("device", metavar="DEVICE", help="a device node such as /dev/sdb1")
    _add_config(explain)
    explain.set_defaults(command=_explain)


def _add_doctor(commands: Commands) -> None:
    from caam_hotplug.cli import options  # noqa: PLC0415

    summary = "check what the agent needs on this board, and say what to do"
    doctor = options.add_command(
        commands, "doctor", summary, epilog=_DOCTOR_EPILOG, description=_DOCTOR
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
    """Load the named configuration, or else the installed one, which need not exist."""
    from caam_hotplug.config import loader  # noqa: PLC0415

    file = names.CONFIG_FILE if parsed.config is None else parsed.config
    return loader.load(file, reader, required=parsed.config is not None)


def _load_to_act(parsed: argparse.Namespace) -> loader.Config:
    from caam_hotplug.kernel import config_files  # noqa: PLC0415

    return _load(parsed, config_files.RootsFiles())


def _warn_if_run_would_refuse(load: Callable[[loader.Files], loader.Config]) -> None:
    """Print a warning if `run` would refuse the configuration for its owner or mode."""
    from caam_hotplug.kernel import config_files  # noqa: PLC0415

    try:
        load(config_files.RootsFiles())
    except ConfigError as error:
        for fault in error.faults:
            print(f"warning: `run` will refuse this: {fault}", file=sys.stderr)


def _run(parsed: Parsed) -> int:
    with ExitStack() as held:
        observe = {}
        if parsed.trace is not None:  # before the imports, which are part of it
            from caam_hotplug.daemon import timeline  # noqa: PLC0415

            observe["observe"] = held.enter_context(timeline.written_to(parsed.trace)).observe
        from caam_hotplug.daemon import main as daemon  # noqa: PLC0415
        from caam_hotplug.kernel import config_files  # noqa: PLC0415

        daemon.run(lambda: _load(parsed, config_files.RootsFiles()), **observe)
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from caam_hotplug.config import loader, mount_checks  # noqa: PLC0415
    from caam_hotplug.kernel import config_files  # noqa: PLC0415

    loaded = loader.load(parsed.file, config_files.AnyonesFiles())
    _warn_if_run_would_refuse(lambda reader: loader.load(parsed.file, reader))
    rules = ", ".join(rule.name for rule in loaded.rule) or "none"
    print(f"{shown(parsed.file)}: valid; rules in the order they are asked: {rules}")
    for meaning in mount_checks.meanings(loaded.rule):
        print(f"note: {meaning}")
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    from caam_hotplug.cli import agent_commands  # noqa: PLC0415

    if parsed.config is None and (text := agent_commands.explained(parsed.device)) is not None:
        print(text)
        return 0
    from caam_hotplug.daemon import explain  # noqa: PLC0415
    from caam_hotplug.kernel import config_files  # noqa: PLC0415

    loaded = _load(parsed, config_files.AnyonesFiles())
    _warn_if_run_would_refuse(lambda reader: _load(parsed, reader))
    for line in explain.explain(parsed.device, loaded):
        print(line)
    return 0


def _holders(_parsed: argparse.Namespace) -> int:
    from caam_hotplug.kernel import open_files  # noqa: PLC0415  only this command reads processes

    open_files.answer(sys.stdin, sys.stdout)
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from caam_hotplug.doctor import runner  # noqa: PLC0415  only `doctor` needs its checks

    return runner.examine(parsed.config, sys.stdout, as_json=parsed.json)


if __name__ == "__main__":
    sys.exit(main())

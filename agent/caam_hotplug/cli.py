"""The command line `caam-hotplug`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from caam_hotplug import __version__, config, names
from caam_hotplug.errors import ConfigError, HotplugError

_EXAMPLES = """\
examples:
  caam-hotplug run                            with the installed configuration
  caam-hotplug run --config my.toml           in the foreground, for a try
  caam-hotplug check /etc/caam-hotplug/agent.toml
  caam-hotplug explain /dev/sdb1              which rule, or why none

exit status: 0 done; 1 refused or failed, the reason is on standard error; 2 wrong usage
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; the return value is the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except ConfigError as error:
        for fault in error.faults:
            print(fault, file=sys.stderr)
    except (HotplugError, OSError) as error:
        print(f"{names.PROGRAM}: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=names.PROGRAM,
        description="Unlocks and mounts encrypted removable media with keys of the CAAM.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{names.PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run the agent in the foreground, as the service does")
    _add_config(run)
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="say what is wrong in a configuration file")
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(command=_check)

    explain = commands.add_parser("explain", help="say which rule admits a device, or why none")
    explain.add_argument("device", metavar="DEVICE", help="a device node such as /dev/sdb1")
    _add_config(explain)
    explain.set_defaults(command=_explain)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"instead of {names.CONFIG_FILE}; drop-ins are in {names.RULES_DIRECTORY}/ beside it",
    )


def _config(parsed: argparse.Namespace) -> config.Config:
    return config.load_installed() if parsed.config is None else config.load(parsed.config)


def _run(parsed: argparse.Namespace) -> int:
    from caam_hotplug import daemon  # noqa: PLC0415  asyncio is slow to import and only `run` uses it

    daemon.run(_config(parsed))
    return 0


def _check(parsed: argparse.Namespace) -> int:
    loaded = config.load(parsed.file)
    rules = ", ".join(rule.name for rule in loaded.rule) or "none"
    print(f"{parsed.file}: valid; rules in the order they are asked: {rules}")
    return 0


def _explain(parsed: argparse.Namespace) -> int:
    from caam_hotplug import explain  # noqa: PLC0415  libudev is opened only to look at a device

    loaded = _config(parsed)
    for line in explain.explain(parsed.device, loaded):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

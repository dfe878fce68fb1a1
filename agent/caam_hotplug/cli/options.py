"""What several commands have in common: how they are added, seal options, --dry-run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from caam_hotplug import names
from caam_hotplug.errors import HotplugError

if TYPE_CHECKING:
    from caam_hotplug.config import loader
    from caam_hotplug.keys import backends

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    AddConfig = Callable[[argparse.ArgumentParser], None]
    Load = Callable[[argparse.Namespace], loader.Config]


def add_command(
    commands: Commands, name: str, summary: str, *, epilog: str, description: str | None = None
) -> argparse.ArgumentParser:
    """Add a command whose description and epilog are printed line by line as they are."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_seal_options(parser: argparse.ArgumentParser, *, makes_key: bool = True) -> None:
    """Add the options that say how a key is sealed. `makes_key`: also how long a new key is."""
    parser.add_argument(
        "--backend",
        choices=("auto", "tagged", "trusted", "encrypted"),
        default="auto",
        help="who seals the key: NXP's caam-keygen (tagged), the kernel's trusted keys, or a "
        "trusted key of the board's (encrypted); default: tagged where NXP's driver is, else "
        "trusted",
    )
    add_key_choices(parser, makes_key=makes_key)
    parser.add_argument(
        "--key-options",
        metavar="TEXT",
        default="",
        help="what the trust source needs, as key.options of a rule says it, such as "
        "keyhandle=0x81000001 of a TPM; the CAAM needs nothing",
    )


def add_key_choices(parser: argparse.ArgumentParser, *, makes_key: bool = True) -> None:
    """Add the options for facts about a key that its rule does not have."""
    if makes_key:
        parser.add_argument(
            "--key-bytes",
            type=int,
            choices=(16, 32, 64),
            help="the key's length; default: 16 of a tagged key, 64 of any other",
        )
    parser.add_argument(
        "--seal",
        choices=("ecb", "ccm"),
        default="ecb",
        help="how the CAAM covers a tagged key in memory; default: ecb",
    )
    parser.add_argument(
        "--master",
        metavar="NAME",
        default="master",
        help="the trusted key that an encrypted one is under; default: master",
    )


def seal_method(parsed: argparse.Namespace) -> tuple[backends.SealMethod, int]:
    """Return the seal method and the key's length that were asked for. Raises: HotplugError."""
    from caam_hotplug.config import checks  # noqa: PLC0415  only some commands need it
    from caam_hotplug.keys import backends  # noqa: PLC0415  only some commands need it

    options = getattr(parsed, "key_options", "")
    try:
        checks.KEY_OPTIONS.require(options)
    except ValueError as error:
        raise HotplugError(f"use --key-options: {error}") from error
    backend = backends.backend_here(parsed.backend)
    reason = names.why_unsafe(parsed.master)
    if reason is not None:
        raise HotplugError(f"use master {parsed.master!a}: {reason}")
    if backend != "tagged" and parsed.seal != "ecb":
        raise HotplugError(f"use --seal {parsed.seal}: only tagged keys are covered in memory")
    if backend == "tagged" and options:
        raise HotplugError("use --key-options: the CAAM needs none for a tagged key")
    key_bytes = getattr(parsed, "key_bytes", None) or backends.BACKENDS[backend].key_bytes
    if backend == "tagged" and key_bytes not in {16, 32}:
        raise HotplugError(f"use --key-bytes {key_bytes}: a tagged key for AES has 16 or 32")
    method = backends.SealMethod(
        backend=backend, seal=parsed.seal, master=parsed.master, options=options
    )
    return method, key_bytes


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the steps, and change nothing",
    )


def require_root(operation: str) -> None:
    """Check that the command runs as root. Raises: HotplugError."""
    if os.geteuid() != 0:
        raise HotplugError(f"{operation}: it needs to be root; use sudo")

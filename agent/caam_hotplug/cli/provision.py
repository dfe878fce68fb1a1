"""The command `provision`: its options and its output. The work is in `provisioning`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from caam_hotplug import names
from caam_hotplug.cli import options, terminal
from caam_hotplug.errors import HotplugError, shown

if TYPE_CHECKING:
    from caam_hotplug.config import loader
    from caam_hotplug.provisioning.options import ProvisionOptions
    from caam_hotplug.provisioning.provision_steps import ProvisionResult

_RELOAD_WITHIN_S: Final = 60.0
"""More than a sound agent needs. The medium is locked meanwhile."""
_PARTUUID: Final = re.compile(
    r"[0-9a-fA-F]{8}-([0-9a-fA-F]{2}|([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12})"
)
"""Of a partition in an MBR, or in a GPT."""
FILESYSTEMS: Final = ("ext4", "xfs", "btrfs", "f2fs", "vfat", "exfat")

_DESCRIPTION: Final = """\
Makes an encrypted medium of a whole disk: a new key sealed by the CAAM, a partition of the label, a
filesystem. Or of one partition, whose disk may be in use: of that disk only the partition's own
sectors and its entry in the table are written. Content that is found is erased only if --erase
names the disk or the partition. Noise and raw data count as content. They are looked for at both
ends and in samples between.
"""
_EXAMPLES: Final = """\
examples:
  caam-hotplug provision /dev/sdb --label cartridge-01
        a blank stick; the built-in rule opens it
  caam-hotplug provision /dev/sdb --label cartridge-01 --erase sdb
        whatever the stick held before is lost
  caam-hotplug provision /dev/sdb --label cartridge-01 --erase sdb --dry-run
        only says what that would erase, make and write
  caam-hotplug provision /dev/sdb --label cartridge-01 --recovery-key /root/cartridge-01.recovery
        a PC without CAAM opens it too, with that file
  caam-hotplug provision /dev/sdb --label cartridge-01 --backend encrypted --master board
        a mainline kernel: the key is encrypted under the board's trusted key `board`
  caam-hotplug provision /dev/sdb --label cartridge-01 --key-options keyhandle=0x81000001 --rule
        a TPM seals the key, under its storage key of that handle
  caam-hotplug provision /dev/sdb --label archive --cipher 'capi:tk(cbc(aes))-plain64' \\
        --sector-size 4096 --rule
        more than 2 TiB, in sectors of 4096 bytes, and the rule that says so
  caam-hotplug provision recorder --rule
        the partition of that label, while others of its disk are mounted
  caam-hotplug provision /dev/mmcblk0p3 --label recorder --erase mmcblk0p3 --dry-run
        only says what it would do with that partition, whatever it holds

Interrupted anywhere, the medium is what it was, or the same command completes it.

exit status: 0 done; 1 refused or failed, the reason is on standard error; 2 wrong usage
"""


def add_to(commands: options.Commands, add_config: options.AddConfig, load: options.Load) -> None:
    """Add the command `provision`."""
    parser = options.add_command(
        commands,
        "provision",
        "make an encrypted medium of a disk or a partition, with a new key of this board",
        epilog=_EXAMPLES,
        description=_DESCRIPTION,
    )
    _add_medium_options(parser)
    options.add_seal_options(parser)
    _add_file_options(parser)
    options.add_dry_run(parser)
    add_config(parser)

    def command(parsed: argparse.Namespace) -> int:
        if parsed.label is None:
            parsed.label = _label_in(parsed.device)
        if parsed.label is None:
            parser.error("the following arguments are required: --label")
        return _provision(parsed, load(parsed))

    parser.set_defaults(command=command)


def _label_in(device: str) -> str | None:
    """Return the label by which a partition is named, or None if it is named otherwise."""
    tag, is_tag, value = device.partition("=")
    if is_tag:
        return value if tag == "PARTLABEL" else None
    return None if "/" in device or _PARTUUID.fullmatch(device) else device


def _add_medium_options(parser: argparse.ArgumentParser) -> None:
    """Add the disk, and how the medium is made."""
    parser.add_argument(
        "device",
        metavar="DEVICE",
        help="the whole disk, such as /dev/sdb, or one partition: its device, label or PARTUUID",
    )
    parser.add_argument(
        "--label",
        metavar="NAME",
        help="the partition's label, and the name of blob, mount point and rule; default: the "
        "label by which DEVICE names a partition",
    )
    parser.add_argument("--fs", choices=FILESYSTEMS, default="ext4", help="default: ext4")
    parser.add_argument(
        "--cipher",
        default="auto",
        help="as a rule spells it; default: capi:tk(cbc(aes))-plain with a tagged key, "
        "aes-xts-plain64 with any other",
    )
    parser.add_argument(
        "--sector-size",
        type=int,
        choices=(512, 1024, 2048, 4096),
        default=512,
        help="how many bytes are encrypted as one; default: 512",
    )


def _add_file_options(parser: argparse.ArgumentParser) -> None:
    """Add the files to write, and the disk to erase."""
    parser.add_argument(
        "--recovery-key",
        type=Path,
        metavar="FILE",
        help="write the key there, with the command that opens the medium on any Linux PC",
    )
    parser.add_argument(
        "--rule",
        action="store_true",
        help=f"write a rule for this label, LABEL.toml in {names.RULES_DIRECTORY}/",
    )
    parser.add_argument(
        "--erase",
        metavar="NAME",
        help="the name of the disk or the partition, such as sdb or sdb2: all that it holds may be "
        "lost",
    )


def _provision(parsed: argparse.Namespace, loaded: loader.Config) -> int:
    # Libraries and their bindings take their time, and only this command needs them.
    from caam_hotplug.provisioning import provision  # noqa: PLC0415

    asked = _options(parsed)
    announce = _announcing(asked.config_file)
    with (
        terminal.interruptible(f"provision {shown(parsed.device)}"),
        terminal.ProgressLine(sys.stderr) as progress,
    ):
        if not parsed.dry_run:
            result = provision.provision(asked, loaded, progress.show, announce)
        else:
            plan = provision.dry_run(asked, loaded, progress.show)
    if parsed.dry_run:
        terminal.print_plan(plan.lines())
        _print_notes(plan.notes)
    else:
        _print_result(parsed.label, result)
    return 0


def _options(parsed: argparse.Namespace) -> ProvisionOptions:
    """Gather what was asked for. Raises: HotplugError if a part makes no sense."""
    from caam_hotplug.provisioning.options import ProvisionOptions  # noqa: PLC0415
    from caam_hotplug.provisioning.rule_file import rule_for  # noqa: PLC0415

    method, key_bytes = options.seal_method(parsed)
    rule, text = rule_for(
        parsed.label,
        backend=method.backend,
        key_bytes=key_bytes,
        key_options=method.options,
        filesystem=parsed.fs,
        cipher=parsed.cipher,
        sector_size=parsed.sector_size,
    )
    file = (names.CONFIG_FILE if parsed.config is None else parsed.config).absolute()
    drop_in = file.parent / names.RULES_DIRECTORY / f"{parsed.label}.toml"
    return ProvisionOptions(
        device=parsed.device,
        rule=rule,
        rule_text=text,
        key_bytes=key_bytes,
        method=method,
        recovery_file=None if parsed.recovery_key is None else parsed.recovery_key.absolute(),
        rule_file=drop_in if parsed.rule else None,
        config_file=file,
        erase=parsed.erase,
    )


def _print_result(label: str, result: ProvisionResult) -> None:
    how = "was made before; nothing was erased" if result.was_made_before else "is made"
    print(f"{result.partition}: {label} {how}; its key is in {result.blob}")
    if result.recovery_file is not None:
        kept = shown(result.recovery_file)
        print(f"recovery key: {kept}; keep it apart from the medium and the board")
    _print_notes(result.notes)


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _announcing(file: Path) -> Callable[[], list[str]]:
    """Return what has the agent of this configuration read a new rule, and notes the result."""
    if file == names.CONFIG_FILE:
        return _reload_agent
    # The bus has one agent, and nobody can find out who runs with another file.
    return lambda: [
        f"an agent that runs with --config {shown(file)} reads the rule at its start, or by "
        f"{names.PROGRAM} reload; the installed one does not"
    ]


def _reload_agent() -> list[str]:
    """Have the running agent, if there is one, read the new rule. Returns: notes on the result."""
    notices: list[str] = []
    try:
        from caam_hotplug.dbus import client  # noqa: PLC0415  sdbus is an extra

        async def reload(agent: client.Remote) -> None:
            notices.extend(await agent.reload(_RELOAD_WITHIN_S))

        client.run("have the agent read the rule", reload)
    except (ImportError, HotplugError) as error:
        return [
            f"{error}; an agent reads the rule at its start, or by systemctl reload caam-hotplug"
        ]
    return ["the running agent has read the rule", *notices]

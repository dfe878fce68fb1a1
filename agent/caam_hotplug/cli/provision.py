"""The command `provision`: its options, and what it says. What it does is in `making`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from caam_hotplug import names
from caam_hotplug.errors import ConfigError, HotplugError, shown
from caam_hotplug.formats.blobs import KEY_TYPES, Backend

if TYPE_CHECKING:
    from caam_hotplug.config import loader
    from caam_hotplug.config.rules import Rule
    from caam_hotplug.keys import sealing

_RELOAD_WITHIN_S: Final = 60.0
"""Longer than an agent takes that is well; the medium is locked meanwhile."""
FILESYSTEMS: Final = ("ext4", "xfs", "btrfs", "f2fs", "vfat", "exfat")

_EXAMPLES: Final = """\
examples:
  caam-hotplug provision /dev/sdb --label cartridge-01
        a blank stick; the built-in rule opens it
  caam-hotplug provision /dev/sdb --label cartridge-01 --erase sdb
        whatever the stick held before is lost
  caam-hotplug provision /dev/sdb --label cartridge-01 --recovery-key /root/cartridge-01.recovery
        a PC without CAAM opens it too, with that file
  caam-hotplug provision /dev/sdb --label cartridge-01 --backend encrypted --master board
        a mainline kernel: the key is encrypted under the board's trusted key `board`
  caam-hotplug provision /dev/sdb --label cartridge-01 --key-options keyhandle=0x81000001 --rule
        a TPM seals the key, under its storage key of that handle
  caam-hotplug provision /dev/sdb --label archive --cipher 'capi:tk(cbc(aes))-plain64' \\
        --sector-size 4096 --rule
        more than 2 TiB, in sectors of 4096 bytes, and the rule that says so

Interrupted anywhere, the medium is what it was, or the same command completes it.

exit status: 0 done; 1 refused or failed, the reason is on standard error; 2 wrong usage
"""

_RULE: Final = """\
# Written by `caam-hotplug provision`: how the medium {label} is encrypted.

[[rule]]
name = "{label}"
match = {{ partlabel = "{label}" }}

{key}[rule.crypt]
cipher = "{cipher}"
sector_size = {sector_size}

[rule.mount]
filesystems = ["{filesystem}"]
"""


def add_to(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    add_config: Callable[[argparse.ArgumentParser], None],
    load: Callable[[argparse.Namespace], loader.Config],
) -> None:
    """The command line knows `provision`."""
    parser = commands.add_parser(
        "provision",
        help="make an encrypted medium of a whole disk, with a new key of this board",
        description="Makes an encrypted medium of a whole disk: a new key sealed by the CAAM, a "
        "partition of the label, a filesystem. What the disk is seen to hold is erased only if "
        "--erase names the disk; raw data look like none.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("device", metavar="DEVICE", help="the whole disk, such as /dev/sdb")
    parser.add_argument(
        "--label",
        required=True,
        metavar="NAME",
        help="the partition's label, and the name of blob, mount point and rule",
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
    add_seal_options(parser)
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
        metavar="DISK",
        help="the disk's own name, such as sdb: all that it holds may be lost",
    )
    add_config(parser)
    parser.set_defaults(command=lambda parsed: _provision(parsed, load(parsed)))


def add_seal_options(parser: argparse.ArgumentParser, *, makes_key: bool = True) -> None:
    """The command knows how a key can be sealed, and of what length one is that it makes."""
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
    """The command knows what can be said of a key that its rule does not say."""
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


def seal_method(parsed: argparse.Namespace) -> tuple[sealing.SealMethod, int]:
    """How the key is to be sealed, and its length. Raises: HotplugError."""
    from caam_hotplug.config import checks  # noqa: PLC0415  only needed by some commands
    from caam_hotplug.keys import sealing  # noqa: PLC0415  only needed by some commands

    options = getattr(parsed, "key_options", "")
    try:
        checks.KEY_OPTIONS.require(options)
    except ValueError as error:
        raise HotplugError(f"use --key-options: {error}") from error
    backend = sealing.backend_here(parsed.backend)
    reason = names.why_unsafe(parsed.master)
    if reason is not None:
        raise HotplugError(f"use master {parsed.master!a}: {reason}")
    if backend != "tagged" and parsed.seal != "ecb":
        raise HotplugError(f"use --seal {parsed.seal}: only tagged keys are covered in memory")
    if backend == "tagged" and options:
        raise HotplugError("use --key-options: the CAAM needs none for a tagged key")
    key_bytes = getattr(parsed, "key_bytes", None) or sealing.KEY_BYTES[backend]
    if backend == "tagged" and key_bytes not in {16, 32}:
        raise HotplugError(f"use --key-bytes {key_bytes}: a tagged key for AES has 16 or 32")
    method = sealing.SealMethod(
        backend=backend, seal=parsed.seal, master=parsed.master, options=options
    )
    return method, key_bytes


def rule_for(
    label: str,
    *,
    backend: Backend = "tagged",
    key_bytes: int = 0,
    key_options: str = "",
    filesystem: str = "ext4",
    cipher: str = "auto",
    sector_size: int = 512,
) -> tuple[Rule, str]:
    """The rule that opens such a medium, and its drop-in's text.

    Raises: HotplugError for a label or a cipher that no rule takes.
    """
    from caam_hotplug.config import loader  # noqa: PLC0415
    from caam_hotplug.formats.crypt_table import CIPHERS  # noqa: PLC0415

    reason = names.why_unsafe(label)
    if reason is not None:
        raise HotplugError(f"use label {label!a}: {reason}")
    # What would not be itself in a TOML text is no cipher either.
    if not cipher.isprintable() or '"' in cipher or "\\" in cipher or not cipher.isascii():
        raise HotplugError(f"use cipher {cipher!a}: expected one such as aes-xts-plain64")
    text = _RULE.format(
        label=label,
        key="" if backend == "tagged" else _of_key(backend, key_bytes, key_options),
        cipher=CIPHERS[KEY_TYPES[backend]] if cipher == "auto" else cipher,
        sector_size=sector_size,
        filesystem=filesystem,
    )
    try:
        loaded = loader.load(Path("/", label), _Text(text))
    except ConfigError as error:
        raise HotplugError(f"use cipher {cipher!a}: {error.faults[0].problem}") from error
    return loaded.rule[0], text


def _of_key(backend: Backend, key_bytes: int, options: str) -> str:
    """A rule's table of the key. The length is said of a trusted one: not every blob tells it."""
    lines = [f'backend = "{backend}"']
    if options:
        lines.append(f'options = "{options}"')
    if backend == "trusted" and key_bytes:
        lines.append(f"length = {key_bytes}")
    return "\n".join(["[rule.key]", *lines, "", ""])


class _Text:
    """One configuration file, of this text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read(self, _file: Path) -> bytes:
        return self._text.encode()

    def names(self, _folder: Path) -> list[str]:
        return []


def _provision(parsed: argparse.Namespace, loaded: loader.Config) -> int:
    # Libraries and their bindings take their time, and only this command needs them.
    from caam_hotplug.provisioning import options, provision  # noqa: PLC0415

    method, key_bytes = seal_method(parsed)
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
    wished = options.Wish(
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
    with interruptible(f"provision {shown(parsed.device)}"), Progress(sys.stderr) as progress:
        made = provision.provision(wished, loaded, progress.tell, _announcing(file))
    how = "was made before; nothing was erased" if made.was_made_before else "is made"
    print(f"{made.partition}: {parsed.label} {how}; its key is in {made.blob}")
    if made.recovery_file is not None:
        kept = shown(made.recovery_file)
        print(f"recovery key: {kept}; keep it apart from the medium and the board")
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _announcing(file: Path) -> Callable[[], list[str]]:
    """Has the agent read a new rule of this configuration; in words, what came of that."""
    if file == names.CONFIG_FILE:
        return _tell_agent
    # Who runs with another file is not to be found out: the bus has one agent.
    return lambda: [
        f"an agent that runs with --config {shown(file)} reads the rule at its start, or by "
        f"{names.PROGRAM} reload; the installed one does not"
    ]


def _tell_agent() -> list[str]:
    """The running agent, if there is one, has read the new rule; in words, what came of that."""
    notices: list[str] = []
    try:
        from caam_hotplug.dbus import client  # noqa: PLC0415  sdbus is an extra

        async def reload(agent: client.Remote) -> None:
            notices.extend(await agent.reload(_RELOAD_WITHIN_S))

        client.run("tell the agent of the rule", reload)
    except (ImportError, HotplugError) as error:
        return [
            f"{error}; an agent reads the rule at its start, or by systemctl reload caam-hotplug"
        ]
    return ["the running agent has read the rule", *notices]


class Progress:
    """The step at hand, in one line that is overwritten, if somebody looks on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.is_shown = stream.isatty()
        """Whether anybody looks on."""
        dim = self.is_shown and not os.environ.get("NO_COLOR")
        self._on, self._off = ("\x1b[2m", "\x1b[0m") if dim else ("", "")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.is_shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def tell(self, step: str) -> None:
        """This step has begun."""
        if self.is_shown:
            self._stream.write(f"\r\x1b[K{self._on}{step} ...{self._off}")
            self._stream.flush()


class _InterruptionError(KeyboardInterrupt):
    """A signal that is to end the program. No error of a step's, so that no step goes on after it,
    and asyncio lets it through."""


@contextmanager
def interruptible(what: str) -> Iterator[None]:
    """A signal that ends the program lets it take back its mapping and key first.

    Raises: HotplugError then.
    """

    def interrupted(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise _InterruptionError(signal.Signals(number).name)

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, interrupted) for each in ends}
    try:
        yield
    except _InterruptionError as error:
        raise HotplugError(f"{what}: interrupted by {error}; the same command goes on") from error
    finally:
        for each, action in before.items():
            signal.signal(each, action)

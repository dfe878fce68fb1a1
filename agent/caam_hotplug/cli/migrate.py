"""The command `migrate`: its options and its output. The work is in `provisioning`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from caam_hotplug.cli import options, terminal
from caam_hotplug.errors import shown

if TYPE_CHECKING:
    from caam_hotplug.config import loader
    from caam_hotplug.formats.blobs import Backend
    from caam_hotplug.provisioning.migrate import MigrateResult

_DESCRIPTION: Final = """\
Moves a medium to a key of another kind where it is, with all that is on it: from a tagged key of
NXP's kernels to a trusted or encrypted one of mainline's, or back. Both must work on this board.
Every byte is read and written, which takes a while, and the medium cannot be used meanwhile.

A power cut at any point loses nothing: what is just being moved is in a journal beside the blobs,
and the same command goes on. Until it is done this board and its blob directory are needed. A
backup is a good idea all the same.
"""
_EXAMPLES: Final = """\
examples:
  caam-hotplug lock archive-01
  caam-hotplug migrate archive-01 --to trusted
  caam-hotplug unlock archive-01
        the medium of that label; its rule must leave backend and cipher to the blob
  caam-hotplug migrate archive-01 --to trusted --dry-run
        reads all of it, checks everything, and only says what it would do
  caam-hotplug migrate /dev/sdb1 --to encrypted --master board --recovery-key /root/new.recovery
        its key encrypted under the board's trusted key `board`, and in that file

The old blob is kept beside the new one, as archive-01.bb.tagged. Recovery files of the old key,
and blobs of other boards, do not open the medium any more.

exit status: 0 done; 1 refused or failed, the reason is on standard error; 2 wrong usage
"""
_LINE_EVERY: Final = 10
"""Per cent between two lines, if there is no terminal."""


def add_to(commands: options.Commands, add_config: options.AddConfig, load: options.Load) -> None:
    """Add the command `migrate`."""
    summary = "move a medium to a key of another kind, where it is"
    parser = options.add_command(
        commands, "migrate", summary, epilog=_EXAMPLES, description=_DESCRIPTION
    )
    parser.add_argument(
        "volume", metavar="VOLUME", help="the partition's label, or its device such as /dev/sdb1"
    )
    parser.add_argument(
        "--to",
        dest="backend",
        required=True,
        choices=("trusted", "encrypted", "tagged"),
        help="who seals the new key: the kernel's trusted keys, a trusted key of the board's "
        "(encrypted), or NXP's caam-keygen (tagged)",
    )
    options.add_key_choices(parser)
    parser.add_argument(
        "--recovery-key",
        type=Path,
        metavar="FILE",
        help="write the new key there, with the command that opens the medium on any Linux PC; not "
        "of a trusted key, which the kernel shows to nobody",
    )
    options.add_dry_run(parser)
    add_config(parser)
    parser.set_defaults(command=lambda parsed: _migrate(parsed, load(parsed)))


def _migrate(parsed: argparse.Namespace, loaded: loader.Config) -> int:
    from caam_hotplug.provisioning import migrate  # noqa: PLC0415  libraries, only needed here
    from caam_hotplug.provisioning.options import MigrateOptions  # noqa: PLC0415

    method, key_bytes = options.seal_method(parsed)
    asked = MigrateOptions(
        volume=parsed.volume,
        method=method,
        key_bytes=key_bytes,
        recovery_file=None if parsed.recovery_key is None else parsed.recovery_key.absolute(),
    )
    with (
        terminal.interruptible(f"migrate {shown(parsed.volume)}"),
        terminal.ProgressLine(sys.stderr) as progress,
    ):
        if not parsed.dry_run:
            result = migrate.migrate(asked, loaded, progress.show, _Pace(progress).reached)
        else:
            plan = migrate.dry_run(asked, loaded, progress.show)
    if parsed.dry_run:
        terminal.print_plan(plan.lines())
    else:
        _print_result(method.backend, result)
    return 0


def _print_result(backend: Backend, result: MigrateResult) -> None:
    from caam_hotplug.formats.blobs import key_of  # noqa: PLC0415  loaded by now

    label, key = shown(result.label), key_of(backend)
    if result.kept is None:
        print(f"{result.node}: {label} has {key} already")
        return
    print(f"{result.node}: {label} is under {key}; it is in {result.blob}")
    print(f"its old blob is kept as {shown(result.kept)}")
    if result.recovery_file is not None:
        print(f"recovery key: {shown(result.recovery_file)}; keep it apart from medium and board")
    print(
        f"note: what was locked stays so until `caam-hotplug unlock {label}`\n"
        "note: recovery files of its old key and blobs of other boards do not open it any more",
        file=sys.stderr,
    )


class _Pace:
    """Shows how far the medium has moved, how fast, and the time left."""

    def __init__(
        self, progress: terminal.ProgressLine, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress = progress
        self._clock = clock
        self._begun: tuple[float, int] | None = None
        self._said = 0

    def reached(self, done: int, whole: int) -> None:
        """Show that so many bytes of the whole are done."""
        now = self._clock()
        if self._begun is None:
            self._begun = now, done
        since, before = self._begun
        percent = 100 * done // whole
        text = f"moving: {percent} % of {whole / 1e6:.0f} MB"
        if now > since and done > before:
            pace = (done - before) / (now - since)
            text += f", {pace / 1e6:.1f} MB/s, {_duration((whole - done) / pace)} left"
        self._progress.show(text)
        if not self._progress.is_shown and percent >= self._said + _LINE_EVERY:
            self._said = percent // _LINE_EVERY * _LINE_EVERY
            print(text, file=sys.stderr)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

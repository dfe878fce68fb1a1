"""Mount options by which filesystems leave their journal as it is. Pure.

A filesystem whose journal has changes, as after a pull, brings them to their places when it is
mounted, also read-only. On a write-protected device it refuses the mount instead:

    filesystem  refusal  mounted without what the journal has by
    ext4        EROFS    noload
    xfs         EROFS    norecovery
    btrfs       EIO      rescue=nologreplay
    f2fs        EROFS    norecovery

Source: ext4_load_journal in fs/ext4/super.c; xlog_recover in fs/xfs/xfs_log_recover.c;
btrfs_replay_log in fs/btrfs/disk-io.c; f2fs_fill_super in fs/f2fs/super.c; their documentation.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class _Journal:
    refusal: int
    without: tuple[str, ...]
    about_journal: frozenset[str] = frozenset()
    """Options that the filesystem refuses where it does not load its journal."""


_JOURNALS: Final = {
    "ext4": _Journal(
        errno.EROFS,
        ("noload",),
        frozenset({"commit", "data", "journal_async_commit", "journal_checksum"}),
    ),
    "xfs": _Journal(errno.EROFS, ("norecovery", "nouuid")),
    "btrfs": _Journal(errno.EIO, ("rescue=nologreplay",)),
    "f2fs": _Journal(errno.EROFS, ("norecovery",)),
}
_SHOWN: Final = {"noload", "norecovery", "nologreplay"}
"""In mountinfo; btrfs may show several rescues in one option, with colons between."""


def may_lack_replay(filesystem: str, refusal: int | None) -> bool:
    """Whether a write-protected device whose journal has changes is refused with this error."""
    journal = _JOURNALS.get(filesystem)
    return journal is not None and journal.refusal == refusal


def without_replay(filesystem: str, options: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the options, with those that leave the journal as it is, and none against them."""
    journal = _JOURNALS.get(filesystem)
    if journal is None:
        return tuple(options)
    kept = [each for each in options if each.partition("=")[0] not in journal.about_journal]
    return (*kept, *(each for each in journal.without if each not in kept))


def leaves_journal(shown: Iterable[str]) -> bool:
    """Whether a filesystem with these options, as mountinfo has them, left its journal as it is."""
    return any(not _SHOWN.isdisjoint(option.removeprefix("rescue=").split(":")) for option in shown)

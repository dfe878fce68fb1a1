"""How far earlier runs of `migrate` have come, read off the board's journals and the medium.

journal                         medium                      stage
none, or with the first record  as it was                   untouched
there                           marked for that journal     begun
there, with its last record     as it was                   begun, and only the last steps are left
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.kernel import gpt
from caam_hotplug.provisioning import marked_partition, migration_journal
from caam_hotplug.provisioning.reencryption import Record


@dataclass(frozen=True, slots=True)
class Untouched:
    """No earlier run has touched the medium."""

    unused: migration_journal.Head | None = None
    """The journal of a run that ended before it touched the medium."""


@dataclass(frozen=True, slots=True)
class Begun:
    """An earlier run has begun, and its journal says how far it came."""

    head: migration_journal.Head
    moved_bytes: int
    """How many bytes are under the new key at least."""


def find_migration(
    heads: Sequence[migration_journal.Head], entry: gpt.Entry, node: str, directory: Path
) -> Untouched | Begun:
    """Find the medium's journal among those of the board.

    Raises: HotplugError if medium and journals contradict each other.
    """
    mark = marked_partition.mark_in(entry)
    if mark is not None:
        marked = [head for head in heads if head.mark == mark]
        if not marked:
            raise HotplugError(
                f"migrate {node}: it is not finished, and no journal in {shown(directory)} is of "
                "it; go on on the board where it was begun, or with `provision` if that began it. "
                "If nothing of it was moved yet, its old label and partition type bring it back"
            )
        return Begun(marked[0], _last_record(directory, marked[0]).position)
    named = [head for head in heads if head.uuid == entry.identity.uuid]
    if not named:
        return Untouched()
    last = _last_record(directory, named[0])
    if last.content:
        raise HotplugError(
            f"migrate {node}: {shown(migration_journal.file(directory, named[0]))} says that "
            "part of it is under a new key, and it is not marked so; is it a copy that was made "
            "before? Remove that file if the medium that it is of is lost"
        )
    if last.is_first:
        return Untouched(unused=named[0])
    return Begun(named[0], last.position)


def _last_record(directory: Path, head: migration_journal.Head) -> Record:
    with migration_journal.opened(directory, head) as begun:
        return begun.journal.records()[0]

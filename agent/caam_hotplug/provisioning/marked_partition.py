"""The mark of a partition that is not finished: its type, its labels, its identifiers.

No rule matches the type, so no agent opens a marked partition, here or on another board. The
identifier names what `provision` or `migrate` began with, so that only the same command goes on.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final
from uuid import UUID, uuid5

from caam_hotplug import names
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import disks, gpt

TYPE: Final = UUID(names.UNFINISHED_TYPE)
"""The partition type, and the namespace of the identifiers that `provision` gives."""
LINUX_DATA: Final = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
"""The partition type of a finished medium."""

# Labels for users. Blanks and parentheses keep them apart from any label of a medium.
_PROVISIONING: Final = "(caam-hotplug: not finished)"
_MIGRATING: Final = "(caam-hotplug: migrating)"


def described(label: str) -> str:
    """Describe a marked partition with this label, for a command that did not begin with it."""
    if label == _MIGRATING:
        return "a medium whose migration was interrupted, which `caam-hotplug migrate` goes on with"
    return "a medium that is not finished, begun with another label, key or recovery file"


def mark_of(label: str, recovery_id: str | None, blob: blobs.Blob) -> UUID:
    """Derive the identifier of a partition that `provision` began with these keys."""
    file = [] if recovery_id is None else [recovery_id]
    return uuid5(TYPE, " ".join([label, *file, sha256(blob.content).hexdigest()]))


def provisioning(mark: UUID) -> gpt.Identity:
    """Build the identity of a partition that `provision` has not finished."""
    return gpt.Identity(_PROVISIONING, TYPE, mark)


def migrating(mark: UUID) -> gpt.Identity:
    """Build the identity of a partition that `migrate` has not finished."""
    return gpt.Identity(_MIGRATING, TYPE, mark)


def mark_in(entry: gpt.Entry) -> UUID | None:
    """Return the mark of a partition, or None if it has none."""
    return entry.identity.uuid if entry.identity.type == TYPE else None


def write(hold: disks.Held, number: int, identity: gpt.Identity) -> None:
    """Give the partition this identity. Raises: HotplugError if the medium was changed."""
    gpt.rename(hold.writing(), hold.disk.node, number, identity)

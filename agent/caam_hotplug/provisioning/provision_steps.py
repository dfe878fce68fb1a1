"""Steps that a whole medium and a partition of a disk in use have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import blkid, mkfs
from caam_hotplug.keys import store
from caam_hotplug.model import SecretBytes
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.provision_stage import FoundKeys

Announce = Callable[[], list[str]]
"""Has a running agent read a new rule, and returns notes about the result."""


@dataclass(frozen=True, slots=True)
class ProvisionResult:
    """The medium as it is now."""

    partition: str
    """The device node that the partition gets."""
    blob: Path
    was_made_before: bool
    recovery_file: Path | None
    """The recovery file that this run wrote or used. None if it did neither."""
    notes: tuple[str, ...]
    """What else the user is to know, or to do."""


@contextmanager
def key_for(
    options: ProvisionOptions, keys: FoundKeys
) -> Iterator[tuple[str | None, int | SecretBytes]]:
    """Yield the recovery file's identifier and key.

    Without a recovery file, the length of a key stands for the key, which only the CAAM will know.
    """
    file = options.recovery_file
    if file is None:
        yield None, options.key_bytes
        return
    with store.recovery_key(file, keys.recovery, options.about, options.key_bytes) as found:
        yield found


def make_filesystem(options: ProvisionOptions, node: str, medium: str) -> None:
    """Make the filesystem on a mapping, and bring it to the medium. Raises: HotplugError."""
    mkfs.make(options.filesystem, options.label, node)
    device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(device)
    finally:
        os.close(device)
    if blkid.probe(node, [options.filesystem]) is None:
        raise HotplugError(
            f"provision {medium}: what was written does not read as "
            f"{options.filesystem}; is the medium damaged?"
        )

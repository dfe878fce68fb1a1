"""What is remembered of a volume, stored as an extended attribute of its disk's node.

A restart of the agent must not mount a medium that it has declared safe to pull. The kernel keeps
devices' nodes in memory (devtmpfs), with their attributes, and removes a node with its device. So
nothing has to be removed, and no file can be out of date. The node of an ejected partition has
gone with it, so the disk's has the attributes of all volumes. Source: xattr(7),
drivers/base/devtmpfs.c.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.formats.marks import Mark
from caam_hotplug.model import State, Volume

log = logging.getLogger(__name__)

_ATTRIBUTE: Final = "trusted.caam-hotplug."
"""In the namespace that only root with CAP_SYS_ADMIN can read and write; the partition follows."""
_OF_FIRST_VERSION: Final = "trusted.caam-hotplug"
"""An attribute of the volume's own node, with `locked` or `ejected`: an upgrade keeps that."""
_PLACE: Final = "trusted.caam-hotplug.place"
"""Of the node of a mapping: where its filesystem was mounted at a path of its own."""
_NONE: Final = {errno.ENODATA, errno.ENOENT, errno.ENXIO}
"""Error numbers without such an attribute, or without the node."""


def mark(volume: Volume, text: str) -> None:
    """Store the text for this insertion of the volume; remove it if it is empty.

    Without attributes for nodes in the kernel (CONFIG_TMPFS_XATTR), nothing is stored.
    """
    node, attribute = _disk_node(volume), f"{_ATTRIBUTE}{volume.id.partition}"
    with suppress(OSError):
        os.removexattr(volume.node, _OF_FIRST_VERSION, follow_symlinks=False)
    try:
        if text:
            os.setxattr(node, attribute, f"{volume.id} {text}".encode(), follow_symlinks=False)
        else:
            os.removexattr(node, attribute, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NONE:
            failure = KernelError("mark", node, error.errno or 0)
            log.debug("%s; after a restart this is not known: %s", failure, text)


def marked(volume: Volume) -> str:
    """Return the text stored for this insertion of the volume; empty if there is none."""
    which = str(volume.id)
    text = _read(_disk_node(volume), f"{_ATTRIBUTE}{volume.id.partition}", which)
    if text:
        return text
    is_released = _read(volume.node, _OF_FIRST_VERSION, which) in {"locked", "ejected"}
    return Mark(volume, State.LOCKED).to_text() if is_released else ""


def all_marked(disk: Volume) -> list[str]:
    """Return the texts stored for this insertion of a disk and its partitions."""
    try:
        found = os.listxattr(disk.node, follow_symlinks=False)
    except OSError:
        return []
    ours = [name for name in found if name.startswith(_ATTRIBUTE)]
    texts = (
        _read(disk.node, name, f"{disk.id.diskseq}-{name.removeprefix(_ATTRIBUTE)}")
        for name in ours
    )
    return [text for text in texts if text]


def mark_place(node: str, place: str) -> None:
    """Store where a mount of this node's mapping is the agent's; remove that if it is empty.

    A later run of the agent, with other rules, knows the mount by that. It goes with the mapping.
    """
    try:
        if place:
            os.setxattr(node, _PLACE, os.fsencode(place), follow_symlinks=False)
        else:
            os.removexattr(node, _PLACE, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NONE:
            failure = KernelError("mark", node, error.errno or 0)
            log.debug("%s; later runs may not know which mount is ours: %r", failure, place)


def marked_place(node: str) -> str:
    """Return the path that was stored for the mapping of this node; empty if there is none."""
    try:
        return os.fsdecode(os.getxattr(node, _PLACE, follow_symlinks=False))
    except OSError:
        return ""


def _read(node: str, attribute: str, which: str) -> str:
    try:
        found = os.getxattr(node, attribute, follow_symlinks=False)
    except OSError:
        return ""
    of, _, text = found.decode(errors="replace").partition(" ")
    return text if of == which else ""


def _disk_node(volume: Volume) -> str:
    """Return the node of the volume's disk, also when there is no such partition any more.

    Source: disk_name in block/genhd.c.
    """
    if not volume.id.partition:
        return volume.node
    disk = volume.node.removesuffix(str(volume.id.partition))
    return disk[:-1] if disk.endswith("p") and disk[-2:-1].isdigit() else disk

"""A volume's state, stored as an extended attribute of its device's node.

A restart of the agent must not mount a medium that it has declared safe to pull. The kernel keeps
devices' nodes in memory (devtmpfs), with their attributes, and removes a node with its device. So
nothing has to be removed, and no file can be out of date. Source: xattr(7),
drivers/base/devtmpfs.c.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.model import Volume

log = logging.getLogger(__name__)

_ATTRIBUTE: Final = "trusted.caam-hotplug"
"""In the namespace that only root with CAP_SYS_ADMIN can read and write."""
_NONE: Final = {errno.ENODATA, errno.ENOENT, errno.ENXIO}
"""Error numbers without such an attribute, or without the node."""


def mark(volume: Volume, text: str) -> None:
    """Store the text for this insertion of the volume; remove it if it is empty.

    Without attributes for nodes in the kernel (CONFIG_TMPFS_XATTR), nothing is stored.
    """
    try:
        if text:
            value = f"{volume.id} {text}".encode()
            os.setxattr(volume.node, _ATTRIBUTE, value, follow_symlinks=False)
        else:
            os.removexattr(volume.node, _ATTRIBUTE, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NONE:
            failure = KernelError("mark", volume.node, error.errno or 0)
            log.debug("%s; after a restart this is not known: %s", failure, text)


def marked(volume: Volume) -> str:
    """Return the text stored for this insertion of the volume; empty if there is none."""
    try:
        found = os.getxattr(volume.node, _ATTRIBUTE, follow_symlinks=False)
    except OSError:
        return ""
    of, _, text = found.decode(errors="replace").partition(" ")
    return text if of == str(volume.id) else ""

"""What is remembered of a device for as long as it is there: on its node, which goes with it.

A restart of the agent must not mount a medium that people were told they may pull. The kernel keeps
devices' nodes in memory (devtmpfs), with their extended attributes, and removes a node with its
device; so nothing has to be cleaned up, and no file of ours can be out of date. Source: xattr(7),
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
"""Of the namespace that only root with CAP_SYS_ADMIN can read and write."""
_NONE: Final = {errno.ENODATA, errno.ENOENT, errno.ENXIO}
"""There is no such attribute, or no such node any more."""


def mark(volume: Volume, text: str) -> None:
    """The text is remembered of this insertion of the volume; none if it is empty.

    Where the kernel has no attributes for nodes (CONFIG_TMPFS_XATTR), nothing is.
    """
    try:
        if text:
            value = f"{volume.id} {text}".encode()
            os.setxattr(volume.node, _ATTRIBUTE, value, follow_symlinks=False)
        else:
            os.removexattr(volume.node, _ATTRIBUTE, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NONE:
            said = KernelError("mark", volume.node, error.errno or 0)
            log.debug("%s; after a restart this is not known: %s", said, text)


def marked(volume: Volume) -> str:
    """What is remembered of this insertion of the volume; empty if nothing is."""
    try:
        found = os.getxattr(volume.node, _ATTRIBUTE, follow_symlinks=False)
    except OSError:
        return ""
    of, _, text = found.decode(errors="replace").partition(" ")
    return text if of == str(volume.id) else ""

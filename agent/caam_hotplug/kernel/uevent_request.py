"""Have the kernel report that a device has changed."""

from __future__ import annotations

import os
from typing import Final

from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.model import Volume

_SYS_DEV: Final = "/sys/dev/block"


def changed(volume: Volume) -> None:
    """Have udev read the volume's labels anew. No other device is reported. Raises: KernelError.

    Source: Documentation/ABI/testing/sysfs-uevent.
    """
    with reported_as("report a change of", volume.node):
        file = os.open(f"{_SYS_DEV}/{volume.number}/uevent", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(file, b"change")
        finally:
            os.close(file)

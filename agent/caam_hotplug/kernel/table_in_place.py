"""The partition table of a disk in use."""

from __future__ import annotations

from caam_hotplug.kernel import gpt_in_place, mbr_in_place
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.kernel.table_entry import refused

Table = gpt_in_place.Table | mbr_in_place.Table


def read(blocks: Blocks, node: str, block: int, size_bytes: int) -> Table:
    """Read the table by which the kernel has the disk's partitions.

    A GPT counts only if an MBR protects it (is_pmbr_valid in block/partitions/efi.c). `blocks`: of
    the disk, past the cache. Raises: UnsupportedVolumeError; KernelError. Blocks for I/O.
    """
    content = blocks.read(0, block)
    kinds = mbr_in_place.kinds(content)
    if mbr_in_place.PROTECTIVE in kinds:
        return gpt_in_place.read(blocks, node, block, size_bytes)
    if not any(kinds):
        raise refused(node, "it has neither a GPT nor an MBR")
    return mbr_in_place.Table(node, block, content)

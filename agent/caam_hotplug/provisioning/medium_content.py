"""What a medium holds that `provision` would erase, also where libblkid knows nothing of it.

A whole disk that is encrypted without a header looks like noise. So a medium counts as blank only
if it reads so: its first and last MiB, and samples between. The place of the partition table may
hold half a table, which an interrupted run has left, but no noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from typing import Final
from uuid import UUID

from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import Plan, match_rules
from caam_hotplug.errors import BlobError, BlobRejectedError, HotplugError, KernelError
from caam_hotplug.kernel import blkid, blob_files, disks, gpt, udev
from caam_hotplug.model import SECTOR_BYTES, DevType, Sectors
from caam_hotplug.provisioning import marked_partition, temporary_mapping

_MIB: Final = 1 << 20
_PIECE: Final = 4096
_SAMPLES: Final = 64
_TABLE: Final = 6 * _PIECE
"""Room of a GPT at either end of a disk, in bytes, for sectors of up to 4096 bytes."""
_NOISY: Final = 160
"""Different bytes in a sector of noise, at least; on average it has 221, and half a table 60."""


def of(hold: disks.Held, config: Config) -> str | None:
    """Describe what the medium holds, or return None if it is blank. Raises: HotplugError.

    `hold`: of a whole disk, or of a partition.
    """
    known = blkid.known_contents(hold.disk.node)
    if known is not None:
        return known
    return _volume_of_a_rule(hold, config) or _unknown(hold)


def _volume_of_a_rule(hold: disks.Held, config: Config) -> str | None:
    """Describe the volume if a rule of this board opens it. Raises: HotplugError."""
    plan = _plan_for(hold, config)
    if plan is None:
        return None
    file = config.blob_directory / plan.blob
    try:
        found = _content_under(hold, plan, config)
    except (BlobError, BlobRejectedError):
        return None
    except HotplugError as error:
        return (
            f"what may be the volume of rule {plan.rule.name!r}, under the key of {file}: {error}"
        )
    if found is None:
        return None
    return f"the volume of rule {plan.rule.name!r}: {found}, under the key of {file}"


def _plan_for(hold: disks.Held, config: Config) -> Plan | None:
    """Return the plan of the rule that matches the volume. Raises: HotplugError."""
    volume = hold.disk
    if volume.devtype is DevType.DISK:
        if all(rule.match.devtype is not DevType.DISK for rule in config.rule):
            return None
        source = udev.default_source() if config.source == "auto" else config.source
        with closing(udev.Devices(source)) as devices:
            volume = devices.volume(hold.disk.node)
        hold.require_same(hold.reading)
    plan = match_rules(config.rule, volume)
    return plan if isinstance(plan, Plan) else None


def _content_under(hold: disks.Held, plan: Plan, config: Config) -> str | None:
    """Describe the content under the blob's key, or return None. Raises: HotplugError."""
    directory, rule = config.blob_directory, plan.rule
    blob = blob_files.read(directory, plan.blob, rule.key.form)
    no_entry = gpt.Identity("", marked_partition.LINUX_DATA, UUID(int=0))
    whole = gpt.Entry(0, no_entry, Sectors(0), hold.disk.size)
    with temporary_mapping.through_key(
        hold, "provision", whole, rule=rule, blob=blob, directory=directory
    ) as mapping:
        return blkid.known_contents(mapping.node)


def _unknown(hold: disks.Held) -> str | None:
    """Describe content of no known kind, or return None if the medium reads as blank."""
    size = hold.disk.size * SECTOR_BYTES
    table = _TABLE if hold.disk.devtype is DevType.DISK else 0
    for start, content in _read(hold, size):
        for at in range(0, len(content), SECTOR_BYTES):
            sector = content[at : at + SECTOR_BYTES]
            if sector.count(sector[0]) == len(sector):
                continue
            is_in_table = start + at < table or start + at >= size - table
            if not is_in_table or len(set(sector)) >= _NOISY:
                return (
                    f"something that no program here knows, at byte {start + at}, such as a volume "
                    "that is encrypted without a header"
                )
    return None


def _read(hold: disks.Held, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the medium's ends and samples between, each with its place in bytes."""
    edges = [(0, min(_MIB, size)), (max(0, size - _MIB), min(_MIB, size))]
    step = size // _SAMPLES // _PIECE * _PIECE
    samples = [(number * step, _PIECE) for number in range(1, _SAMPLES) if step]
    for start, length in (*edges, *samples):
        try:
            yield start, os.pread(hold.reading, length, start)
        except OSError as error:
            raise KernelError("read", hold.disk.node, error.errno or 0) from error

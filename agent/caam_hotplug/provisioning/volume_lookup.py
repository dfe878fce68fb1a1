"""Find the partition that a user names, by its label or its device node."""

from __future__ import annotations

from contextlib import closing, suppress

from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import lacks_entry
from caam_hotplug.errors import HotplugError, KernelError, shown
from caam_hotplug.kernel import open_volume, sysfs, udev
from caam_hotplug.model import Appeared, DevType, Volume
from caam_hotplug.provisioning import migration_journal


def find_partition(
    text: str, config: Config, command: str = "migrate", otherwise: str | None = None
) -> Volume:
    """Find the partition with that label, PARTUUID or node.

    One that `migrate` has marked has the label of its journal. A tag as in fstab may say which of
    the two a text is. `otherwise`: the PARTUUID of the one that is meant if none has that name.
    Raises: HotplugError if there is none, or more than one.
    """
    source = udev.default_source() if config.source == "auto" else config.source
    with closing(udev.Devices(source)) as devices:
        if "/" in text:
            return _partition_at(text, devices, command)
        marks = {
            str(head.mark)
            for head in migration_journal.heads(config.blob_directory)
            if head.name == text
        }
        events = (event for event in devices.present() if isinstance(event, Appeared))
        reported = {event.volume.id: event.volume for event in events}
        there = {volume.id: volume for volume in sysfs.there()} | reported
    identified = map(_identified, there.values())
    partitions = [volume for volume in identified if volume.devtype is DevType.PARTITION]
    found = [each for each in partitions if _is_named(each, text) or each.partuuid in marks]
    if not found and otherwise is not None:
        found = [each for each in partitions if _is_named(each, f"PARTUUID={otherwise}")]
    match found:
        case [volume]:
            return volume
        case []:
            raise HotplugError(
                f"{command} {shown(text)}: no partition has this label or PARTUUID; is the medium "
                "plugged in? A device is named by its path, such as /dev/sdb1"
            )
        case _:
            nodes = ", ".join(sorted(volume.node for volume in found))
            raise HotplugError(
                f"{command} {shown(text)}: {len(found)} partitions have this label; name the "
                f"device: {nodes}"
            )


def _is_named(volume: Volume, text: str) -> bool:
    tag, is_tag, value = text.partition("=")
    label = value if is_tag and tag == "PARTLABEL" else text
    uuid = value if is_tag and tag == "PARTUUID" else text
    is_labelled = bool(label) and volume.partlabel == label
    return is_labelled or (bool(uuid) and (volume.partuuid or "").lower() == uuid.lower())


def _partition_at(node: str, devices: udev.Devices, command: str) -> Volume:
    found = _identified(devices.volume(node))
    if found.devtype is not DevType.PARTITION:
        raise HotplugError(
            f"{command} {shown(node)}: it is a whole disk; only a partition can be marked while it "
            "is under two keys: name that"
        )
    return found


def _identified(volume: Volume) -> Volume:
    is_partition = volume.devtype is DevType.PARTITION
    if is_partition and (not volume.identified or lacks_entry(volume)):
        with suppress(KernelError):  # an unreadable medium is not the one that was named
            return open_volume.identify(volume)
    return volume

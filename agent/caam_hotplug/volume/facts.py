"""What is known of a volume: the kernel's report first, udev's later, and what its disk says."""

from __future__ import annotations

from dataclasses import dataclass, replace

from caam_hotplug.config.match import IN_THE_TABLE, OF_UDEV, ON_THE_DISK, lacks_entry
from caam_hotplug.model import Volume


@dataclass(frozen=True, slots=True)
class Merged:
    """A new report, merged with what was known before."""

    volume: Volume
    is_udevs_first: bool
    """Whether this is the first report of udev's."""
    is_kept: bool
    """Whether the report was ignored, but for `awaits_udev`."""


def contradict(volume: Volume, other: Volume) -> bool:
    """Whether the two differ in what a disk says of a volume."""
    return any(getattr(volume, fact) != getattr(other, fact) for fact in ON_THE_DISK)


class Facts:
    """Merges the reports about one volume. Synchronization: loop only."""

    def __init__(self, volume: Volume) -> None:
        self.udevs_report = volume if volume.identified else None
        """Last report of udev's."""
        self._is_doubted = False
        """Whether the disk has contradicted it, so that it may be of another medium."""

    def merge(self, before: Volume, report: Volume, *, needs_udev: bool) -> Merged:
        """Merge a report. `needs_udev`: what was known before is not enough to match the rules."""
        is_udevs = report.identified
        is_first = is_udevs and (self.udevs_report is None or self._is_doubted)
        is_kept = before.identified and not is_udevs and not needs_udev
        if is_kept:
            report = replace(before, awaits_udev=report.awaits_udev)
        elif is_udevs:
            self.udevs_report, self._is_doubted = report, False
        if is_udevs and before.identified and (is_first or lacks_entry(report)):
            # Facts that udev failed to read (bad sector) do not contradict the earlier ones.
            facts = ON_THE_DISK if is_first else IN_THE_TABLE
            missing = [fact for fact in facts if getattr(report, fact) is None]
            report = replace(report, **{fact: getattr(before, fact) for fact in missing})
        return Merged(report, is_first, is_kept)

    def read(self, before: Volume, found: Volume) -> Volume:
        """Merge what the disk says, which counts more than what was reported."""
        facts = {fact: getattr(found, fact) for fact in ON_THE_DISK}
        return replace(before, **facts, identified=True)

    def unreported(self, volume: Volume) -> frozenset[str]:
        """List the facts that nobody has reported, though the medium may have them."""
        of_table = IN_THE_TABLE if lacks_entry(volume) else frozenset[str]()
        of_udev = OF_UDEV if self.udevs_report is None else frozenset[str]()
        return frozenset(fact for fact in of_table | of_udev if getattr(volume, fact) is None)

    def contradiction(self, read: Volume) -> str:
        """Return what udev has reported last and the disk does not say, in words, once."""
        report = self.udevs_report
        if report is None or self._is_doubted:
            return ""
        words = [
            f"{fact} is {getattr(read, fact)!a} on the disk, and udev reports {reported!a}"
            for fact in sorted(ON_THE_DISK)
            if (reported := getattr(report, fact)) not in {None, getattr(read, fact)}
        ]
        self._is_doubted = bool(words)
        return "; ".join(words)

"""What a volume holds, as it was published, and whether the kernel may have something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from caam_hotplug.config.rules import OnBusy
from caam_hotplug.model import DeviceNumber, Mapping, Mount
from caam_hotplug.volume.mount_table import cover_of, is_of


@dataclass(frozen=True, slots=True)
class Interference:
    """What somebody else has done to an active volume, for which it is released."""

    words: str
    on_busy: OnBusy = OnBusy.DETACH
    """Users may finish."""


@dataclass(frozen=True, slots=True)
class UnfinishedRelease:
    """What a volume was released for, by this run of the agent or an earlier one, to go on with."""

    words: str
    is_ended_by_mount: bool = True
    """Whether a mount of it shows that it was not unmounted yet, or was served again since."""


UNMOUNTED: Final = Interference("unmounted by somebody else")
UNMAPPED: Final = Interference("its mapping was removed by somebody else")


class Holding:
    """What a volume holds, and what was last seen of it. Synchronization: loop only."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called when there is something to look at."""
        self._wake = wake
        self.mapping: Mapping | None = None
        """The mapping as it was last published; None while there is none."""
        self.mount: Mount | None = None
        """The mount as it was last published; None while there is none."""
        self.number: DeviceNumber | None = None
        """The number that the files of the filesystem have, also after its unmount."""
        self.found: Mount | None = None
        """The mount as it was last seen; None if it has gone."""
        self.cover: Mount | None = None
        """What hides the mount, as it was last published."""
        self.found_cover: Mount | None = None
        """What hides the mount, as it was last seen."""
        self.was_writable = False
        """Whether the filesystem that was published last could be written to."""
        self.others: tuple[Mount, ...] = ()
        """Where others have mounted a mapping that is not mounted here, as last published."""
        self.found_others: tuple[Mount, ...] = ()
        """As `others`, as they were last seen."""
        self.is_for_others = False
        """Whether the mapping is not to be mounted here."""
        self.is_offline = False
        """Whether the kernel has taken its disk offline, as last seen."""
        self.is_mapping_doubted = False
        """Whether the kernel may have no such mapping any more, or another table in it."""
        self.is_look_wanted = False
        """Whether also that is to be looked at which the kernel does not report."""
        self.users: tuple[Mapping, tuple[str, ...]] | None = None
        """Who has a released mapping open, and the mapping as it was when they were looked for."""
        self.looked_at = -math.inf
        """When that was wanted last, by the loop's time."""
        self.is_paused = False
        """Whether the volume itself changes what it holds, so that nothing is compared."""

    @property
    def watches_mounts(self) -> bool:
        """Whether changes of the mounts concern it."""
        return (self.mount is not None or self.is_for_others) and not self.is_paused

    @property
    def is_writable(self) -> bool:
        """Whether something may have been written that has not reached the medium."""
        seen = self.found_others if self.found is None else (self.found,)
        return any(not mount.is_filesystem_read_only for mount in seen)

    @property
    def is_left_writable(self) -> bool:
        """Whether others may still write to what was released."""
        return self.mapping is not None and self.mount is None and self.was_writable

    @property
    def differs(self) -> bool:
        """Whether what is published may not be so any more, or is to be looked at."""
        if self.is_mapping_doubted or self.is_look_wanted:
            return True
        seen = (self.found, self.found_cover, *self.found_others)
        return [*map(_facts, seen)] != [*map(_facts, (self.mount, self.cover, *self.others))]

    def begin(self, mapping: Mapping) -> None:
        """Note what is held: a mapping, and no mount yet. What it was watched for still counts."""
        is_watched = self.mapping is not None and self.mapping.node == mapping.node
        is_doubted, is_look_wanted = self.is_mapping_doubted, self.is_look_wanted
        self.end()
        self.mapping = mapping
        self.is_mapping_doubted = is_watched and is_doubted
        self.is_look_wanted = is_watched and is_look_wanted
        self.was_writable = self.is_paused = self.is_offline = False

    def publish(self, mount: Mount) -> None:
        """Note the mount that is published, with what was seen to hide it."""
        self.mount = self.found = mount
        self.number = mount.number
        self.cover = self.found_cover
        self.was_writable = self.is_writable

    def publish_others(self) -> None:
        """Note that it is published where others have mounted the mapping."""
        self.others = self.found_others
        self.was_writable = self.is_writable

    def release(self) -> None:
        """Note that it is released; others may hold the mapping, whose removal is noticed."""
        self.mount = self.found = self.cover = self.found_cover = None
        self.others = self.found_others = ()
        self.is_for_others = self.is_look_wanted = False

    def watch(self, mapping: Mapping) -> bool:
        """Notice the removal of a released mapping from now on; False if that was so before."""
        is_new = self.mapping is None or self.mapping.node != mapping.node
        if is_new:
            self.end()
            self.mapping = mapping
        return is_new

    def end(self) -> None:
        """Note that nothing is held that others could change."""
        self.release()
        self.mapping = self.users = self.number = None
        self.is_mapping_doubted = False

    def compare(self, mounts: Sequence[Mount]) -> None:
        """Compare the mount with those that there are now."""
        before = self.differs
        if self.is_for_others and self.mapping is not None:
            mapping = self.mapping
            self.found_others = tuple(mount for mount in mounts if is_of(mount, mapping))
        if self.mount is not None:
            key = _key(self.mount)
            self.found = next((mount for mount in mounts if _key(mount) == key), None)
            self.found_cover = None if self.found is None else cover_of(mounts, self.found)
        if self.differs != before:
            self._wake()

    def want_look(self) -> None:
        """Have all looked at that the kernel does not report, if there is anything."""
        if self.mapping is not None:
            self.is_look_wanted = True
            self._wake()

    def mapping_changed(self, node: str) -> bool:
        """Note that the kernel has changed or removed the mapping of this node, if it is held."""
        is_held = self.mapping is not None and self.mapping.node == node
        if is_held:
            self.doubt_mapping()
        return is_held

    def doubt_mapping(self) -> None:
        """Have the mapping looked at, if there is one."""
        if self.mapping is not None:
            self.is_mapping_doubted = True
            self._wake()


def _key(mount: Mount) -> tuple[object, ...]:
    """Return what stays the same of a mount: others can change its place and its source's text."""
    return mount.identity, mount.number


def _facts(mount: Mount | None) -> tuple[object, ...]:
    if mount is None:
        return ()
    return (*_key(mount), mount.point, mount.read_only, mount.is_filesystem_read_only)

"""What a volume holds, as it was published, and whether the kernel may have something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from caam_hotplug.config.rules import OnBusy
from caam_hotplug.model import Mapping, Mount
from caam_hotplug.volume.mount_table import cover_of


@dataclass(frozen=True, slots=True)
class Interference:
    """What somebody else has done to an active volume, for which it is released."""

    words: str
    on_busy: OnBusy = OnBusy.DETACH
    """Users may finish."""


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
        self.found: Mount | None = None
        """The mount as it was last seen; None if it has gone."""
        self.cover: Mount | None = None
        """What hides the mount, as it was last published."""
        self.found_cover: Mount | None = None
        """What hides the mount, as it was last seen."""
        self.was_writable = False
        """Whether the filesystem that was published last could be written to."""
        self.is_mapping_doubted = False
        """Whether the kernel may have no such mapping any more, or another table in it."""
        self.is_paused = False
        """Whether the volume itself changes what it holds, so that nothing is compared."""

    @property
    def watches_mounts(self) -> bool:
        """Whether changes of the mounts concern it."""
        return self.mount is not None and not self.is_paused

    @property
    def is_writable(self) -> bool:
        """Whether something may have been written that has not reached the medium."""
        return self.found is not None and not self.found.is_filesystem_read_only

    @property
    def is_left_writable(self) -> bool:
        """Whether others may still write to what was released."""
        return self.mapping is not None and self.mount is None and self.was_writable

    @property
    def differs(self) -> bool:
        """Whether what is published may not be so any more."""
        seen, published = (self.found, self.found_cover), (self.mount, self.cover)
        return self.is_mapping_doubted or [*map(_facts, seen)] != [*map(_facts, published)]

    def begin(self, mapping: Mapping, mount: Mount | None = None) -> None:
        """Note what is held and published."""
        self.mapping = mapping
        self.is_mapping_doubted = self.is_paused = False
        self.publish(mount)

    def publish(self, mount: Mount | None) -> None:
        """Note the mount that is published, with what was seen to hide it."""
        self.mount = self.found = mount
        self.cover = self.found_cover
        self.was_writable = self.is_writable

    def leave(self, mapping: Mapping) -> None:
        """Note a released mapping that others hold: its removal is noticed."""
        self.mapping = mapping

    def end(self) -> None:
        """Note that nothing is held that others could change."""
        self.mapping = self.mount = self.found = self.cover = self.found_cover = None
        self.is_mapping_doubted = False

    def compare(self, mounts: Sequence[Mount]) -> None:
        """Compare the mount with those that there are now."""
        if self.mount is None:
            return
        key, before = _key(self.mount), self.differs
        self.found = next((mount for mount in mounts if _key(mount) == key), None)
        self.found_cover = None if self.found is None else cover_of(mounts, self.found)
        if self.differs != before:
            self._wake()

    def mapping_changed(self, node: str) -> None:
        """Note that the kernel has changed or removed the mapping of this node."""
        if self.mapping is not None and self.mapping.node == node:
            self.doubt_mapping()

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

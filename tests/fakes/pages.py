"""Bytes of media and dirty pages of filesystems, for the kernel in memory.

A text stands for a file. It is dirty until its filesystem is written back; then it is where the
table of the mapping leads at that moment: on a medium, on another one, or nowhere.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from caam_hotplug.formats.crypt_table import CryptTarget
from caam_hotplug.model import Mount
from fakes.kernel import FakeKernel, FakeMapping


@dataclass
class Pages:
    """What was written by programs, and where it is now."""

    kernel: FakeKernel
    dirty: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What no medium has yet, by the DM-UUID of the mapping."""
    on_medium: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What each medium has, by the disk sequence number of its volume."""
    lost: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What no medium will have, by the volume that it was written to."""
    misplaced: list[str] = field(default_factory=list)
    """What has reached another medium, or its own under another key."""
    by_hand: bool = False
    """Whether a user writes back, who may do so through any table."""
    unknown_keys: set[str] = field(default_factory=set)
    """DM-UUIDs of mappings whose key was lost before the agent was started: it cannot know that."""
    agent_sees: bool = True
    """Whether an agent runs, which can know what is lost."""

    def __post_init__(self) -> None:
        self.kernel.written_back = self.write_back

    def write(self, mount: Mount, text: str) -> bool:
        """Write to the filesystem at this mount; return whether that can be done."""
        mapping = self._mapping_of(mount)
        if mapping is None or mount.read_only or mount.is_filesystem_read_only:
            return False
        self.dirty[mapping.uuid].append(text)
        return True

    def sync(self, mount: Mount) -> None:
        """Write back what a program syncs; it sees itself what fails."""
        mapping = self._mapping_of(mount)
        if mapping is not None and not mapping.is_suspended:
            before = len(self.lost[volume_of(mapping)])
            self.write_back(mapping, False)
            del self.lost[volume_of(mapping)][before:]

    def _mapping_of(self, mount: Mount) -> FakeMapping | None:
        mappings = self.kernel.mappings.values()
        return next((m for m in mappings if m.number == mount.number), None)

    def write_back(self, mapping: FakeMapping, fails: bool) -> None:
        """Have what is dirty on the mapping go where its table leads."""
        texts = self.dirty.pop(mapping.uuid, [])
        if not texts:
            return
        volume = volume_of(mapping)
        target = CryptTarget.from_line(mapping.live or "")
        if target is None and " linear " in (mapping.live or "") and not self.by_hand:
            self.misplaced += [f"{text} of {volume}, by {mapping.live}" for text in texts]
        if target is None or fails:
            if mapping.watches or not self.by_hand:  # else it is the user who sees it
                self._lose(volume, texts)
            return
        medium = self.kernel.unread.get(target.device) or self.kernel.medium(target.device)
        if medium is None:
            self._lose(volume, texts)
            return
        reached = f"{medium.volume.id}"
        is_known = mapping.uuid not in self.unknown_keys or reached != volume
        if (reached, medium.key) != (volume, mapping.key) and is_known and not self.by_hand:
            self.misplaced += [f"{text} of {volume} is on {reached}" for text in texts]
        self.on_medium[medium.volume.id.diskseq] += texts

    def _lose(self, volume: str, texts: list[str]) -> None:
        if self.agent_sees:
            self.lost[volume] += texts


def volume_of(mapping: FakeMapping) -> str:
    """Return disk sequence number and partition of the mapping's volume, from its DM-UUID."""
    return mapping.uuid.removeprefix("CAAM-HOTPLUG-")

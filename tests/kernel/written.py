"""What was written to media and has to be there in the end, read without the agent."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fakes.contract import until
from kernel import seen
from kernel.cartridges import KEY, Cartridge
from kernel.gadgets import Card
from kernel.witness import detach, run


class Written:
    """What each medium has to hold."""

    def __init__(
        self, media: Sequence[Cartridge], cards: Sequence[Card], *, untouched: Collection[str]
    ) -> None:
        """The media are out, and no agent runs. `untouched`: labels that nobody may write to."""
        self.files_checked = 0
        self._media: list[Cartridge | Card] = [*media, *cards]
        self._files: dict[str, dict[str, str]] = {medium.label: {} for medium in self._media}
        """Digests of synced files, by the medium's label."""
        with _plugged(media):
            self._outside = {medium.label: _outside(medium) for medium in self._media}
            self._untouched = {
                medium.label: _partition(medium)
                for medium in self._media
                if medium.label in untouched
            }

    def expect(self, label: str, name: str, content: bytes) -> None:
        """Require in the end that the file is on the medium."""
        self._files[label][name] = _digest(content)

    def may_be_written(self, label: str) -> bool:
        """Return whether anybody may write to the medium."""
        return label not in self._untouched

    def touched(self) -> list[str]:
        """Return the media that nobody may write to, and that are not as they were."""
        return [
            f"bytes of {medium.label}, which nobody may write to"
            for medium in self._media
            if medium.label in self._untouched
            and _partition(medium) != self._untouched[medium.label]
        ]

    def wrong(self) -> list[str]:
        """Return what is not on its medium, or is where nobody has written."""
        return [*self.touched(), *(text for each in self._media for text in self._wrong(each))]

    def _wrong(self, medium: Cartridge | Card) -> Iterator[str]:
        label, partition = medium.label, _partition(medium)
        if files := self._files[label]:
            with _decrypted(partition) as point:
                for name, digest in files.items():
                    self.files_checked += 1
                    file = point / name
                    if not file.exists() or _digest(file.read_bytes()) != digest:
                        yield f"{name} of {label}"
        if _outside(medium) != self._outside[label]:
            yield f"bytes of {label} outside its partition"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _partition(medium: Cartridge | Card) -> bytes:
    if isinstance(medium, Card):
        return medium.partition
    return Path(medium.partition).read_bytes()


def _outside(medium: Cartridge | Card) -> bytes:
    return medium.outside if isinstance(medium, Card) else seen.outside(medium)


@contextmanager
def _plugged(media: Sequence[Cartridge]) -> Iterator[None]:
    for medium in media:
        medium.plug()
    for medium in media:
        medium.settle()
    until(lambda: all(Path(medium.partition).exists() for medium in media))
    yield
    for medium in media:
        medium.pull()


@contextmanager
def _decrypted(partition: bytes) -> Iterator[Path]:
    """Mount a copy of the partition, by the key that it was made with; yield the place."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "copy"
        file.write_bytes(partition)
        sectors = file.stat().st_size // 512
        device = run("losetup", "-f", "--show", str(file)).strip()
        try:
            table = f"0 {sectors} crypt aes-cbc-plain {KEY.hex()} 0 {device} 0"
            run("dmsetup", "create", "copied", "--table", table)
            try:
                run("mount", "/dev/mapper/copied", "/mnt")
                yield Path("/mnt")
                run("umount", "/mnt")
            finally:
                run("dmsetup", "remove", "--retry", "copied")
        finally:
            detach(device)

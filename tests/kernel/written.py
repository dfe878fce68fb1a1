"""What was written to media and has to be there in the end, read without the agent."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fakes.contract import until
from kernel import seen
from kernel.cartridges import KEY, Cartridge
from kernel.witness import detach, run


class Written:
    """What each medium has to hold."""

    def __init__(self, media: Sequence[Cartridge]) -> None:
        """The media are out, and no agent runs."""
        self.files_checked = 0
        self._media = media
        self._files: dict[str, dict[str, str]] = {medium.label: {} for medium in media}
        """Digests of synced files, by the medium's label."""
        with _plugged(media):
            self._outside = {medium.label: seen.outside(medium) for medium in media}

    @property
    def count(self) -> int:
        """Number of files that are expected."""
        return sum(map(len, self._files.values()))

    def expect(self, label: str, name: str, content: bytes) -> None:
        """Require in the end that the file is on the medium."""
        self._files[label][name] = hashlib.sha256(content).hexdigest()

    def wrong(self) -> list[str]:
        """Return what is not on its medium, or is where nobody has written."""
        return [text for medium in self._media for text in self._wrong(medium)]

    def _wrong(self, medium: Cartridge) -> Iterator[str]:
        with _copied(medium) as point:
            for name, digest in self._files[medium.label].items():
                self.files_checked += 1
                file = point / name
                if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                    yield f"{name} of {medium.label}"
        if seen.outside(medium) != self._outside[medium.label]:
            yield f"bytes of {medium.label} outside its partition"


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
def _copied(medium: Cartridge) -> Iterator[Path]:
    """Mount a copy of the plugged medium, by the key that it was made with; yield the place."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "copy"
        file.write_bytes(Path(medium.partition).read_bytes())
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

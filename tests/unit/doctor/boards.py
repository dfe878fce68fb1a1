"""A board that is a folder of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from caam_hotplug.config.loader import Config
from caam_hotplug.doctor.board import Board
from caam_hotplug.doctor.result import Status, Verdict

RELEASE: Final = "6.6.52-lts-next"

Check = Callable[[Board], Iterator[Verdict]]


class BoardFiles:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, path: str, content: str | bytes = "") -> Path:
        """Write the file."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def board(self, config: Config | None = None, release: str = RELEASE) -> Board:
        return Board(config or Config(), root=self.root, release=release)

    def seen(self, check: Check, config: Config | None = None) -> list[Verdict]:
        """Return the check's verdicts."""
        return list(check(self.board(config)))

    def status(self, check: Check, config: Config | None = None) -> Status:
        """Return the status of the check's only verdict."""
        (verdict,) = self.seen(check, config)
        return verdict.status

    def runs(self, name: str, pid: int = 77, state: str = "S") -> None:
        self.has(f"/proc/{pid}/stat", f"{pid} ({name}) {state} 1 1 1")

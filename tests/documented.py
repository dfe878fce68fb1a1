"""Read from README and docs the commands that readers are to type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
PAGES: Final = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "tools/README.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
NO_COMMANDS: Final = {
    "medium plugged in": "a picture",
    "ready: 1 rules, events from udev": "the journal",
    "no rule matches it; it is left untouched": "output of explain",
    "agent/caam_hotplug/     the packages cli daemon volume provisioning doctor dbus": "the tree",
}
"""The first lines of blocks that have no language and yet no commands."""


@dataclass(frozen=True, slots=True)
class Block:
    """An indented or fenced block."""

    page: str
    heading: str
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def has_commands(self) -> bool:
        """Return whether readers are to type its lines. A language says if they are not."""
        first = next((line.strip() for line in self.lines if line.strip()), "")
        return self.language in {"", "sh", "console"} and first not in NO_COMMANDS

    def commands(self) -> Iterator[str]:
        """Yield each command without comments; of a session with `$ ` only what was typed."""
        text = "\n".join(self.lines).replace("\\\n", " ")
        typed = [line.strip() for line in text.splitlines()]
        if any(line.startswith("$ ") for line in typed):
            typed = [line[2:] for line in typed if line.startswith("$ ")]
        for line in typed:
            command = " ".join(re.sub(r"(^|\s+)# .*", "", line).split())
            if command:
                yield command


def blocks(page: Path) -> Iterator[Block]:
    """Yield all blocks of a page, with the heading above them."""
    name = str(page.relative_to(REPOSITORY))
    heading, before, fence, language = "", "", "", ""
    held: list[str] = []
    start = 0
    lines = [*page.read_text().splitlines(), ""]
    for number, line in enumerate(lines, 1):
        if fence:
            if line.strip() == fence:
                yield Block(name, heading, start, language, tuple(held))
                fence, held = "", []
            else:
                held.append(line)
        elif opening := re.match(r"\s*(```+)(.*)", line):
            fence, language, start = opening[1], opening[2].strip(), number + 1
        elif held and (line.startswith("    ") or not line.strip()):
            held.append(line)
        elif line.startswith("    ") and not before.strip():
            held, start = [line], number
        if held and not fence and (number == len(lines) or _ends(lines[number])):
            yield Block(name, heading, start, "", tuple(held))
            held = []
        if line.startswith("#") and not fence:
            heading = line.lstrip("#").strip()
        before = line


def _ends(following: str) -> bool:
    return bool(following.strip()) and not following.startswith("    ")


def commands(page: str, heading: str = "") -> list[str]:
    """Return a page's commands, below one heading or in all of it."""
    return [
        command
        for block in blocks(REPOSITORY / page)
        if block.has_commands and (not heading or block.heading == heading)
        for command in block.commands()
    ]

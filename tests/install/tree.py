"""The source tree that is installed, and copies of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
AGENT: Final = REPOSITORY / "agent" / "caam_hotplug"

_NOT_COPIED: Final = shutil.ignore_patterns("__pycache__", "*.egg-info")


def copied_to(folder: Path) -> Path:
    """A copy of all that an installation is made from, which a build may write into."""
    for name in ("agent", "config", "rules", "docs/man"):
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, folder / name, ignore=_NOT_COPIED)
    for name in ("LICENSE", "Makefile", "README.md", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def version() -> str:
    """The version that the program calls its own."""
    found = re.search(r'__version__ = "(.*)"', (AGENT / "__init__.py").read_text())
    assert found
    return found[1]


def files_below(folder: Path) -> set[str]:
    """Every file in the folder, by its path in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}

"""The agent's Debian package, built from this tree as `make deb` builds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from vm import cache

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PACKAGING: Final = REPOSITORY / "config" / "debian"
INSTALLED: Final = (
    "Makefile", "LICENSE", "agent", "config/*.*", "config/program", "config/completions",
    "config/debian", "rules", "docs/man",
)  # fmt: skip
"""Files that distinguish packages in a guest; it has no /usr/share/doc."""


def package() -> Path:
    """Return the .deb, from the cache or built now.

    Raises: subprocess.CalledProcessError if it cannot be built; stderr has the reason.
    """
    with cache.locked():
        folder = cache.built(
            "deb",
            cache.key_of(key(), REPOSITORY / "CHANGELOG.md"),
            lambda folder: make(REPOSITORY, folder),
            says="Building the Debian package",
        )
    (built,) = folder.glob("*.deb")
    return built


def make(tree: Path, folder: Path) -> None:
    """Build the .deb of this tree in the folder, with the cache locked."""
    bundled = cache.built(
        "bundled",
        cache.key_of(PACKAGING / "bundled.txt", PACKAGING / "fetch-bundled"),
        lambda folder: _run(PACKAGING / "fetch-bundled", folder, _architecture()),
        says="Fetching the Python packages that go into the Debian package (once)",
    )
    _run(tree / "config/debian/make-deb", folder, _architecture(), bundled)


def key() -> str:
    """Return the digest of what is installed in a guest: every file with its name and mode."""
    named = (path for pattern in INSTALLED for path in sorted(REPOSITORY.glob(pattern)))
    files = (file for path in named for file in ([path] if path.is_file() else path.rglob("*")))
    return cache.key_of(
        *(
            part
            for file in sorted(files)
            if file.is_file() and file.suffix != ".pyc"
            for part in (f"{file.relative_to(REPOSITORY)} {file.stat().st_mode:o}", file)
        )
    )


def _architecture() -> str:
    asked = subprocess.run(["dpkg", "--print-architecture"], stdout=subprocess.PIPE, check=True)
    return asked.stdout.decode().strip()


def _run(*command: str | Path) -> None:
    subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, check=True)

"""A cache of slow builds, each under a key of everything it was built from."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Ingredient = str | bytes | Path


def root() -> Path:
    """Return the cache's folder, outside the tree so that a fresh clone finds it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "caam-hotplug"


@contextmanager
def locked() -> Iterator[None]:
    """Let only one process build or read the cache at a time; others wait and say so."""
    root().mkdir(parents=True, exist_ok=True)
    with (root() / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another run builds the test bed; waiting ...", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in root().glob(".*-*"):  # of a build that was killed
            forget(leftover)
        yield


def key_of(*ingredients: Ingredient) -> str:
    """Return a short digest; a folder or file counts with its contents."""
    digest = hashlib.sha256()
    for ingredient in ingredients:
        for part in _bytes_of(ingredient):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _bytes_of(ingredient: Ingredient) -> Iterator[bytes]:
    match ingredient:
        case str():
            yield ingredient.encode()
        case bytes():
            yield ingredient
        case Path() if ingredient.is_dir():
            for file in sorted(ingredient.iterdir()):
                if file.is_file():
                    yield file.name.encode()
                    yield file.read_bytes()
        case Path():
            yield ingredient.read_bytes()


def built(name: str, key: str, build: Callable[[Path], None], *, says: str) -> Path:
    """Return the folder that `build` filled: from the cache, or built now with a terminal line.

    A folder is renamed into place when it is complete, and contains the sizes of its files. If
    it is truncated later, it is built again. Older folders of the same name are removed.
    """
    folder = root() / f"{name}-{key}"
    if _is_whole(folder):
        os.utime(folder)
        return folder
    if folder.exists():
        print(f"{folder} is damaged and will be built again", file=sys.stderr, flush=True)
    forget(folder)
    began = time.monotonic()
    print(f"{says} ...", file=sys.stderr, flush=True)
    making = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root()))
    try:
        build(making)
        (making / ".sizes").write_text(_sizes(making))
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    print(f"    done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    _prune(name)
    return folder


def forget(folder: Path) -> None:
    """Remove the folder from the cache, so that it is built again."""
    shutil.rmtree(folder, ignore_errors=True)


def _sizes(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.name != ".sizes" and path.is_file())
    return "".join(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in files)


def _is_whole(folder: Path) -> bool:
    record = folder / ".sizes"
    return record.exists() and record.read_text() == _sizes(folder)


def _prune(name: str, keep: int = 6) -> None:
    folders = [path for path in root().glob(f"{name}-*") if len(path.name) == len(name) + 17]
    by_age = sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in by_age[keep:]:
        forget(folder)

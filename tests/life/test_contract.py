"""The fake kernel keeps the contract that the real one keeps in tests/kernel/test_contract.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caam_hotplug.model import DeviceNumber
from fakes.by_hand import ByHand
from fakes.contract import *  # noqa: F403  the suite
from fakes.contract import DAMAGED_BLOB, OTHER_BLOB, World
from fakes.kernel import FakeKernel, FakeMapping, HangsError


class FakeWorld:
    """Fake kernel with a medium in it."""

    def __init__(self) -> None:
        self.fake = FakeKernel()
        self.volume = self.fake.insert()
        self.fake.blobs[OTHER_BLOB] = b"another tagged key".ljust(48)
        self.fake.blobs[DAMAGED_BLOB] = b"foreign"
        self.kernel = self.fake.start_process()
        self._by_hand = ByHand(self.fake)
        self._changes: set[str] = set()
        self.fake.mounts_changed = lambda: self._changes.add("mounts")
        self.fake.mapping_changed = self._changes.add

    def reads_as_written(self, node: str) -> bool:
        return self.fake.reads_as_written(node)

    @contextmanager
    def held(self, node: str) -> Iterator[None]:
        self.fake.by_node(node).holders += 1
        yield
        self.fake.close_holders()

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self.fake.users[name] = 1
        yield
        self.fake.close_holders()

    @contextmanager
    def directory(self, name: str, *, content: bool) -> Iterator[None]:
        kind = self.fake.directories[name] = "content" if content else "board"
        yield
        assert self.fake.directories[name] == kind
        self.fake.free_mount_point(name)

    @contextmanager
    def foreign_mapping(self) -> Iterator[None]:
        number = DeviceNumber(253, 77)
        self.fake.mappings["foreign"] = FakeMapping("foreign", "OTHER-1", number, "0 8 zero")
        yield
        del self.fake.mappings["foreign"]

    def changes(self) -> set[str]:
        found = set(self._changes)
        self._changes.clear()
        return found

    def umount(self, name: str, *, lazily: bool = False) -> None:
        self._by_hand.umount(str(self.kernel.mount_root / name), lazily=lazily)

    def remount(self, name: str, *, read_only: bool, filesystem: bool) -> None:
        point = str(self.kernel.mount_root / name)
        self._by_hand.remount(point, read_only=read_only, filesystem=filesystem)

    @property
    def folder(self) -> Path:
        return Path("/srv")

    @contextmanager
    def unsafe(self, folder: Path) -> Iterator[None]:
        words = f"{folder} can be written by others than root; chmod go-w {folder}"
        self.fake.unsafe_folders[folder] = f"open {folder}: {words}"
        yield
        self.fake.make_safe(folder)

    @contextmanager
    def over_root(self) -> Iterator[None]:
        self._by_hand.cover(str(self.kernel.mount_root))
        yield
        self._by_hand.umount(str(self.kernel.mount_root))

    def suspend(self, name: str) -> None:
        self._by_hand.suspend(self.fake.mappings[name])

    @contextmanager
    def waiting(self, call: Callable[[], object]) -> Iterator[None]:
        with pytest.raises(HangsError):
            call()
        yield
        call()

    def load_zeros(self, name: str) -> None:
        self._by_hand.load(self.fake.mappings[name], "0 32768 zero")


@pytest.fixture
def world() -> Iterator[World]:
    """World in memory, with nothing left in it afterwards."""
    made = FakeWorld()
    yield made
    assert made.fake.leftovers() == []

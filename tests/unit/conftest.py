"""The same examples in every run, and no deadline on a machine that does other things too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from unit.partition_workshop import PartitionWorkshop, prepared_partition
from unit.workshop import MigrationWorkshop, Workshop, prepared, prepared_to_migrate

settings.register_profile("unit", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("unit")


@pytest.fixture
def roots_folder() -> Iterator[Path]:
    """A directory that only root could change, as /etc is and pytest's own below /tmp are not.

    Only root can make it, so these tests need root, as the suite in the virtual machine does.
    """
    with tempfile.TemporaryDirectory(prefix="caam-hotplug-test-", dir="/run") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def workshop(roots_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Where media are made of images."""
    return prepared(roots_folder, monkeypatch)


@pytest.fixture
def migration_workshop(roots_folder: Path, monkeypatch: pytest.MonkeyPatch) -> MigrationWorkshop:
    """Where images are migrated."""
    return prepared_to_migrate(roots_folder, monkeypatch)


@pytest.fixture(params=["gpt", "dos"])
def partition(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> PartitionWorkshop:
    """A partition of a disk with a table of each kind."""
    return prepared_partition(workshop, request.param, monkeypatch)


@pytest.fixture
def gpt_partition(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> PartitionWorkshop:
    """A partition in a GPT."""
    return prepared_partition(workshop, "gpt", monkeypatch)


@pytest.fixture
def mbr_partition(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> PartitionWorkshop:
    """A partition in an MBR."""
    return prepared_partition(workshop, "dos", monkeypatch)

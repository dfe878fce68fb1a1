"""Media made of images, with a CAAM that wraps nothing: what `provision` decides, without a kernel.

A mapping is a file for each key, so a filesystem is found under the key that it was made with only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from caam_hotplug.config import loader
from caam_hotplug.formats import blobs
from caam_hotplug.formats.blobs import Backend, Blob
from caam_hotplug.kernel import (
    caam,
    config_files,
    device_users,
    disks,
    gpt,
    keyring,
    memory,
    mount,
    mountinfo,
    sysfs,
    trusted,
)
from caam_hotplug.keys import backends, store
from caam_hotplug.keys.backends import SealMethod
from caam_hotplug.model import (
    Bus,
    DeviceNumber,
    DevType,
    Mapping,
    SecretBytes,
    Sectors,
    Volume,
    VolumeId,
)
from caam_hotplug.provisioning import (
    marked_partition,
    medium_blocks,
    migrate,
    migration_journal,
    provision,
    rule_file,
    temporary_mapping,
    volume_lookup,
)
from caam_hotplug.provisioning.migration_plan import MediumToMigrate, MigrationPlan
from caam_hotplug.provisioning.options import MigrateOptions, ProvisionOptions
from caam_hotplug.provisioning.provision_plan import ProvisionPlan
from caam_hotplug.provisioning.reencryption import Journal, Record

LABEL: Final = "cartridge-01"
_MAGIC: Final = 0x5461674F
_BYTES: Final = 24 << 20


class Workshop:
    """Where media are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "caam"
        self.blob = self.blobs / f"{LABEL}.bb"
        self.recovery = folder / "recovery"
        self.config_file = folder / "agent.toml"
        self.config_file.write_text(f'blob_directory = "{self.blobs}"\n')
        self.steps: list[str] = []
        """The steps that were reported."""

    def medium(self, name: str = "blank.img") -> Path:
        """An image that was never written to."""
        with (self.folder / name).open("xb") as file:
            file.truncate(_BYTES)
        return self.folder / name

    def options(self, medium: Path, **more: Any) -> ProvisionOptions:
        """The options of `provision` for the medium. `more`: fields, and options of the rule."""
        choices = {k: more.pop(k) for k in ("cipher", "sector_size") if k in more}
        rule, text = rule_file.rule_for(more.pop("label", LABEL), **choices)
        return ProvisionOptions(
            device=str(medium),
            rule=rule,
            rule_text=text,
            config_file=self.config_file,
            **{"key_bytes": 16, "method": SealMethod(backend="tagged"), **more},
        )

    def config(self) -> loader.Config:
        """The configuration as it is in its files now."""
        return loader.load(self.config_file, config_files.RootsFiles())

    def make(self, medium: Path, **more: Any) -> provision.ProvisionResult:
        """`provision` the medium. `more`: as for `options`."""
        options = self.options(medium, **more)
        return provision.provision(options, self.config(), self.steps.append, self.announce)

    def plan(self, medium: Path, **more: Any) -> ProvisionPlan:
        """`provision --dry-run` of the medium. `more`: as for `options`."""
        options = self.options(medium, **more)
        return provision.dry_run(options, self.config(), self.steps.append)

    def contents(self) -> dict[str, tuple[int, bytes]]:
        """Everything in the folder: modes, and the files' bytes."""
        return {
            str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in self.folder.rglob("*")
        }

    def drop_in(self, name: str, text: str = "") -> Path:
        """A file of that name among the rules, which is there if it has a text."""
        file = self.folder / "rules.d" / name
        if text:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return file

    def announce(self) -> list[str]:
        """What is done when a rule was written."""
        return ["announced"]

    def identity(self, medium: Path) -> gpt.Identity:
        """What the medium's one partition says of itself."""
        with medium.open("rb") as file:
            entries = gpt.read(file.fileno(), str(medium))
        assert entries is not None
        (entry,) = entries
        return entry.identity

    def key(self) -> bytes:
        """The key in the label's blob, which this CAAM has not wrapped."""
        return self.blob.read_bytes()[20:36]


def disk_of(medium: Path) -> Volume:
    """The image as a disk."""
    return Volume(
        id=VolumeId(7, 0),
        name=f"..{medium}",
        number=DeviceNumber(7, 77),
        devtype=DevType.DISK,
        size=Sectors(medium.stat().st_size // 512),
        bus=Bus.USB,
        removable=True,
        read_only=False,
    )


class _Held(disks.Held):
    """An image, which has neither device number nor medium."""

    def require_same(self, opened: int) -> None:
        assert opened >= 0


@contextmanager
def _held(disk: Volume) -> Iterator[disks.Held]:
    hold = _Held(disk, os.open(disk.node, os.O_RDONLY))
    try:
        yield hold
    finally:
        hold.close()


def _blob(_device: Path, seal: str, key: int | SecretBytes) -> bytes:
    wrapped = os.urandom(key) if isinstance(key, int) else bytes(key.buffer)
    content = wrapped + bytes(48)
    kind = 9 if seal == "ccm" else 1
    return struct.pack("=5I", _MAGIC, 0, kind, len(wrapped), len(content)) + content


class _File(Mapping):
    """A mapping whose name is the file that stands for it."""

    @property
    def node(self) -> str:
        return self.name


@contextmanager
def _through_key(
    hold: disks.Held, _purpose: str, entry: gpt.Entry, *, blob: Blob, **_more: Any
) -> Iterator[Mapping]:
    """A file for each key stands for the partition under that key."""
    key = hashlib.sha256(blob.content).hexdigest()[:8]
    plain = Path(f"{hold.disk.node}.{key}")
    if not plain.exists():
        with plain.open("xb") as made:
            made.truncate(entry.length * 512)
    yield _File(str(plain), "", DeviceNumber(7, 78), (), 0)


class MigrationWorkshop(Workshop):
    """Where media are migrated. Only the kernel tests move them piece by piece."""

    def made(self) -> Path:
        """A medium under a tagged key."""
        medium = self.medium()
        self.make(medium)
        disk = disk_of(medium)
        self.partition = replace(
            disk, id=VolumeId(disk.id.diskseq, 1), devtype=DevType.PARTITION, partlabel=LABEL
        )
        return medium

    def plan_migration(self, to: Backend, **more: Any) -> MigrationPlan:
        """`migrate --dry-run` of the medium to such a key. `more`: fields of the options."""
        options = MigrateOptions(volume=LABEL, method=SealMethod(backend=to), key_bytes=64, **more)
        return migrate.dry_run(options, self.config(), self.steps.append)

    def migrate(self, to: Backend, **more: Any) -> migrate.MigrateResult:
        """`migrate` the medium to such a key. `more`: fields of the options."""
        options = MigrateOptions(volume=LABEL, method=SealMethod(backend=to), key_bytes=64, **more)
        return migrate.migrate(options, self.config(), self.steps.append, nothing)

    def journal(self, moved_bytes: int = 0) -> Path:
        """A journal of the medium, which is marked if bytes of it were moved."""
        medium = self.plan_migration("trusted").medium
        entry = medium.entry
        head = migration_journal.Head(
            mark=uuid4(),
            name=entry.identity.name,
            type=entry.identity.type,
            uuid=entry.identity.uuid,
            start=entry.start,
            length=entry.length,
            blob=medium.blob_name,
            before="tagged",
            after="trusted",
            old_blob=medium.old.content,
            new_blob=b"ab" * 60,
            how=medium.settings,
            recovery_file=None,
        )
        with store.folder(self.blobs) as folder:
            migration_journal.create(folder.opened, self.blobs, head)
        if moved_bytes:
            with migration_journal.opened(self.blobs, head) as migration:
                migration.journal.note(Record(1, moved_bytes, b"a piece"))
            with open(self.partition.node, "r+b") as file:
                marked = marked_partition.migrating(head.mark)
                gpt.rename(file.fileno(), self.partition.node, entry.number, marked)
        return migration_journal.file(self.blobs, head)


def _try_method(*_disk: object, method: SealMethod, key_bytes: int, **_more: Any) -> Blob:
    """Such a blob is sealed, and nothing is done with it."""
    sealed = backends.BACKENDS[method.backend].seal(method, key_bytes, Path())
    return blobs.parse(sealed, method.backend)


def _sealed(key: int | SecretBytes, *_method: object) -> bytes:
    return os.urandom((key if isinstance(key, int) else len(key)) + 48).hex().encode()


def _encrypted(key: int | SecretBytes, *_method: object) -> bytes:
    return b"default trusted:master 64 " + _sealed(key)


def _moved(
    _medium: MediumToMigrate,
    _hold: disks.Held,
    mappings: tuple[Mapping, Mapping],
    journal: Journal,
    _count: migrate.Count,
) -> None:
    """All bytes move at once."""
    before, after = (Path(mapping.node) for mapping in mappings)
    shutil.copyfile(before, after)
    journal.note(Record(1, 0, b"a piece"))
    journal.note(Record(2, after.stat().st_size, b""))


def nothing(*_arguments: object, **_more: object) -> None:
    """What only a kernel could do is taken as done."""


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop in the folder of root's; nothing outside of it is touched."""
    monkeypatch.setattr(caam, "create_blob", _blob)
    monkeypatch.setattr(disks, "whole_disk", lambda device: disk_of(Path(device)))
    monkeypatch.setattr(disks, "held", _held)
    monkeypatch.setattr(rule_file, "_known_to_udev", lambda disk, _config: disk)
    monkeypatch.setattr(temporary_mapping, "through_key", _through_key)
    monkeypatch.setattr(temporary_mapping, "try_method", _try_method)
    for module, name in (
        (disks, "require_not_the_systems"), (disks, "read_partitions"),
        (device_users, "require_unused"), (sysfs, "require_diskseq"), (memory, "refuse_core_dumps"),
        (keyring, "join_session_keyring"), (temporary_mapping, "remove_leftovers"),
        (temporary_mapping, "require_no_leftovers"), (temporary_mapping, "try_blob"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, nothing)
    return Workshop(folder)


def prepared_to_migrate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> MigrationWorkshop:
    """A workshop as `prepared` makes it, in which media can be migrated as well."""
    prepared(folder, monkeypatch)
    workshop = MigrationWorkshop(folder)
    monkeypatch.setattr(volume_lookup, "find_partition", lambda *_: workshop.partition)
    monkeypatch.setattr(disks, "disk_of", lambda volume: disk_of(Path(volume.node)))
    monkeypatch.setattr(disks, "logical_block", lambda _disk: 512)
    monkeypatch.setattr(mountinfo, "why_volatile", lambda _directory: None)
    monkeypatch.setattr(mount, "require_readable", nothing)
    monkeypatch.setattr(trusted, "is_offered", lambda *_kind: True)
    monkeypatch.setattr(trusted, "seal_trusted", _sealed)
    monkeypatch.setattr(trusted, "seal_encrypted", _encrypted)
    monkeypatch.setattr(backends, "_master", nothing)
    monkeypatch.setattr(migrate, "_reencrypt", _moved)
    monkeypatch.setattr(medium_blocks, "_DIRECT", os.O_CLOEXEC)  # not every tmpfs has direct I/O
    return workshop

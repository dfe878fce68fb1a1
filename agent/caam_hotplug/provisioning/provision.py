"""A medium is made: key, partition table, filesystem. Interrupted anywhere, a second run goes on.

What has been done so far is read off the blob directory and the medium, in this order:

    blob of the label           medium                       the next run
    none, or not settled yet    as it was, or half a table   begins anew
    there                       marked for that very blob    goes on with it
    there                       the label, and a filesystem  finds it made
                                under the blob's key

A blob is on the disk before the medium is touched. It is not settled (it has a second, temporary
name) until the medium bears the mark; so one that is not settled can be taken back, and one that is
settled is never touched again. The mark is a partition with a type of its own, which no rule
matches, and says by its identifier which label, blob and recovery file the medium was begun
with; to write the label in its place is the last act.

A recovery file is written before the blob, and is not settled until the medium bears the mark. So
one that is there is of a run that was interrupted, and its key is used, or it is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4, uuid5

from caam_hotplug import names
from caam_hotplug.config.loader import Config
from caam_hotplug.errors import (
    BlobError,
    BlobRejectedError,
    HotplugError,
    shown,
)
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import (
    blkid,
    blob_files,
    device_users,
    disks,
    gpt,
    keyring,
    memory,
    mkfs,
    udev,
)
from caam_hotplug.keys import sealing, store
from caam_hotplug.model import SecretBytes, Sectors, Volume
from caam_hotplug.provisioning import temporary_mapping
from caam_hotplug.provisioning.options import (
    LINUX_DATA,
    Wish,
    advice,
    require_rule_decides,
    require_sense,
    write_rule,
)

Tell = Callable[[str], None]
"""Told of each step that begins."""

MARK: Final = UUID(names.UNFINISHED_TYPE)
"""The partition type of a medium that is not finished, and the namespace of its identifiers."""
MARKED_NAME: Final = "(caam-hotplug: not finished)"
"""A label for people, with blanks and parentheses; by the type no rule matches it."""


@dataclass(frozen=True, slots=True)
class Made:
    """The medium as it is now."""

    partition: str
    """Its device node, once the disk has been read anew."""
    blob: Path
    was_made_before: bool
    recovery_file: Path | None
    """The one that this run wrote or used; None if it did neither."""
    notes: tuple[str, ...]
    """What else there is to do, or to know."""


class _Stage(Enum):
    """How far the medium is."""

    OTHERS = "others"
    ANOTHER = "begun with another label, key or recovery file"
    MARKED = "marked"
    MADE = "made"


def provision(wish: Wish, config: Config, tell: Tell, announce: Callable[[], list[str]]) -> Made:
    """The medium is labelled, encrypted under a blob of this board, and has a filesystem.

    `announce` has a running agent read a new rule, and says what came of that. It is called while
    the medium has no label yet, or the agent would open it by the rules that it had before.
    Raises: HotplugError, and then the medium is what it was, or one that the same call completes.
    """
    if os.geteuid() != 0:
        raise HotplugError(f"provision {shown(wish.device)}: it needs to be root; use sudo")
    udev.require_diskseq()
    gpt.require_library()
    memory.refuse_core_dumps()
    keyring.join_session_keyring()
    os.umask(0o022)
    disk = disks.whole_disk(wish.device)
    require_sense(wish, config, disk)
    disks.require_not_the_systems(disk, config.blob_directory)
    tell(f"looking at {disk.node}")
    with disks.held(disk) as hold:
        temporary_mapping.remove_leftovers(disk)
        device_users.require_unused(disk)
        marks = _marks(wish.label, _identifier(wish), config.blob_directory)
        stage, entry = _stage(gpt.read(hold.reading, disk.node), wish.label, marks)
        if stage in {_Stage.OTHERS, _Stage.ANOTHER}:
            _require_blank(wish, disk, stage)
        require_rule_decides(wish, config, disk)
        _try_table(wish, disk, config.blob_directory)
        with store.folder(config.blob_directory) as folder:
            making = _Making(wish, hold, folder, tell)
            was_made_before = entry is not None and stage is _Stage.MADE and making.is_made(entry)
            if entry and was_made_before:
                making.require_made_so()
                partition, uuid = entry, entry.identity.uuid
            else:
                if stage is _Stage.MADE:  # but not under our blob
                    _require_blank(wish, disk, stage)
                partition = making.begun(entry if stage is _Stage.MARKED else None)
                uuid = uuid4()
                making.format(partition)
            notes = [*making.notes, *write_rule(wish, config), *advice(wish, config, disk)]
            if wish.rule_file is not None:
                notes += announce()
            making.finish(partition.number, uuid)
        return Made(
            partition=_partition_node(disk),
            blob=folder.file(wish.label),
            was_made_before=was_made_before,
            recovery_file=None if was_made_before else wish.recovery_file,
            notes=tuple(notes),
        )


def _identifier(wish: Wish) -> str | None:
    """That of the recovery file, if a run before this one has written it."""
    file = wish.recovery_file
    if file is None or not os.path.lexists(file):
        return None
    with store.recovered_for(file, wish.about, wish.key_bytes) as (identifier, _):
        return identifier


def _mark(label: str, identifier: str | None, blob: blobs.Blob) -> UUID:
    """The identifier of a partition that is not finished: it says what it was begun with."""
    file = [] if identifier is None else [identifier]
    return uuid5(MARK, " ".join([label, *file, sha256(blob.content).hexdigest()]))


def _marks(label: str, identifier: str | None, directory: Path) -> frozenset[UUID]:
    """Those of a medium that was begun with the label's blob, if there is one to go on with."""
    try:
        blob = _blob_in(directory / f"{label}.bb")
    except BlobError:  # it is told of when a key is made
        return frozenset()
    return frozenset({_mark(label, None, blob), _mark(label, identifier, blob)})


def _stage(
    entries: tuple[gpt.Entry, ...] | None, label: str, marks: frozenset[UUID]
) -> tuple[_Stage, gpt.Entry | None]:
    """How far the medium is, by its partition table, and its one partition if it is ours."""
    if entries is not None and len(entries) == 1:
        identity = entries[0].identity
        if identity.type == MARK:
            return (_Stage.MARKED if identity.uuid in marks else _Stage.ANOTHER), entries[0]
        if (identity.type, identity.name) == (LINUX_DATA, label):
            return _Stage.MADE, entries[0]
    return _Stage.OTHERS, None


def _require_blank(wish: Wish, disk: Volume, stage: _Stage) -> None:
    found = blkid.known_contents(disk.node)
    if stage is _Stage.ANOTHER:
        found = f"a medium that is not finished, {stage.value}"
    if found is not None and wish.erase is None:
        raise HotplugError(
            f"provision {disk.node}: it holds {found}; if all of it may be lost, say so with "
            f"--erase {disk.name}"
        )


class _Making:
    """The steps, once it is certain that they may be taken."""

    def __init__(self, wish: Wish, hold: disks.Held, folder: store.Folder, tell: Tell) -> None:
        self._wish = wish
        self._hold = hold
        self._disk = hold.disk
        self._folder = folder
        self._tell = tell
        self.notes: list[str] = []
        """What the user is to know of what was found."""

    def is_made(self, entry: gpt.Entry) -> bool:
        """Whether the filesystem lies on the partition, under the key of the label's blob."""
        if not self._folder.has(self._wish.label):
            return False
        try:
            with self._mapped(entry) as node:
                return blkid.probe(node, [self._wish.filesystem]) is not None
        except (BlobError, BlobRejectedError):
            return False

    def require_made_so(self) -> None:
        """Raises: HotplugError if it was made with other options, or there is no recovery file."""
        wish, what = self._wish, f"provision {self._disk.node}"
        self._require_choices(what, "made", "use the same")
        file = wish.recovery_file
        if file is None:
            return
        if not os.path.lexists(file):
            raise HotplugError(
                f"{what}: it was made before, {shown(file)} is not there, and a blob does not tell "
                "its key; leave out --recovery-key, or make it anew under another label, with "
                f"--erase {self._disk.name}"
            )
        self.notes.append(
            f"{shown(file)} was there before; whether its key is the medium's was not checked"
        )

    def begun(self, marked: gpt.Entry | None) -> gpt.Entry:
        """The medium is marked as one that is not finished, and its blob is settled.

        Raises: HotplugError if there is a blob already, and the medium was not begun with it, or
        with other options; BlobError.
        """
        wish, folder = self._wish, self._folder
        if marked is not None:
            self._require_the_same(marked)
            self._settle()
            return marked
        if not folder.is_unsettled(wish.label):
            store.require_new(wish.label, folder)
        if wish.recovery_file is not None:
            store.require_recovery_unsettled(wish.recovery_file)
        self._tell("making the key")
        folder.discard_unsettled(wish.label)
        with self._key() as (identifier, key):
            blob = sealing.seal(wish.method, key, folder.path)
        folder.write(wish.label, blob, settled=False)
        self._tell("writing the partition table")
        begun = _mark(wish.label, identifier, _blob_in(folder.file(wish.label)))
        mark = gpt.Identity(MARKED_NAME, MARK, begun)
        entry = gpt.make(self._hold.writing(), self._disk.node, mark)
        self._settle()
        return entry

    def _settle(self) -> None:
        """The medium relies on its blob, and on its recovery file if it has one."""
        self._folder.settle(self._wish.label)
        if self._wish.recovery_file is not None:
            store.settle_recovery(self._wish.recovery_file)

    @contextmanager
    def _key(self) -> Iterator[tuple[str | None, int | SecretBytes]]:
        """The length of a key that only the CAAM will know; or a recovery file's identifier, and
        the key in it."""
        wish, file = self._wish, self._wish.recovery_file
        if file is None:
            yield None, wish.key_bytes
            return
        with store.recovery_key(file, wish.about, wish.key_bytes) as (identifier, key, was_left):
            if was_left:  # what it says is true of whatever its key is used for
                self.notes.append(
                    f"the key is that in {shown(file)}, of a run that was interrupted"
                )
            yield identifier, key

    def _require_the_same(self, marked: gpt.Entry) -> None:
        """Raises: HotplugError if the medium was begun with another key, or other options."""
        wish, file = self._wish, self._folder.file(self._wish.label)
        if marked.identity.uuid not in _marks(wish.label, _identifier(wish), self._folder.path):
            # Only now nobody else is at work in the folder.
            raise HotplugError(
                f"go on with {self._disk.node}: its key was replaced meanwhile; try again"
            )
        anew = f"remove {shown(file)} and add --erase {self._disk.name} to begin anew"
        self._require_choices(f"go on with {self._disk.node}", "begun", f"use the same, or {anew}")
        without = _mark(wish.label, None, _blob_in(file))
        if wish.recovery_file is not None and marked.identity.uuid == without:
            raise HotplugError(
                f"go on with {self._disk.node}: it was begun without {shown(wish.recovery_file)}, "
                f"and a blob does not tell its key; {anew}"
            )

    def _require_choices(self, what: str, done: str, remedy: str) -> None:
        """Raises: HotplugError if the blob was made with other options."""
        blob = _blob_in(self._folder.file(self._wish.label))
        before, asked = _choices(blob), _wished(self._wish, blob)
        if before != asked:
            raise HotplugError(f"{what}: it was {done} with {before}, not with {asked}; {remedy}")

    def format(self, entry: gpt.Entry) -> None:
        """The filesystem is on the medium, under the key of the blob as it is stored."""
        wish = self._wish
        self._tell(f"making the filesystem ({wish.filesystem})")
        with self._mapped(entry) as node:
            mkfs.make(wish.filesystem, wish.label, node)
            device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(device)
            finally:
                os.close(device)
            if blkid.probe(node, [wish.filesystem]) is None:
                raise HotplugError(
                    f"provision {self._disk.node}: what was written does not read as "
                    f"{wish.filesystem}; is the medium damaged?"
                )

    def finish(self, number: int, uuid: UUID) -> None:
        """The medium has its label; the kernel has been told, or udevd will be.

        One that had it before may have it in one copy of its table only.
        """
        self._tell("writing the label")
        identity = gpt.Identity(self._wish.label, LINUX_DATA, uuid)
        gpt.rename(self._hold.writing(), self._disk.node, number, identity)
        disks.read_partitions(self._hold)

    @contextmanager
    def _mapped(self, entry: gpt.Entry) -> Iterator[str]:
        """The device node of the partition's mapping. Raises: HotplugError for another medium.

        The mapping lies on the whole disk: the kernel need not know the partition yet.
        """
        file = self._folder.file(self._wish.label)
        blob = _blob_in(file)
        volume = replace(self._disk, size=entry.length)
        with temporary_mapping.mapping(self._disk, "provision") as name:
            temporary_mapping.load(
                name,
                volume,
                self._wish.rule.key,
                self._wish.rule.crypt,
                blob,
                start=entry.start,
                directory=self._folder.path,
            )
            yield temporary_mapping.activate(name, self._hold, "provision").node


def _blob_in(file: Path) -> blobs.Blob:
    """The blob in a file. Raises: BlobError."""
    return blob_files.read(file.parent, file.name)


def _choices(blob: blobs.Blob) -> str:
    """The options of the command that made it, as far as the blob tells them."""
    backend = blobs.backend_of(blob)
    match blob:
        case blobs.Tagged():
            return _options(backend, blob.key_bytes, f"--seal {blob.seal}")
        case blobs.Encrypted():
            return _options(backend, blob.key_bytes, f"--master {blob.master}")
    return _options(backend, blob.key_bytes)


def _wished(wish: Wish, blob: blobs.Blob) -> str:
    """The same of what is wished for now, without a length that the blob does not tell."""
    method, key_bytes = wish.method, None if blob.key_bytes is None else wish.key_bytes
    match method.backend:
        case "tagged":
            return _options(method.backend, key_bytes, f"--seal {method.seal}")
        case "encrypted":
            return _options(method.backend, key_bytes, f"--master {method.master}")
    return _options(method.backend, key_bytes)


def _options(backend: blobs.Backend, key_bytes: int | None, *more: str) -> str:
    length = [] if key_bytes is None else [f"--key-bytes {key_bytes}"]
    return " ".join([f"--backend {backend}", *length, *more])


def _try_table(wish: Wish, disk: Volume, directory: Path) -> None:
    """The kernel takes the cipher with such a key. Nothing is written, and the key is forgotten.

    Raises: CaamError; KeyringError; DmError.
    """
    blob = blobs.parse(sealing.seal(wish.method, wish.key_bytes, directory), wish.method.backend)
    with temporary_mapping.mapping(disk, "provision") as name:
        key, crypt = wish.rule.key, wish.rule.crypt
        temporary_mapping.load(name, disk, key, crypt, blob, start=Sectors(0), directory=directory)


def _partition_node(disk: Volume) -> str:
    return f"{disk.node}{'p' if disk.name[-1].isdigit() else ''}1"

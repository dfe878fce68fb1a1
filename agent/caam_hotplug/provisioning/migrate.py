"""A medium goes to a key of another kind. Interrupted anywhere, a second run goes on.

What has been done so far is read off the journal, a file beside the blobs, and the medium:

    journal                         medium                      the next run
    none, or with the first record  as it was                   begins
    there                           marked as it says           goes on
    there, with its last record     as it was                   ends it

The journal is on the board's disk before the medium is touched. The first that is done to that is
the mark, by which no rule matches it, here or elsewhere: a partition type of its own, and an
identifier that only this journal has. Then its bytes go from key to key (`reencryption`). The last
three acts are to put the new blob in the place of the old one, which is kept under another name, to
give the partition back what it said of itself, and to remove the journal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from caam_hotplug import names
from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import Plan, Rule, match_rules
from caam_hotplug.errors import (
    BlobMissingError,
    DeviceInUseError,
    HotplugError,
    KernelError,
    UnsupportedVolumeError,
    shown,
)
from caam_hotplug.formats import blobs, crypt_table, recovery_files
from caam_hotplug.kernel import (
    atomic_files,
    blkid,
    blob_files,
    device_users,
    disks,
    gpt,
    keyring,
    memory,
    mount,
    mountinfo,
    sysfs,
    udev,
)
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.keys import sealing, store
from caam_hotplug.model import SECTOR_BYTES, DevType, Mapping, Volume
from caam_hotplug.provisioning import migration_journal, reencryption, temporary_mapping

MARK: Final = UUID(names.UNFINISHED_TYPE)
MARKED_NAME: Final = "(caam-hotplug: migrating)"
"""A label for people, with blanks and parentheses; by the type no rule matches it."""
_DIRECT: Final = os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC

Tell = Callable[[str], None]
"""Told of each step that begins."""
Count = Callable[[int, int], None]
"""Told how many bytes of how many are under the new key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which medium is to go to which kind of key."""

    volume: str
    """Its label, or its partition's device node."""
    method: sealing.SealMethod
    """But for the options of a trust source, which its rule says."""
    key_bytes: int
    recovery_file: Path | None = None
    """Where that of the new key is to be."""


@dataclass(frozen=True, slots=True)
class Migrated:
    """The medium as it is now."""

    node: str
    label: str
    blob: Path
    kept: Path | None
    """Where its old blob is; None if the medium had a key of that kind before."""
    recovery_file: Path | None


def migrate(wish: Wish, config: Config, tell: Tell, count: Count) -> Migrated:
    """The medium is under a new key, sealed in the way that is wished for, and so is its blob.

    Raises: HotplugError, and then the medium is what it was, or one that the same call completes.
    """
    if os.geteuid() != 0:
        raise HotplugError(f"migrate {shown(wish.volume)}: it needs to be root; use sudo")
    udev.require_diskseq()
    gpt.require_library()
    memory.refuse_core_dumps()
    keyring.join_session_keyring()
    os.umask(0o022)
    directory = config.blob_directory
    _require_lasting(directory)
    volume = _volume(wish.volume, config)
    disk = disks.disk_of(volume)
    disks.require_not_the_systems(disk, directory)
    what = f"migrate {volume.node}"
    tell(f"looking at {volume.node}")
    with disks.held(disk) as hold:
        temporary_mapping.remove_leftovers(disk)
        _require_unused(disk, volume)
        partition = _Partition(hold, volume)
        begun = _begun(partition, directory)
        rule, blob = _admitted(partition, begun, config)
        if begun is None:
            old = blob_files.read(directory, blob, rule.key.form)
            if blobs.backend_of(old) == wish.method.backend:
                return _found_so(partition, rule, (blob, old), directory)
            _require_sense(wish, partition, rule, (blob, old), directory)
        else:
            _require_as_begun(wish, partition, (rule, blob), begun)
            old = blobs.parse(begun.old_blob, begun.before)
        with _through(partition, rule, old, "migrate-from", directory) as before:
            if begun is None:
                kind = _filesystem(before, rule, f"{what}: through its key")
                _require_all_read(partition, tell)
                head = _planned(wish, partition, rule, (blob, old, kind), directory)
            else:
                head = begun
            new = blobs.parse(head.new_blob, head.after)
            with _through(partition, rule, new, "migrate-to", directory) as after:
                if begun is None:
                    with store.folder(directory) as folder:
                        migration_journal.create(folder.opened, directory, head)
                with migration_journal.opened(directory, head) as journal:
                    _moved(partition, rule, (before, after), journal, count)
                    kept = _swap_blobs(directory, head)
                    partition.says(head.identity)
                    with store.folder(directory) as folder:
                        migration_journal.remove(folder.opened, directory, head)
        disks.read_partitions(hold)
        recovery_file = None if head.recovery_file is None else Path(head.recovery_file)
        return Migrated(volume.node, head.name, directory / blob, kept, recovery_file)


class _Partition:
    """The one that is migrated, on a disk that is held."""

    def __init__(self, hold: disks.Held, volume: Volume) -> None:
        """Raises: HotplugError if it cannot be marked as one that is not finished."""
        self.hold = hold
        self.volume = volume
        entries = gpt.read(hold.reading, hold.disk.node)
        if entries is None:
            raise HotplugError(
                f"migrate {volume.node}: its disk has no GPT, so that it cannot be marked while it "
                "is under two keys; make a new medium, and copy the files"
            )
        found = [entry for entry in entries if entry.number == volume.id.partition]
        if not found:
            raise HotplugError(
                f"migrate {volume.node}: the disk's table has no partition {volume.id.partition} "
                "any more; plug it anew"
            )
        self.entry = found[0]

    @property
    def label(self) -> str:
        """What it says of itself on the medium."""
        return self.entry.identity.name

    @property
    def mark(self) -> UUID | None:
        """By which its journal is found, if it is marked."""
        identity = self.entry.identity
        return identity.uuid if identity.type == MARK else None

    @property
    def on_disk(self) -> Volume:
        """The partition, to be mapped on the whole disk from its start on."""
        return replace(self.hold.disk, size=self.entry.length)

    def start(self, rule: Rule) -> int:
        """Where its encrypted data begins on the disk, in bytes."""
        return (self.entry.start + rule.crypt.offset) * SECTOR_BYTES

    def says(self, identity: gpt.Identity) -> None:
        """It says this of itself, on the medium."""
        gpt.rename(self.hold.writing(), self.hold.disk.node, self.entry.number, identity)


def _require_lasting(directory: Path) -> None:
    """Raises: HotplugError if what is written there does not outlive a power cut."""
    why = mountinfo.why_volatile(directory)
    if why is not None:
        raise HotplugError(
            f"write the journal to {shown(directory)}: {why}, and a power cut would take it away; "
            "the blob directory must be on a disk: mount one there"
        )


def _volume(text: str, config: Config) -> Volume:
    """The partition that is meant. Raises: HotplugError if none is, or more than one."""
    source = udev.default_source() if config.source == "auto" else config.source
    with closing(udev.Devices(source)) as devices:
        if "/" in text:
            return _partition_at(text, devices)
        marks = {
            str(head.mark)
            for head in migration_journal.heads(config.blob_directory)
            if head.name == text
        }
        told = {event.volume.id: event.volume for event in devices.present()}
        there = {volume.id: volume for volume in sysfs.there()} | told
    found = [
        volume
        for volume in map(_identified, there.values())
        if volume.devtype is DevType.PARTITION
        and (volume.partlabel == text or volume.partuuid in marks)
    ]
    match found:
        case [volume]:
            return volume
        case []:
            raise HotplugError(
                f"migrate {shown(text)}: no partition has this label; is the medium plugged in?"
            )
        case _:
            nodes = ", ".join(sorted(volume.node for volume in found))
            raise HotplugError(
                f"migrate {shown(text)}: {len(found)} partitions have this label; name the "
                f"device: {nodes}"
            )


def _partition_at(node: str, devices: udev.Devices) -> Volume:
    found = _identified(devices.volume(node))
    if found.devtype is not DevType.PARTITION:
        raise HotplugError(
            f"migrate {shown(node)}: it is a whole disk; only a partition can be marked while it "
            "is under two keys: name that"
        )
    return found


def _identified(volume: Volume) -> Volume:
    if not volume.identified and volume.devtype is DevType.PARTITION:
        with suppress(KernelError):  # a medium that cannot be read is not the one that is meant
            found = blkid.identify(volume.node)
            return replace(volume, partlabel=found.partlabel, partuuid=found.partuuid)
    return volume


def _require_unused(disk: Volume, volume: Volume) -> None:
    try:
        device_users.require_unused(disk)
    except DeviceInUseError as error:
        raise DeviceInUseError(
            f"migrate {volume.node}: {error}; if the agent has it, let it go with "
            f"`{names.PROGRAM} lock {volume.node}`"
        ) from error


def _begun(partition: _Partition, directory: Path) -> migration_journal.Head | None:
    """The migration that is to be gone on with, or None if there is none.

    Raises: HotplugError if the medium and the board's journals contradict each other.
    """
    heads = list(migration_journal.heads(directory))
    node = partition.volume.node
    if partition.mark is not None:
        found = [head for head in heads if head.mark == partition.mark]
        if not found:
            raise HotplugError(
                f"migrate {node}: it is not finished, and no journal in {shown(directory)} is of "
                "it; go on on the board where it was begun, or with `provision` if that began it. "
                "If nothing of it was moved yet, its old label and partition type bring it back"
            )
        return found[0]
    found = [head for head in heads if head.uuid == partition.entry.identity.uuid]
    if not found:
        return None
    with migration_journal.opened(directory, found[0]) as begun:
        last = begun.journal.records()[0]
        if last.position == 0 and not last.content:  # it was cut before the medium was touched
            with store.folder(directory) as folder:
                migration_journal.remove(folder.opened, directory, found[0])
            return None
    if last.content:
        raise HotplugError(
            f"migrate {node}: {shown(migration_journal.file(directory, found[0]))} says that "
            "part of it is under a new key, and it is not marked so; is it a copy that was made "
            "before? Remove that file if the medium that it is of is lost"
        )
    return found[0]


def _found_so(
    partition: _Partition, rule: Rule, found: tuple[str, blobs.Blob], directory: Path
) -> Migrated:
    """The medium is under such a key already. Raises: HotplugError if only its blob is."""
    blob, key = found
    with _through(partition, rule, key, "migrate-from", directory) as mapping:
        _filesystem(
            mapping,
            rule,
            f"migrate {partition.volume.node}: {shown(directory / blob)} is a "
            f"{blobs.backend_of(key)} key's already, and through that",
        )
    return Migrated(partition.volume.node, partition.label, directory / blob, None, None)


def _admitted(
    partition: _Partition, head: migration_journal.Head | None, config: Config
) -> tuple[Rule, str]:
    """The rule that opens the medium, and the blob by that rule. Raises: HotplugError."""
    identity = partition.entry.identity if head is None else head.identity
    volume = replace(
        partition.volume,
        partlabel=identity.name,
        partuuid=str(identity.uuid),
        parttype=str(identity.type),
        identified=True,
    )
    match match_rules(config.rule, volume):
        case Plan(rule=rule, blob=blob):
            return rule, blob
        case refused:
            raise HotplugError(
                f"migrate {volume.node}: how it is encrypted is for a rule to say, and no rule "
                f"matches it ({refused})"
            )


def _require_sense(
    wish: Wish,
    partition: _Partition,
    rule: Rule,
    found: tuple[str, blobs.Blob],
    directory: Path,
) -> None:
    """Raises: HotplugError for what can be told before the medium is looked into."""
    blob, old = found
    what, before = f"migrate {shown(partition.label)}", blobs.backend_of(old)
    if partition.hold.disk.read_only:
        raise HotplugError(f"{what}: the medium is write-protected")
    _require_rule_opens(rule, wish, what)
    _require_aligned(partition, rule, what)
    _require_recoverable(wish, partition.label, rule)
    with suppress(BlobMissingError):
        blob_files.read(directory, f"{blob}.{before}")
        raise HotplugError(
            f"{what}: {shown(directory / blob)}.{before} is there, where its old blob is to be "
            "kept; move that away"
        )
    for head in migration_journal.heads(directory):
        if head.blob == blob:
            raise HotplugError(
                f"{what}: another medium with blob {shown(blob)} is not finished; finish that one "
                f"first, or remove {shown(migration_journal.file(directory, head))} if it is lost"
            )
    sealing.require_master(wish.method, directory)


def _require_recoverable(wish: Wish, label: str, rule: Rule) -> None:
    """Raises: HotplugError if the new key cannot be in the recovery file that is wished for."""
    file, crypt = wish.recovery_file, rule.crypt
    if file is None:
        return
    sealing.require_given(wish.method)
    if not file.name.isprintable():
        raise HotplugError(
            f"write {shown(file)}: the file says its own name, and this one is no text; choose "
            "another"
        )
    why = names.why_unsafe(label)
    if why is not None:
        raise HotplugError(f"write {shown(file)}: its medium's label cannot be in it: {why}")
    cipher = crypt_table.cipher_for(crypt, blobs.KEY_TYPES[wish.method.backend])
    moved = crypt.offset or crypt.iv_offset or "iv_large_sectors" in crypt.flags
    if moved or recovery_files.plain_cipher(cipher) is None:
        raise HotplugError(
            f"write {shown(file)}: a recovery file knows no offset, iv_offset or iv_large_sectors, "
            f"nor any cipher but Linux's own and their like, and rule {rule.name!r} does"
        )
    store.require_recovery_unsettled(file)


def _planned(
    wish: Wish,
    partition: _Partition,
    rule: Rule,
    found: tuple[str, blobs.Blob, str],
    directory: Path,
) -> migration_journal.Head:
    """What is to be done, with a new key, which is in the recovery file if one is wished for.

    `found`: its blob's file, its blob, its filesystem. Raises: HotplugError.
    """
    blob, old, kind = found
    entry, before, after = partition.entry, blobs.backend_of(old), wish.method.backend
    cipher = crypt_table.cipher_for(rule.crypt, blobs.KEY_TYPES[after])
    method = replace(wish.method, options=rule.key.options if after != "tagged" else "")

    def about(identifier: str) -> recovery_files.About:
        size = rule.crypt.sector_size
        return recovery_files.About(entry.identity.name, cipher, size, kind, identifier)

    if wish.recovery_file is None:
        new = sealing.seal(method, wish.key_bytes, directory)
    else:
        with store.recovery_key(wish.recovery_file, about, wish.key_bytes) as (_, key, _):
            new = sealing.seal(method, key, directory)
    return migration_journal.Head(
        mark=uuid4(),
        name=entry.identity.name,
        type=entry.identity.type,
        uuid=entry.identity.uuid,
        start=entry.start,
        length=entry.length,
        blob=blob,
        before=before,
        after=after,
        old_blob=old.content,
        new_blob=new,
        how=_how(rule, before, after),
        recovery_file=None if wish.recovery_file is None else str(wish.recovery_file),
    )


def _require_rule_opens(rule: Rule, wish: Wish, what: str) -> None:
    """Raises: HotplugError if the rule would not open the medium with its new key."""
    after = wish.method.backend
    if "{" not in rule.key.blob.text:
        raise HotplugError(
            f"{what}: rule {rule.name!r} opens all its media with {rule.key.blob.text}, and only "
            "one of them would have the new key; give each a blob of its own first"
        )
    cipher = crypt_table.cipher_for(rule.crypt, blobs.KEY_TYPES[after])
    if rule.key.form not in {None, after} or cipher.startswith("capi:tk(") != (after == "tagged"):
        raise HotplugError(
            f"{what}: rule {rule.name!r} would not open it with a {after} key; let it say "
            'backend = "auto" and cipher = "auto", so that media of both kinds are opened'
        )
    if after == "trusted" and rule.key.length not in {0, wish.key_bytes}:
        raise HotplugError(
            f"{what}: rule {rule.name!r} says that a trusted key has {rule.key.length} bytes; say "
            f"--key-bytes {rule.key.length}"
        )


def _require_aligned(partition: _Partition, rule: Rule, what: str) -> None:
    """Raises: HotplugError if encrypted sectors do not begin where blocks of the disk do."""
    unit = max(disks.logical_block(partition.hold.disk), rule.crypt.sector_size)
    start = partition.start(rule)
    if start % unit:
        raise HotplugError(
            f"{what}: its encrypted data begins at byte {start} of the disk, which is no multiple "
            f"of {unit}: a power cut could tear what was not being written"
        )


def _require_all_read(partition: _Partition, tell: Tell) -> None:
    """Every byte can be read: else the medium would be stuck amid its keys. Raises: KernelError."""
    disk, length = partition.hold.disk, partition.entry.length * SECTOR_BYTES
    with _opened(disk.node, os.O_RDONLY) as raw:
        partition.hold.require_same(raw)
        blocks = Blocks(raw, disk.node, partition.entry.start * SECTOR_BYTES)
        for position in range(0, length, reencryption.PIECE_BYTES):
            tell(f"reading all of it once: {100 * position // length} %")
            blocks.read(position, min(reencryption.PIECE_BYTES, length - position))


def _how(rule: Rule, before: blobs.Backend, after: blobs.Backend) -> str:
    crypt = rule.crypt
    ciphers = " to ".join(
        crypt_table.cipher_for(crypt, blobs.KEY_TYPES[backend]) for backend in (before, after)
    )
    flags = ",".join(sorted(crypt.flags))
    return (
        f"{ciphers}, sector_size {crypt.sector_size}, offset {crypt.offset}, "
        f"iv_offset {crypt.iv_offset}, flags [{flags}]"
    )


def _require_as_begun(
    wish: Wish, partition: _Partition, by: tuple[Rule, str], begun: migration_journal.Head
) -> None:
    """Raises: HotplugError if it was begun with another wish, by another rule, or elsewhere."""
    what, (rule, blob) = f"go on with {shown(begun.name)}", by
    if (partition.entry.start, partition.entry.length) != (begun.start, begun.length):
        raise HotplugError(
            f"{what}: the partition was moved or resized; put it back to {begun.length} sectors "
            f"from sector {begun.start} on"
        )
    if wish.method.backend != begun.after:
        raise HotplugError(f"{what}: it was begun with --to {begun.after}; go on with that")
    if wish.recovery_file is not None and str(wish.recovery_file) != begun.recovery_file:
        other = begun.recovery_file
        file = "without a recovery key" if other is None else f"with --recovery-key {shown(other)}"
        raise HotplugError(f"{what}: it was begun {file}; go on so")
    how = _how(rule, begun.before, begun.after)
    if (how, blob) != (begun.how, begun.blob):
        raise HotplugError(
            f"{what}: rule {rule.name!r} says something else than when it was begun, which was "
            f"{begun.how}, blob {shown(begun.blob)}, and is {how}, blob {shown(blob)}; put the "
            "rule back as it was until the medium is finished"
        )


@contextmanager
def _through(
    partition: _Partition,
    rule: Rule,
    blob: blobs.Blob,
    purpose: temporary_mapping.Purpose,
    directory: Path,
) -> Iterator[Mapping]:
    """The partition through the blob's key. Raises: HotplugError."""
    hold = partition.hold
    with temporary_mapping.mapping(hold.disk, purpose) as name:
        temporary_mapping.load(
            name,
            partition.on_disk,
            rule.key,
            rule.crypt,
            blob,
            start=partition.entry.start,
            directory=directory,
        )
        yield temporary_mapping.activate(name, hold, purpose)


def _filesystem(mapping: Mapping, rule: Rule, through: str) -> str:
    """The one on the medium, which the kernel reads.

    Raises: HotplugError, MountError if there is none: key or settings are not the medium's. What
    a probe finds may be right in what it looks at alone.
    """
    found = blkid.probe(mapping.node, rule.mount.filesystems)
    if found is None:
        raise HotplugError(
            f"{through} it has no filesystem that rule {rule.name!r} allows, so nothing more is "
            "written to it"
        )
    mount.require_readable(mapping.node, found)
    return found


def _moved(
    partition: _Partition,
    rule: Rule,
    mappings: tuple[Mapping, Mapping],
    begun: migration_journal.Migration,
    count: Count,
) -> None:
    """All is under the new key, and so is a filesystem. Raises: HotplugError."""
    head = begun.head
    last = begun.journal.records()[0]
    is_moved = not last.content and last.position > 0
    if partition.mark is not None or not is_moved:
        partition.says(gpt.Identity(MARKED_NAME, MARK, head.mark))
        if head.recovery_file is not None and os.path.lexists(head.recovery_file):
            store.settle_recovery(Path(head.recovery_file))
        _move(partition, rule, mappings, begun, count)
    _filesystem(mappings[1], rule, f"migrate {shown(head.name)}: through its new key")


def _move(
    partition: _Partition,
    rule: Rule,
    mappings: tuple[Mapping, Mapping],
    begun: migration_journal.Migration,
    count: Count,
) -> None:
    """Every byte is under the new key. Raises: HotplugError; KernelError."""
    before, after = mappings
    target = crypt_table.CryptTarget.from_line(before.table[0])
    if target is None:
        raise UnsupportedVolumeError(
            f"migrate {partition.volume.node}: its mapping was replaced meanwhile"
        )
    hold, start = partition.hold, partition.start(rule)
    node, length = hold.disk.node, target.length * SECTOR_BYTES
    with (
        _opened(node, os.O_RDWR) as raw,
        _opened(before.node, os.O_RDONLY) as old,
        _opened(after.node, os.O_RDWR) as new,
    ):

        def reached(position: int) -> None:
            hold.require_same(raw)  # a card may have been changed in its reader
            count(position, length)

        medium = reencryption.Medium(
            Blocks(raw, node, start),
            Blocks(old, before.node),
            Blocks(new, after.node),
            start,
            length,
        )
        reencryption.reencrypt(medium, begun.journal, reached)


@contextmanager
def _opened(node: str, how: int) -> Iterator[int]:
    try:
        file = os.open(node, how | _DIRECT)
    except OSError as error:
        raise KernelError("open", node, error.errno or 0) from error
    try:
        yield file
    finally:
        os.close(file)


def _swap_blobs(directory: Path, head: migration_journal.Head) -> Path:
    """The new blob is where the old one was, which is kept: its path.

    Raises: HotplugError if something else is in either place; KernelError.
    """
    file, kept = directory / head.blob, directory / f"{head.blob}.{head.before}"
    old = blobs.parse(head.old_blob, head.before)
    new = blobs.parse(head.new_blob, head.after)
    with store.folder(directory) as folder:
        there = None
        with suppress(BlobMissingError):
            there = blob_files.read(directory, head.blob)
        if there == old:
            atomic_files.move(folder.opened, file, kept.name)
            there = None
        if there is None:
            atomic_files.write(folder.opened, file, head.new_blob, store.BLOB_MODE)
        elif there != new:
            raise HotplugError(
                f"write {shown(file)}: it was replaced meanwhile; move it away and go on with the "
                "same command"
            )
    return kept

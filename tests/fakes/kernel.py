"""A kernel in memory: media, keys, mappings, mounts, and processes that die and start again."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from caam_hotplug.config.match import ON_THE_DISK
from caam_hotplug.errors import (
    BlobMissingError,
    BlobRejectedError,
    DeviceInUseError,
    DeviceLockedError,
    DmError,
    KernelError,
    MappingBusyError,
    MountBusyError,
    MountError,
    MountPointOccupiedError,
    VolumeBusyError,
    WritesLostError,
)
from caam_hotplug.formats import mount_options
from caam_hotplug.formats.blobs import Backend, Blob, Encrypted, Tagged, Trusted
from caam_hotplug.formats.crypt_table import CryptTarget
from caam_hotplug.kernel.medium_sample import Ciphertexts, Plaintexts, Sample
from caam_hotplug.kernel.mount_places import Mounts
from caam_hotplug.model import (
    Appeared,
    Bus,
    DeviceNumber,
    DevType,
    Disappeared,
    Event,
    Holder,
    Mapping,
    Mount,
    SecretBytes,
    Sectors,
    Volume,
    VolumeId,
)
from caam_hotplug.names import DM_UUID_PREFIX, MOUNT_ROOT, is_path, name_of

T = TypeVar("T")
KEY = b"tagged key of thirty-six bytes......"
SEALED_BYTES = 48
"""Bytes that the CAAM adds to a key that it seals for the kernel."""


class ProcessDiedError(BaseException):
    """The agent's process was killed; no later call of it has an effect."""


class HangsError(BaseException):
    """The call hangs before it acts; the bench's worker calls again afterwards."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass
class Fault:
    """Fault of one call of a step, or of all of them."""

    step: str
    error: BaseException | None = None
    """Error that the call raises instead of acting."""
    hangs_s: float = 0.0
    """Duration of the call."""
    acts_first: bool = False
    """Whether a call that hangs acts before it hangs, not after."""
    after: int = 0
    """Number of earlier calls without the fault."""
    lasting: bool = False
    """Whether every later call has the fault too."""
    about: AbstractSet[str] | None = None
    """Subjects of the calls with the fault; None for all."""

    def hits(self, step: str, subject: str) -> bool:
        """Whether this call has the fault."""
        if step != self.step or not (self.about is None or subject in self.about):
            return False
        self.after -= 1
        return self.after < 0


@dataclass
class FakeMapping:
    """A dm device: its tables, its holders, and whether the last close removes it."""

    name: str
    uuid: str
    number: DeviceNumber
    live: str | None = None
    inactive: str | None = None
    key: bytes | None = None
    inactive_key: bytes | None = None
    read_only: bool = False
    holders: int = 0
    openers: int = 0
    """How many programs have its node open, and use no filesystem on it."""
    watches: int = 0
    """How many times the agent holds it, to see failed writes."""
    is_suspended: bool = False
    errors: int = 0
    """How many errors its filesystem has counted."""
    is_removed_at_last_close: bool = False


@dataclass
class FakeMedium:
    """Content of a volume: a filesystem that is visible only under one key."""

    volume: Volume
    key: bytes = KEY
    filesystem: str | None = "ext4"
    writes: int = 0
    is_offline: bool = False
    """Whether the kernel has taken its disk offline."""
    is_locked: bool = False
    """Whether a program has locked its disk for exclusive use."""
    says: Volume | None = None
    """What its disk says of it, if that is not what `volume` has."""

    @property
    def on_disk(self) -> Volume:
        """Volume with the facts that are on the disk."""
        return self.says or self.volume

    def relabel(self, volume: Volume) -> None:
        """Write the facts of this volume to the disk, without those that it lacks."""
        facts = {fact: getattr(volume, fact) for fact in ON_THE_DISK}
        facts = {fact: value for fact, value in facts.items() if value is not None}
        self.says = replace(self.on_disk, **facts)

    is_written: bool = False
    """Whether a program writes, all the time, the place that is compared."""
    is_refusing: bool = False
    """Whether its reader refuses to read until its disk is opened anew."""
    identifier: bytes = b"a GUID"
    """Identifier of its partition table."""


@dataclass
class FakeKernel:
    """State of the machine. Every step may be watched, delayed or made to fail."""

    media: dict[str, FakeMedium] = field(default_factory=dict)
    unread: dict[DeviceNumber, FakeMedium] = field(default_factory=dict)
    """Cards in readers that still show the partitions of the card before."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    backend: Backend = "tagged"
    """Seal method of the blobs."""
    mappings: dict[str, FakeMapping] = field(default_factory=dict)
    mounts: list[Mount] = field(default_factory=list)
    users: dict[str, int] = field(default_factory=dict)
    """Number of processes in each mount point, by name."""
    shows_holders: bool = True
    """Whether a search finds the processes that use a mapping."""
    fatal_signals: set[int] = field(default_factory=set)
    """Signals that end the processes."""
    powered_off: list[str] = field(default_factory=list)
    """Names of volumes whose medium was powered off."""
    away: dict[str, FakeMedium] = field(default_factory=dict)
    """Partitions of present disks that were removed from the kernel, by their earlier names."""
    held_disks: dict[int, FakeProcess] = field(default_factory=dict)
    """Who holds a disk, by its sequence number."""
    disk_users: dict[int, list[str]] = field(default_factory=dict)
    """Others who use a disk: mounts of partitions, programs."""
    marks: dict[VolumeId, str] = field(default_factory=dict)
    """Texts that the agent has stored for volumes."""
    report: Callable[[Event], None] = lambda _event: None
    """Called with what the kernel and udev report of partitions that a program removes or adds."""
    mounts_changed: Callable[[], None] = lambda: None
    """Called at each change of the mounts."""
    mapping_changed: Callable[[str], None] = lambda _name: None
    """Called with the kernel's name of a mapping that has become live, or was removed."""
    written_back: Callable[[FakeMapping, bool], None] = lambda _mapping, _fails: None
    """Called when the filesystem on a mapping writes what it has, with whether that fails."""
    mount_id: int = 20
    directories: dict[str, str] = field(default_factory=dict)
    """Kind of each mount point: 'ours', 'board' (empty) or 'content'."""
    unsafe_folders: dict[Path, str] = field(default_factory=dict)
    """Directories of mount points outside the mount root that others could change, and why."""
    marked_places: dict[str, str] = field(default_factory=dict)
    """Where a mapping was mounted outside the mount root, by its node."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Directories of mount points that were renamed since, and their new paths."""
    keyrings: list[dict[str, bytes]] = field(default_factory=list)
    open_nodes: list[FakeOpenVolume] = field(default_factory=list)
    path_watches: list[FakePathWatch] = field(default_factory=list)
    diskseq: int = 0
    minor: int = 0
    searched: list[DeviceNumber] = field(default_factory=list)
    """Numbers of filesystems, beside the mapping's, whose users were searched."""
    steps: list[str] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)
    """Subject of each of the steps."""
    faults: list[Fault] = field(default_factory=list)
    faulted_calls: int = 0
    """Number of calls that had a fault."""
    answer_delay_s: float = 0.0
    """Delay of the answer to the call that has just acted."""
    before: Callable[[str], None] = lambda _step: None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def insert(
        self, label: str = "cartridge-01", name: str = "sda1", *, key: bytes = KEY, **facts: Any
    ) -> Volume:
        """Put a medium in its socket; the test reports the event."""
        with self.lock:
            return self._insert(label, name, key, facts)

    def _insert(self, label: str, name: str, key: bytes, facts: dict[str, Any]) -> Volume:
        self.diskseq += 1
        which = VolumeId(self.diskseq, 1)
        number = DeviceNumber(8, self.diskseq)
        volume = Volume(
            which, name, number, DevType.PARTITION, Sectors(32768), Bus.USB, True, False, label
        )
        for fact, value in facts.items():
            object.__setattr__(volume, fact, value)
        self.media[name] = FakeMedium(volume, key)
        self.blobs.setdefault(f"{label}.bb", key)
        return volume

    def pull(self, name: str = "sda1") -> None:
        """Take the medium out."""
        with self.lock:
            (self.media if name in self.media else self.away).pop(name)

    def disk(self, diskseq: int) -> dict[str, FakeMedium]:
        """Return what the kernel has of the disk: itself and its partitions."""
        return {n: m for n, m in self.media.items() if m.volume.id.diskseq == diskseq}

    def remove_partitions(self, diskseq: int) -> None:
        """Remove the disk's partitions, as BLKPG_DEL_PARTITION does."""
        for name, medium in self.disk(diskseq).items():
            if medium.volume.id.partition:
                self.away[name] = self.media.pop(name)
                self.report(Disappeared(name))

    def read_partitions(self, diskseq: int) -> list[Volume]:
        """Have the disk's partitions again, as BLKRRPART does; their numbers may be others."""
        for name, medium in list(self.away.items()):
            if medium.volume.id.diskseq == diskseq:
                number = DeviceNumber(259, medium.volume.number.minor)
                medium.volume = replace(medium.volume, number=number)
                self.media[name] = self.away.pop(name)
                self.report(Appeared(medium.volume))
        return [m.volume for m in self.disk(diskseq).values() if m.volume.id.partition]

    def change(self, label: str = "cartridge-02", name: str = "sda1") -> Volume:
        """Change the card of a reader; the kernel shows the new one once its table was read."""
        with self.lock:
            number = self.media.pop(name).volume.number
            volume = self._insert(label, name, KEY, {"number": number})
            self.unread[number] = self.media.pop(name)
            return volume

    def free_mount_point(self, name: str) -> None:
        """Remove what lies at the mount point, which inotify reports."""
        del self.directories[name]
        for watch in self.path_watches:
            if watch.name == name:
                watch.change()

    def make_safe(self, folder: Path) -> None:
        """Let only root change the directory from now on, which inotify reports."""
        del self.unsafe_folders[folder]
        for watch in self.path_watches:
            if Path(watch.name).parent == folder:
                watch.change()

    def new_session(self) -> None:
        """Cut the CAAM's power: the live mappings' keys become others."""
        with self.lock:
            for mapping in self.mappings.values():
                if mapping.key is not None:
                    mapping.key = b"another than " + mapping.key

    def fail_next(self, step: str, error: BaseException | int) -> None:
        """Make the next call of this step raise the error instead of acting."""
        raised = DmError(step, "x", error) if isinstance(error, int) else error
        self.faults.append(Fault(step, raised))

    def apply_fault(self, step: str, subject: str) -> None:
        """Apply the fault of this call, if there is one. Raises: HangsError; the fault's error."""
        fault = next((f for f in self.faults if f.hits(step, subject)), None)
        if fault is None:
            return
        self.faulted_calls += 1
        if not fault.lasting:
            self.faults.remove(fault)
        if fault.hangs_s and not fault.acts_first:
            raise HangsError(fault.hangs_s)
        self.answer_delay_s = fault.hangs_s
        if fault.error is not None:
            self._record(step, subject)
            raise fault.error

    def _record(self, step: str, subject: str) -> None:
        self.steps.append(step)
        self.subjects.append(subject)

    def close_holders(self) -> None:
        """Close everything that other processes hold."""
        with self.lock:
            self.users.clear()
            for mapping in list(self.mappings.values()):
                mapping.holders = mapping.openers = 0
                self.remove_if_closed(mapping)

    def leftovers(self) -> list[str]:
        """List what the agent has in the kernel; empty when no medium is present."""
        keys = [f"key {name}" for keyring in self.keyrings for name in keyring]
        dirs = [f"directory {n}" for n, kind in self.directories.items() if kind == "ours"]
        mounts = [f"mount {mount.point}" for mount in self.mounts]
        nodes = [f"open node {opened.volume.node}" for opened in self.open_nodes]
        watches = [f"watch of {watch.name}" for watch in self.path_watches]
        mappings = [f"mapping {name}" for name in self.mappings]
        return keys + mappings + mounts + dirs + nodes + watches

    def start_process(self) -> FakeProcess:
        """Start a process of the agent, with a new keyring."""
        self.keyrings = [keyring for keyring in self.keyrings if keyring]
        self.keyrings.append({})
        return FakeProcess(self, self.keyrings[-1])

    def medium(self, number: DeviceNumber) -> FakeMedium | None:
        """Return the medium with this device number."""
        return next((m for m in self.media.values() if m.volume.number == number), None)

    def by_node(self, node: str) -> FakeMapping:
        """Return the mapping with this device node. Raises: KernelError."""
        minor = int(node.removeprefix("/dev/dm-"))
        mapping = next((m for m in self.mappings.values() if m.number.minor == minor), None)
        if mapping is None or (mapping.live is None and mapping.inactive is None):
            raise KernelError("open", node, errno.ENOENT)  # no node before it has a table
        return mapping

    def under(self, mapping: FakeMapping) -> FakeMedium:
        """Return the medium that a read of the mapping reaches. Raises: KernelError."""
        target = CryptTarget.from_line(mapping.live or "")
        medium = None if target is None else self.medium(target.device)
        if medium is None:
            raise KernelError("read", mapping.name, errno.EIO)
        return medium

    def reads_as_written(self, node: str) -> bool:
        """Whether the device reads as its medium was written. Raises: OSError."""
        mapping = self.by_node(node)
        return self.under(mapping).key == mapping.key

    def open_count(self, mapping: FakeMapping) -> int:
        """Count who holds the mapping open: mounts, detached mounts, processes."""
        return mapping.openers + mapping.watches + self.users_of_filesystem(mapping)

    def users_of_filesystem(self, mapping: FakeMapping) -> int:
        """Count what keeps the filesystem on the mapping alive: mounts, and who is in one."""
        return mapping.holders + sum(m.number == mapping.number for m in self.mounts)

    def remove_if_closed(self, mapping: FakeMapping) -> None:
        """Remove the mapping if that was asked for and nobody has it open.

        A filesystem that nobody uses any more has written all that it has.
        """
        if not self.users_of_filesystem(mapping):
            self.written_back(mapping, False)
        if mapping.is_removed_at_last_close and not self.open_count(mapping):
            self.mappings.pop(mapping.name, None)
            self.marked_places.pop(f"/dev/dm-{mapping.number.minor}", None)
            self.mapping_changed(f"dm-{mapping.number.minor}")

    def take_away(self, mount: Mount) -> None:
        """Have this mount no more; others may be equal."""
        self.mounts[:] = [other for other in self.mounts if other is not mount]

    def mount_of_root(self, root: Path) -> Mount | None:
        """Return the topmost mount at the mount root itself, or None."""
        return next((m for m in reversed(self.mounts) if m.point == str(root)), None)

    def is_in_root(self, mount: Mount, root: Path) -> bool:
        """Whether it lies on a mount at the mount root, so that a peer of that has a copy of it."""
        return any((m.point, m.identity) == (str(root), mount.parent) for m in self.mounts)

    def next_mount(self) -> int:
        """Return the number of the next mount."""
        self.mount_id += 1
        return self.mount_id


class FakeOpenVolume:
    """A volume whose node is open."""

    def __init__(self, process: FakeProcess, volume: Volume) -> None:
        self.process = process
        self.volume = volume

    def require_unused(self) -> None:
        volume = self.volume
        self.process._step("require_unused", volume.name)
        if volume.id.diskseq in self.process.kernel.held_disks:
            raise DeviceInUseError(f"use {volume.node}: it is in use: something holds its disk")
        for mapping in self.process.kernel.mappings.values():
            target = CryptTarget.from_line(mapping.live or "")
            if target is not None and target.device == volume.number:
                raise DeviceInUseError(f"use {volume.node}: mapping {mapping.name} lies on it")

    def require_same(self) -> None:
        self.process._step("require_same", self.volume.name)
        self.require_number()

    def require_number(self) -> None:
        medium = self.process.kernel.medium(self.volume.number)
        if medium is not None and medium.volume.id.diskseq != self.volume.id.diskseq:
            raise KernelError("use", self.volume.node, errno.ENODEV)

    def close(self) -> None:
        nodes = self.process.kernel.open_nodes
        if self in nodes:
            nodes.remove(self)


class FakeProcess:
    """The kernel as one agent process sees it; implements the interface of `kernel.api.Kernel`."""

    def __init__(self, kernel: FakeKernel, keyring: dict[str, bytes]) -> None:
        self.kernel = kernel
        self.blob_directory = Path("/data/caam")
        self.mount_root = MOUNT_ROOT
        self.is_running = True
        self.watches: list[FakeWriteWatch] = []
        self.places: dict[str, int] = {}
        """Numbers of the mounts whose directories it has mounted something in, by the names."""
        self._keyring = keyring

    def die(self) -> None:
        """End as after kill -9: the keys of the process's keyring are lost, all else stays."""
        self.is_running = False
        for watch in list(self.watches):
            watch.close()
        held = self.kernel.held_disks
        for diskseq in [diskseq for diskseq, process in held.items() if process is self]:
            del held[diskseq]
        self.kernel.keyrings = [k for k in self.kernel.keyrings if k is not self._keyring]
        self.kernel.open_nodes.clear()

    def _step(self, name: str, subject: str = "") -> None:
        self.kernel.before(name)
        if not self.is_running:
            raise ProcessDiedError
        if self.kernel.faults:
            self.kernel.apply_fault(name, subject)
        self.kernel._record(name, subject)

    def is_present(self, volume: Volume) -> bool:
        medium = self.kernel.media.get(volume.name)
        return medium is not None and medium.volume.id == volume.id

    def is_offline(self, volume: Volume) -> bool:
        self._step("is_offline", volume.name)
        medium = self.kernel.media.get(volume.name)
        return medium is not None and medium.is_offline

    def open_volume(self, volume: Volume) -> FakeOpenVolume:
        self._step("identify", volume.name)
        medium = self.kernel.media.get(volume.name)
        if medium is None or medium.is_offline:
            raise KernelError("open", volume.node, errno.ENOENT)
        if volume.awaits_udev and medium.is_locked:
            raise DeviceLockedError(f"use {medium.volume.node}: it is locked")
        read = {fact: getattr(medium.on_disk, fact) for fact in ON_THE_DISK}
        opened = FakeOpenVolume(self, replace(volume, identified=True, **read))
        opened.require_number()
        self.kernel.open_nodes.append(opened)
        return opened

    def remember(self, volume: Volume, text: str) -> None:
        if not self.is_running:
            raise ProcessDiedError
        self.kernel.marks[volume.id] = text

    def remembered(self, volume: Volume) -> str:
        return self.kernel.marks.get(volume.id, "")

    def remembered_on(self, disk: Volume) -> list[str]:
        marks = self.kernel.marks.items()
        return [text for v, text in marks if v.diskseq == disk.id.diskseq and text]

    def read_blob(self, name: str, form: Backend | None = None) -> Blob:
        self._step("read_blob", name)
        if name not in self.kernel.blobs:
            raise BlobMissingError(f"no blob {self.blob_directory / name}")
        content = self.kernel.blobs[name]
        match form or self.kernel.backend:
            case "trusted":
                return Trusted(content + bytes(SEALED_BYTES))
            case "encrypted":
                return Encrypted(content, "default", "master", len(content))
        return Tagged(content, 1, "ecb", len(content))

    def import_blob(self, blob: bytes) -> SecretBytes:
        self._step("import_blob", blob.decode())
        if blob == b"foreign":
            raise BlobRejectedError("the CAAM refused the blob")
        return SecretBytes(bytearray(blob))

    def add_key(self, description: str, payload: SecretBytes) -> None:
        self._step("add_key", description)
        self._keyring[description] = bytes(payload.buffer)

    def load_trusted_key(self, description: str, blob: Trusted, options: str) -> None:
        self._step("load_trusted_key", description)
        self._load(description, blob.content[:-SEALED_BYTES])

    def load_encrypted_key(self, description: str, blob: Encrypted, options: str) -> None:
        self._step("load_encrypted_key", description)
        self._load(description, blob.content)

    def _load(self, description: str, key: bytes) -> None:
        if key == b"foreign":
            raise BlobRejectedError("the trust source refused the blob")
        self._keyring[description] = key

    def has_key(self, description: str) -> bool:
        return description in self._keyring

    def unlink_key(self, description: str) -> None:
        self._step("unlink_key", description)
        self._keyring.pop(description, None)

    def find_mapping(self, uuid: str) -> Mapping | None:
        self._step("find_mapping", uuid)
        with self.kernel.lock:
            found = (m for m in self.kernel.mappings.values() if m.uuid == uuid)
            mapping = next(found, None)
            return None if mapping is None else self._as_mapping(mapping)

    def _as_mapping(self, mapping: FakeMapping) -> Mapping:
        table = () if mapping.live is None else (mapping.live,)
        open_count = self.kernel.open_count(mapping)
        return Mapping(
            mapping.name,
            mapping.uuid,
            mapping.number,
            table,
            open_count,
            mapping.is_suspended,
            mapping.is_removed_at_last_close,
        )

    def our_mappings(self) -> list[Mapping]:
        self._step("our_mappings")
        mappings = self.kernel.mappings.values()
        return [self._as_mapping(m) for m in mappings if m.uuid.startswith(DM_UUID_PREFIX)]

    def create_mapping(self, name: str, uuid: str) -> None:
        self._step("create_mapping", name)
        with self.kernel.lock:
            taken = self.kernel.mappings.values()
            if name in self.kernel.mappings or any(m.uuid == uuid for m in taken):
                raise MappingBusyError("create mapping", name, errno.EBUSY)
            self.kernel.minor += 1
            number = DeviceNumber(253, self.kernel.minor)
            self.kernel.mappings[name] = FakeMapping(name, uuid, number)

    def _mapping(self, name: str, operation: str) -> FakeMapping:
        if name not in self.kernel.mappings:
            raise DmError(operation, name, errno.ENXIO)
        return self.kernel.mappings[name]

    def load_table(self, name: str, line: str, *, read_only: bool) -> None:
        self._step("load_table", name)
        mapping = self._mapping(name, "load table of mapping")
        target = CryptTarget.from_line(line)
        assert target is not None
        key = self._keyring.get(target.key_description.partition(":")[2])
        if key is None:
            raise DmError("load table of mapping", name, errno.ENOKEY)
        if len(key) != target.key_bytes:
            raise DmError("load table of mapping", name, errno.EINVAL)
        if self.kernel.medium(target.device) is None:
            raise DmError("load table of mapping", name, errno.ENXIO)
        mapping.inactive, mapping.inactive_key, mapping.read_only = line, key, read_only

    def activate_mapping(self, name: str) -> None:
        self._step("activate_mapping", name)
        mapping = self._mapping(name, "activate mapping")
        if mapping.inactive is not None:
            mapping.live, mapping.key = mapping.inactive, mapping.inactive_key
            mapping.inactive = mapping.inactive_key = None
            self.kernel.mapping_changed(f"dm-{mapping.number.minor}")

    def load_error_table(self, uuid: str) -> None:
        found = (m for m in self.kernel.mappings.values() if m.uuid == uuid)
        mapping = next(found, None)
        self._step("load_error_table", uuid if mapping is None else mapping.name)
        if mapping is None or mapping.live is None:
            return
        is_there = mapping.live.endswith(" error")
        if is_there and not mapping.is_suspended:
            return
        mapping.is_suspended, mapping.inactive = False, None
        mapping.live, mapping.key = f"0 {mapping.live.split()[1]} error", None
        self.kernel.mapping_changed(f"dm-{mapping.number.minor}")

    def has_error_table(self, uuid: str) -> bool:
        mapping = next((m for m in self.kernel.mappings.values() if m.uuid == uuid), None)
        self._step("has_error_table", uuid if mapping is None else mapping.name)
        if mapping is None:
            raise DmError("look at mapping", uuid, errno.ENXIO)
        is_error = mapping.live is not None and mapping.live.endswith(" error")
        return is_error and not mapping.is_suspended

    def resume_mapping(self, name: str) -> None:
        self._step("resume_mapping", name)
        mapping = self._mapping(name, "activate mapping")
        mapping.is_suspended, mapping.inactive = False, None
        self.kernel.mapping_changed(f"dm-{mapping.number.minor}")

    def remove_mapping(self, name: str) -> None:
        self._step("remove_mapping", name)
        with self.kernel.lock:
            mapping = self.kernel.mappings.get(name)
            if mapping is not None:
                mapping.is_removed_at_last_close = True
                self.kernel.remove_if_closed(mapping)

    def keep_mapping(self, name: str) -> None:
        self._step("keep_mapping", name)
        self._mapping(name, "keep mapping").is_removed_at_last_close = False

    @staticmethod
    def _wait_for(mapping: FakeMapping) -> None:
        """Wait as reads and writes of a suspended mapping do. Raises: HangsError."""
        if mapping.is_suspended:
            raise HangsError(1)

    def plaintexts(self, mapping: Mapping) -> Plaintexts:
        self._step("plaintexts", mapping.name)
        return self._plaintexts(mapping)

    def _plaintexts(self, mapping: Mapping) -> Plaintexts:
        fake = self.kernel.by_node(mapping.node)
        self._wait_for(fake)
        target = CryptTarget.from_line(fake.live or "")
        medium = None if target is None else self.kernel.medium(target.device)
        if medium is None or medium.is_refusing:
            return (None,)
        return (hash((medium.identifier, fake.key)),)

    def ciphertexts(self, volume: Volume, mapping: Mapping) -> Ciphertexts:
        self._step("ciphertexts", volume.name)
        return self._ciphertexts(volume)

    def _ciphertexts(self, volume: Volume) -> Ciphertexts:
        medium = self.kernel.media.get(volume.name)
        if medium is None:
            raise KernelError("open", volume.node, errno.ENOENT)
        medium.is_refusing = False
        return Ciphertexts(medium.identifier, (len(self.kernel.steps) if medium.is_written else 1,))

    def sample(self, volume: Volume, mapping: Mapping) -> Sample:
        self._step("sample", volume.name)
        cipher = self._ciphertexts(volume)
        if self.kernel.media[volume.name].is_written:
            cipher = replace(cipher, digests=(None,))
        return Sample(self._plaintexts(mapping), cipher)

    def probe(self, node: str, filesystems: Sequence[str]) -> str | None:
        at_node = (
            m.name for m in self.kernel.mappings.values() if self._as_mapping(m).node == node
        )
        self._step("probe", next(at_node, node))
        mapping = self.kernel.by_node(node)
        self._wait_for(mapping)
        medium = self.kernel.under(mapping)
        shown = medium.filesystem if medium.key == mapping.key else None
        return shown if shown in filesystems else None

    def mount(
        self,
        node: str,
        kind: str,
        place: str,
        *,
        read_only: bool,
        options: Sequence[str],
        filesystem_options: Sequence[str],
    ) -> None:
        assert options is not None
        with self.kernel.lock:
            self._make_directory(place)
            point = str(self.mount_root / place)
            if why := self._why_occupied(place):
                raise MountPointOccupiedError(why)
            if is_path(place):
                self.kernel.marked_places[node] = place
            self._step("mount", place)
            mapping = self._mountable(node, kind, read_only=read_only)
            unread = mount_options.leaves_journal(filesystem_options)
            below = self._below(place)
            made = Mount(
                mapping.number, point, node, read_only, kind, leaves_journal=unread,
                is_filesystem_read_only=read_only, is_point_read_only=read_only,
                stops_at_errors=kind == "ext4", identity=self.kernel.next_mount(),
                parent=0 if below is None else below.identity,
            )  # fmt: skip
            if below is not None:  # its peer gets a copy, which it hides
                copy = replace(made, identity=self.kernel.next_mount(), parent=below.parent)
                self.kernel.mounts.append(copy)
            self.kernel.mounts.append(made)
            self.places[place] = made.parent
            self.kernel.mounts_changed()

    def _make_directory(self, place: str) -> None:
        if not self._why_unsafe(place):
            self.kernel.directories.setdefault(place, "ours")

    def _why_unsafe(self, place: str) -> str:
        """Return why nothing can be made at a path of its own, in the words of the real kernel."""
        return self.kernel.unsafe_folders.get(Path(place).parent, "")

    def _below(self, place: str) -> Mount | None:
        """Return the topmost mount at the directory of the mount point, or None."""
        return self.kernel.mount_of_root((self.mount_root / place).parent)

    def keep_place(self, place: str) -> None:
        self._step("keep_place", place)
        below = self._below(place)
        self.places[place] = 0 if below is None else below.identity

    def point_of(self, place: str) -> str:
        folder, _, name = place.rpartition("/")
        is_kept = place in self.places
        return f"{self.kernel.renamed.get(folder, folder) if is_kept else folder}/{name}"

    def _point(self, place: str) -> str:
        return self.point_of(place) if is_path(place) else str(self.mount_root / place)

    def place_of(self, mapping: Mapping) -> str:
        return self.kernel.marked_places.get(mapping.node, "")

    def note_place(self, mapping: Mapping, place: str) -> None:
        self.kernel.marked_places[mapping.node] = place

    def _mountable(self, node: str, kind: str, *, read_only: bool) -> FakeMapping:
        try:
            mapping = self.kernel.by_node(node)
            self._wait_for(mapping)
            medium = self.kernel.under(mapping)
        except KernelError as error:
            raise MountError("mount", node, error.errno or 0) from error
        if mapping.read_only and not read_only:
            raise MountError("mount", node, errno.EACCES)
        if medium.key != mapping.key or medium.filesystem != kind:
            raise MountError("mount", node, errno.EINVAL)
        return mapping

    def mounts(self) -> list[Mount]:
        self._step("mounts")
        return list(self.kernel.mounts)

    def holders(self, mapping: Mapping, also: DeviceNumber | None = None) -> list[Holder]:
        self._step("holders", mapping.name)
        if also is not None:
            self.kernel.searched.append(also)
        with self.kernel.lock:
            fake = self.kernel.by_node(mapping.node)
            points = [m.point for m in self.kernel.mounts if m.number == mapping.number]
            users = (
                fake.holders
                + fake.openers
                + sum(self.kernel.users.get(Path(p).name, 0) for p in points)
            )
            found = range(1, users + 1) if self.kernel.shows_holders else ()
            return [Holder(pid, "program", "has a file open") for pid in found]

    def end_holders(self, mapping: Mapping, number: int, within_s: float) -> None:
        self._step("end_holders", mapping.name)
        assert within_s > 0
        with self.kernel.lock:
            for mount in self.kernel.mounts:
                if mount.number == mapping.number and number in self.kernel.fatal_signals:
                    self.kernel.users.pop(Path(mount.point).name, None)

    def changed_disk(self, which: VolumeId, number: DeviceNumber) -> str | None:
        if self.kernel.faults:
            self.kernel.apply_fault("changed_disk", str(number))
        medium = self.kernel.unread.get(number)
        is_another = medium is not None and medium.volume.id.diskseq != which.diskseq
        return f"/dev/disk-{number}" if is_another else None

    def read_table(self, disk: str) -> None:
        self._step("read_table", disk)
        number = DeviceNumber.from_text(disk.removeprefix("/dev/disk-"))
        medium = self.kernel.unread.pop(number)
        self.kernel.media.setdefault(medium.volume.name, medium)

    def disk_users(self, volume: Volume) -> list[str]:
        self._step("disk_users", volume.name)
        return list(self.kernel.disk_users.get(volume.id.diskseq, ()))

    def has_partitions(self, disk: Volume) -> bool:
        self._step("has_partitions", disk.name)
        there = self.kernel.disk(disk.id.diskseq).values()
        return any(medium.volume.id.partition for medium in there)

    def empty_disk(self, volume: Volume) -> FakeEmptiedDisk:
        self._step("empty_disk", volume.name)
        with self.kernel.lock:
            diskseq = volume.id.diskseq
            there = [
                m.volume.id.diskseq for m in {**self.kernel.media, **self.kernel.away}.values()
            ]
            if diskseq not in there:
                raise KernelError("look for the disk of", volume.node, errno.ENODEV)
            numbers = {m.volume.number for m in self.kernel.disk(diskseq).values()}
            users = list(self.kernel.disk_users.get(diskseq, ()))
            for mapping in self.kernel.mappings.values():
                for line in filter(None, (mapping.live, mapping.inactive)):
                    target = CryptTarget.from_line(line)
                    if target is not None and target.device in numbers:
                        users.append(f"mapping {mapping.name} lies on it")
            if any(m.is_offline for m in self.kernel.disk(diskseq).values()):
                raise KernelError("flush", volume.node, errno.EIO, "it is offline")
            if users or diskseq in self.kernel.held_disks:
                raise VolumeBusyError(volume.node, tuple(users))
            self.kernel.remove_partitions(diskseq)
            self.kernel.held_disks[diskseq] = self
        return FakeEmptiedDisk(self, volume)

    def watch_writes(self, mapping: Mapping) -> FakeWriteWatch:
        self._step("watch_writes", mapping.name)
        return FakeWriteWatch(self, self.kernel.by_node(mapping.node))

    def unmount(self, place: str, which: Mounts, *, lazily: bool = False) -> None:
        self._step("detach" if lazily else "unmount", place)
        point, name = self._point(place), name_of(place)
        with self.kernel.lock:
            mount = self._reached(place, which)
            if mount is None:
                return
            if not any(m.number == mount.number for m in self.kernel.mappings.values()):
                self.kernel.take_away(mount)  # mounted by another program
                self.kernel.mounts_changed()
                return
            users = self.kernel.users.get(name, 0)
            if users and not lazily:
                raise MountBusyError("unmount", point, errno.EBUSY)
            copies = (m for m in self.kernel.mounts if (m.point, m.number) == (point, mount.number))
            is_peer = self.kernel.is_in_root(mount, Path(point).parent)
            for gone in list(copies) if is_peer else [mount]:
                self.kernel.take_away(gone)
            self.kernel.users.pop(name, None)
            mapping = next(m for m in self.kernel.mappings.values() if m.number == mount.number)
            mapping.holders += users
            self.kernel.mounts_changed()
            self.kernel.remove_if_closed(mapping)

    def _reached(self, place: str, which: Mounts) -> Mount | None:
        """Return the topmost mount in the directory that it was mounted in, or on the path."""
        kept = self._in(self.places[place], place) if place in self.places else None
        found = (mount for mount in (kept, self._seen(place)) if mount is not None)
        return next((mount for mount in found if mount.identity in which), None)

    def _seen(self, place: str) -> Mount | None:
        below = self._below(place)
        return self._in(0 if below is None else below.identity, place)

    def _in(self, on: int, place: str) -> Mount | None:
        point, reached = self._point(place), None
        while True:
            there = (m for m in self.kernel.mounts if (m.point, m.parent) == (point, on))
            over = next(there, None)
            if over is None:
                return reached
            reached, on = over, over.identity

    def remove_mount_point(self, place: str) -> None:
        self._step("remove_mount_point", place)
        point = self._point(place)
        if any(mount.point == point for mount in self.kernel.mounts):
            return
        self.places.pop(place, None)
        if self.kernel.directories.get(place) == "ours":
            del self.kernel.directories[place]

    def why_occupied(self, place: str) -> str:
        self._step("why_occupied", place)
        return self._why_occupied(place)

    def _why_occupied(self, place: str) -> str:
        """Return why nothing can be mounted at the place, in the words of the real kernel."""
        point = self.mount_root / place
        if why := self._why_unsafe(place):
            return why
        if self._seen(place) is not None:
            return f"something is mounted at {point}"
        return f"{point} is not empty" if self.kernel.directories.get(place) == "content" else ""

    def watch_mount_point(self, place: str) -> FakePathWatch:
        self._step("watch_mount_point", place)
        return FakePathWatch(self.kernel, place)

    def our_mount_points(self) -> list[str]:
        self._step("our_mount_points")
        return [place for place in self._ours() if not is_path(place)]

    def our_paths(self, globs: Iterable[str]) -> list[str]:
        self._step("our_paths")
        wanted = list(globs)
        return [p for p in self._ours() if is_path(p) and any(fnmatchcase(p, g) for g in wanted)]

    def _ours(self) -> list[str]:
        points = {mount.point for mount in self.kernel.mounts}
        ours = [place for place, kind in self.kernel.directories.items() if kind == "ours"]
        return [place for place in ours if str(self.mount_root / place) not in points]


class FakePathWatch:
    """A watch for changes of a name in the mount root."""

    def __init__(self, kernel: FakeKernel, name: str) -> None:
        self.name = name
        self._kernel = kernel
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        kernel.path_watches.append(self)

    def fileno(self) -> int:
        return self._event

    def change(self) -> None:
        os.eventfd_write(self._event, 1)

    def read(self) -> list[str | None]:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return []
        return [None]

    def close(self) -> None:
        self._kernel.path_watches.remove(self)
        os.close(self._event)


class FakeEmptiedDisk:
    """A disk that a process holds, or has held."""

    def __init__(self, process: FakeProcess, volume: Volume) -> None:
        self.disk = volume
        self._process = process
        self._kernel = process.kernel

    def power_off(self) -> None:
        self._process._step("power_off", self.disk.name)
        self._kernel.powered_off.append(self.disk.name)

    def close(self) -> None:
        self._process._step("close_disk", self.disk.name)
        if self._kernel.held_disks.get(self.disk.id.diskseq) is self._process:
            del self._kernel.held_disks[self.disk.id.diskseq]

    def restore(self) -> list[Volume]:
        self._process._step("restore", self.disk.name)
        holder = self._kernel.held_disks.get(self.disk.id.diskseq, self._process)
        if holder is not self._process or self._kernel.disk_users.get(self.disk.id.diskseq):
            raise VolumeBusyError(self.disk.node, ())
        self._kernel.held_disks.pop(self.disk.id.diskseq, None)
        return self._kernel.read_partitions(self.disk.id.diskseq)


class FakeWriteWatch:
    """A process's watch for failed writes to a mapping."""

    def __init__(self, process: FakeProcess, mapping: FakeMapping) -> None:
        self.lost = ""
        self.has_errors = False
        self._process = process
        self._mapping = mapping
        mapping.watches += 1
        process.watches.append(self)

    def mounted(self) -> None:
        """Nothing was counted before."""

    def look(self) -> None:
        self._process._step("look", self._mapping.name)
        if self._mapping.errors:
            self.has_errors = True
            self.note("the filesystem has counted errors")

    def note(self, what: str) -> None:
        self.lost = self.lost or what

    def check(self) -> None:
        self._flush(self._mapping.name)

    def _flush(self, name: str) -> None:
        written_back = self._process.kernel.written_back
        try:
            self._process._step("flush", name)
        except KernelError as error:
            if error.errno == errno.EMFILE:
                raise
            written_back(self._mapping, True)
            self.lost = self.lost or f"not all has reached the medium: {error}"
        else:
            written_back(self._mapping, False)

    def unmount(
        self, place: str, which: Mounts, *, anyway: bool, before: Callable[[], None] = lambda: None
    ) -> None:
        self._flush(place)
        if self.lost and not anyway:
            raise WritesLostError(self.lost)
        before()
        self._process.unmount(place, which)

    def close(self) -> None:
        if self in self._process.watches:
            self._process.watches.remove(self)
            self._mapping.watches -= 1
            self._process.kernel.remove_if_closed(self._mapping)

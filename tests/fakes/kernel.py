"""A kernel in memory: media, keys, mappings, mounts, and processes that die and start again."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

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
)
from caam_hotplug.formats.blobs import Backend, Blob, Encrypted, Tagged, Trusted
from caam_hotplug.formats.crypt_table import CryptTarget
from caam_hotplug.kernel.medium_sample import Ciphertexts, Plaintexts
from caam_hotplug.model import (
    Bus,
    DeviceNumber,
    DevType,
    Holder,
    Mapping,
    Mount,
    SecretBytes,
    Sectors,
    Volume,
    VolumeId,
)
from caam_hotplug.names import DM_UUID_PREFIX, MOUNT_ROOT

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
    is_held: bool = False
    """Whether its I/O waits."""
    holders: int = 0
    is_removed_at_last_close: bool = False


@dataclass
class FakeMedium:
    """Content of a volume: a filesystem that is visible only under one key."""

    volume: Volume
    key: bytes = KEY
    filesystem: str | None = "ext4"
    writes: int = 0
    remembered: str = ""
    """State that the agent has recorded for its volume."""
    is_locked: bool = False
    """Whether a program has locked its disk for exclusive use."""
    is_refusing: bool = False
    """Whether its reader refuses to read until its disk is opened anew."""
    identifier: bytes = b"a GUID"
    """Identifier of its partition table."""


@dataclass
class FakeKernel:
    """State of the machine. Every step may be watched, delayed or made to fail."""

    media: dict[str, FakeMedium] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    backend: Backend = "tagged"
    """Seal method of the blobs."""
    mappings: dict[str, FakeMapping] = field(default_factory=dict)
    mounts: list[Mount] = field(default_factory=list)
    users: dict[str, int] = field(default_factory=dict)
    """Number of processes in each mount point, by name."""
    fatal_signals: set[int] = field(default_factory=set)
    """Signals that end the processes."""
    powered_off: list[str] = field(default_factory=list)
    """Names of volumes whose medium was powered off."""
    directories: dict[str, str] = field(default_factory=dict)
    """Kind of each name in the mount root: 'ours', 'board' (empty) or 'content'."""
    keyrings: list[dict[str, bytes]] = field(default_factory=list)
    diskseq: int = 0
    minor: int = 0
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
            del self.media[name]

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
                mapping.holders = 0
                self._remove_if_closed(mapping)

    def leftovers(self) -> list[str]:
        """List what the agent has in the kernel; empty when no medium is present."""
        keys = [f"key {name}" for keyring in self.keyrings for name in keyring]
        dirs = [f"directory {n}" for n, kind in self.directories.items() if kind == "ours"]
        mounts = [f"mount {mount.point}" for mount in self.mounts]
        return keys + [f"mapping {name}" for name in self.mappings] + mounts + dirs

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
        return mapping.holders + sum(m.number == mapping.number for m in self.mounts)

    def _remove_if_closed(self, mapping: FakeMapping) -> None:
        if mapping.is_removed_at_last_close and not self.open_count(mapping):
            self.mappings.pop(mapping.name, None)


class FakeProcess:
    """The kernel as one agent process sees it; implements the interface of `kernel.api.Kernel`."""

    def __init__(self, kernel: FakeKernel, keyring: dict[str, bytes]) -> None:
        self.kernel = kernel
        self.blob_directory = Path("/data/caam")
        self.mount_root = MOUNT_ROOT
        self.is_running = True
        self._keyring = keyring

    def die(self) -> None:
        """End as after kill -9: the keys of the process's keyring are lost, all else stays."""
        self.is_running = False
        self.kernel.keyrings = [k for k in self.kernel.keyrings if k is not self._keyring]

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

    def identify(self, volume: Volume) -> Volume:
        self._step("identify", volume.name)
        medium = self.kernel.media.get(volume.name)
        if volume.awaits_udev and medium is not None:
            if medium.is_locked:
                raise DeviceLockedError(f"use {medium.volume.node}: it is locked")
            there = medium.volume
            read = {"partlabel": there.partlabel, "parttype": there.parttype}
            return replace(volume, identified=True, **read)
        object.__setattr__(volume, "identified", True)
        return volume

    def remember(self, volume: Volume, state: str) -> None:
        medium = self.kernel.media.get(volume.name)
        if medium is not None and medium.volume.id == volume.id:
            medium.remembered = state

    def remembered(self, volume: Volume) -> str:
        medium = self.kernel.media.get(volume.name)
        same = medium is not None and medium.volume.id == volume.id
        return medium.remembered if medium is not None and same else ""

    def require_unused(self, volume: Volume) -> None:
        self._step("require_unused", volume.name)
        for mapping in self.kernel.mappings.values():
            target = CryptTarget.from_line(mapping.live or "")
            if target is not None and target.device == volume.number:
                raise DeviceInUseError(f"use {volume.node}: mapping {mapping.name} lies on it")

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
        return Mapping(mapping.name, mapping.uuid, mapping.number, table, open_count)

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
        mapping.is_held = False
        if mapping.inactive is not None:
            mapping.live, mapping.key = mapping.inactive, mapping.inactive_key
            mapping.inactive = mapping.inactive_key = None

    def load_error_table(self, name: str, size: Sectors) -> None:
        self._step("load_error_table", name)
        mapping = self._mapping(name, "load error table of mapping")
        mapping.live, mapping.key, mapping.is_held = f"0 {size} error", None, False

    def remove_mapping(self, name: str) -> None:
        self._step("remove_mapping", name)
        with self.kernel.lock:
            mapping = self.kernel.mappings.get(name)
            if mapping is not None:
                mapping.is_removed_at_last_close = True
                self.kernel._remove_if_closed(mapping)

    def keep_mapping(self, name: str) -> None:
        self._step("keep_mapping", name)
        self._mapping(name, "keep mapping").is_removed_at_last_close = False

    def hold_mapping(self, name: str) -> None:
        self._step("hold_mapping", name)
        self._mapping(name, "hold mapping").is_held = True

    def plaintexts(self, mapping: Mapping) -> Plaintexts:
        self._step("plaintexts", mapping.name)
        fake = self._mapping(mapping.name, "read")
        assert not fake.is_held, "nothing would answer"
        target = CryptTarget.from_line(fake.live or "")
        medium = None if target is None else self.kernel.medium(target.device)
        if medium is None or medium.is_refusing:
            return (None,)
        return (hash((medium.identifier, fake.key)),)

    def ciphertexts(self, volume: Volume, mapping: Mapping) -> Ciphertexts:
        self._step("ciphertexts", volume.name)
        medium = self.kernel.media.get(volume.name)
        if medium is None:
            raise KernelError("open", volume.node, errno.ENOENT)
        medium.is_refusing = False
        return Ciphertexts(medium.identifier, (1,))

    def probe(self, node: str, filesystems: Sequence[str]) -> str | None:
        at_node = (
            m.name for m in self.kernel.mappings.values() if self._as_mapping(m).node == node
        )
        self._step("probe", next(at_node, node))
        mapping = self.kernel.by_node(node)
        medium = self.kernel.under(mapping)
        shown = medium.filesystem if medium.key == mapping.key else None
        return shown if shown in filesystems else None

    def mount(
        self,
        node: str,
        kind: str,
        name: str,
        *,
        read_only: bool,
        options: Sequence[str],
        filesystem_options: Sequence[str],
    ) -> None:
        assert options is not None
        assert filesystem_options is not None
        with self.kernel.lock:
            found = self.kernel.directories.setdefault(name, "ours")
            point = str(self.mount_root / name)
            if found == "content" or any(m.point == point for m in self.kernel.mounts):
                raise MountPointOccupiedError(f"{point} is not empty")
            self._step("mount", name)
            mapping = self._mountable(node, kind, read_only=read_only)
            self.kernel.mounts.append(Mount(mapping.number, point, node, read_only, kind))

    def _mountable(self, node: str, kind: str, *, read_only: bool) -> FakeMapping:
        try:
            mapping = self.kernel.by_node(node)
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

    def holders(self, mapping: Mapping) -> list[Holder]:
        self._step("holders", mapping.name)
        with self.kernel.lock:
            fake = self.kernel.mappings[mapping.name]
            points = [m.point for m in self.kernel.mounts if m.number == mapping.number]
            users = fake.holders + sum(self.kernel.users.get(Path(p).name, 0) for p in points)
            return [Holder(pid, "program", "has a file open") for pid in range(1, users + 1)]

    def end_holders(self, mapping: Mapping, number: int, within_s: float) -> None:
        self._step("end_holders", mapping.name)
        assert within_s > 0
        with self.kernel.lock:
            for mount in self.kernel.mounts:
                if mount.number == mapping.number and number in self.kernel.fatal_signals:
                    self.kernel.users.pop(Path(mount.point).name, None)

    def power_off(self, volume: Volume) -> None:
        self._step("power_off", volume.name)
        self.kernel.powered_off.append(volume.name)

    def flush(self, name: str, node: str) -> None:
        assert name
        self._step("flush", name)

    def unmount(self, name: str, *, lazily: bool = False) -> None:
        self._step("detach" if lazily else "unmount", name)
        point = str(self.mount_root / name)
        with self.kernel.lock:
            mount = next((m for m in reversed(self.kernel.mounts) if m.point == point), None)
            if mount is None:
                return
            if not any(m.number == mount.number for m in self.kernel.mappings.values()):
                self.kernel.mounts.remove(mount)  # mounted by another program
                return
            users = self.kernel.users.get(name, 0)
            if users and not lazily:
                raise MountBusyError("unmount", point, errno.EBUSY)
            self.kernel.mounts.remove(mount)
            self.kernel.users.pop(name, None)
            mapping = next(m for m in self.kernel.mappings.values() if m.number == mount.number)
            mapping.holders += users
            self.kernel._remove_if_closed(mapping)

    def remove_mount_point(self, name: str) -> None:
        self._step("remove_mount_point", name)
        point = str(self.mount_root / name)
        if any(mount.point == point for mount in self.kernel.mounts):
            return
        if self.kernel.directories.get(name) == "ours":
            del self.kernel.directories[name]

    def our_mount_points(self) -> list[str]:
        self._step("our_mount_points")
        points = {mount.point for mount in self.kernel.mounts}
        kinds = self.kernel.directories.items()
        ours = [name for name, kind in kinds if kind == "ours"]
        return [name for name in ours if str(self.mount_root / name) not in points]

"""What the agent talks about: volumes, mappings, mounts, states and events. Values only."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Literal, NewType, NoReturn

from caam_hotplug.errors import shown

Sectors = NewType("Sectors", int)
"""A count of 512-byte sectors, whatever the device's own sector size."""
SECTOR_BYTES = 512

KeySerial = NewType("KeySerial", int)
KeyType = Literal["logon", "trusted", "encrypted"]
"""The kernel's type of a key that dm-crypt takes from a keyring (dm-crypt.rst)."""


class Bus(Enum):
    """What a medium is attached to, from the sysfs chain of its disk."""

    USB = "usb"
    MMC = "mmc"
    SCSI = "scsi"
    ATA = "ata"
    NVME = "nvme"
    VIRTIO = "virtio"
    LOOP = "loop"
    OTHER = "other"


def number(text: str) -> int:
    """The number, as the kernel prints an unsigned one. Raises: ValueError for any other form."""
    if not _is_number(text):
        raise ValueError(f"expected a whole number, found {text[:20]!a}")
    return int(text)


class DevType(Enum):
    """A partition, or a whole disk."""

    PARTITION = "partition"
    DISK = "disk"


@dataclass(frozen=True, slots=True, order=True)
class VolumeId:
    """Which volume of this boot: the disk's sequence number and the partition on it.

    The kernel gives every insertion a new number (`/sys/block/X/diskseq`), so the same `sdb1`
    two seconds later is another volume.
    """

    diskseq: int
    partition: int
    """The partition's number, 0 for a whole disk."""

    def __str__(self) -> str:
        return f"{self.diskseq}-{self.partition}"

    @classmethod
    def from_text(cls, text: str) -> VolumeId | None:
        """The inverse of `str()`, or None if the text has another form."""
        diskseq, _, partition = text.partition("-")
        if not (_is_number(diskseq) and _is_number(partition)):
            return None
        return cls(int(diskseq), int(partition))


def _is_number(text: str) -> bool:
    """Whether it is what the kernel prints for an unsigned number, which int() is wider than."""
    return len(text) <= 20 and text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")


@dataclass(frozen=True, slots=True, order=True)
class DeviceNumber:
    """A block device's dev_t."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"

    @classmethod
    def from_text(cls, text: str) -> DeviceNumber:
        """Parse `8:17`, as sysfs and mountinfo spell it.

        Raises: ValueError for any other form.
        """
        major, _, minor = text.removesuffix("\n").partition(":")
        if not (_is_number(major) and _is_number(minor)):
            raise ValueError(f"expected a device number such as 8:17, found {text[:20]!a}")
        return cls(int(major), int(minor))


@dataclass(frozen=True, slots=True)
class Volume:
    """One partition or whole disk, as it is at this moment.

    Texts are what the medium claims and therefore an attacker's; None means the medium or the
    kernel says nothing of it.
    """

    id: VolumeId
    name: str
    """The kernel's name, such as `sdb1`: for people; it identifies nothing."""
    number: DeviceNumber
    devtype: DevType
    size: Sectors
    bus: Bus
    removable: bool
    """The kernel's removable flag, or a bus that people plug (USB, MMC card slots)."""
    read_only: bool
    partlabel: str | None = None
    partuuid: str | None = None
    parttype: str | None = None
    label: str | None = None
    uuid: str | None = None
    serial: str | None = None
    vendor: str | None = None
    model: str | None = None
    path: str | None = None
    """udev's ID_PATH: the socket it sits in."""
    opted_out: bool = False
    """A udev rule of the board keeps the agent off this device."""
    identified: bool = True
    """False where no udevd told label and identifiers, so that they must be probed."""
    awaits_udev: bool = False
    """The kernel has told of it and udev has yet to: what only udev knows is None until then."""

    @property
    def node(self) -> str:
        """The device node that devtmpfs keeps."""
        return f"/dev/{self.name}"

    def __str__(self) -> str:
        label = "" if self.partlabel is None else f"{self.partlabel!a} "
        return f"{label}({self.name}, {self.id})"


@dataclass(frozen=True, slots=True)
class Appeared:
    """The volume is present: it arrived, or something about it may have changed."""

    volume: Volume


@dataclass(frozen=True, slots=True)
class Announced:
    """The volume is present, and all that is known of it is what the kernel has told."""

    volume: Volume


@dataclass(frozen=True, slots=True)
class Disappeared:
    """No device sits at this kernel name any more."""

    name: str


@dataclass(frozen=True, slots=True)
class EventsLost:
    """The kernel dropped events: only a look at all of sysfs tells what is true."""


Event = Appeared | Announced | Disappeared | EventsLost


@dataclass(frozen=True, slots=True)
class Mapping:
    """A live device-mapper device."""

    name: str
    uuid: str
    number: DeviceNumber
    table: tuple[str, ...]
    """Its target lines as `START LENGTH TYPE PARAMETERS`; empty while none is live."""
    open_count: int

    @property
    def node(self) -> str:
        """The device node that devtmpfs makes at once, whether or not udevd runs."""
        return f"/dev/dm-{self.number.minor}"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo, as far as it matters here (proc_pid_mountinfo(5))."""

    number: DeviceNumber
    point: str
    source: str
    read_only: bool
    filesystem: str
    identity: int = field(default=0, compare=False)
    """The kernel's number of the mount: the same in no two places or namespaces."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a filesystem from being unmounted."""

    pid: int
    command: str
    holds: str
    """What of it, in words, such as `has /run/media/x/file open`."""
    is_user: bool = True
    """Whether it uses the filesystem, or only keeps a copy of the mount."""

    def __str__(self) -> str:
        return f"pid {self.pid} ({shown(self.command)}) {shown(self.holds)}"


class State(Enum):
    """What is true of a volume, as published. The meanings are in the README's table."""

    IGNORED = "ignored"
    WAITING = "waiting"
    UNLOCKING = "unlocking"
    MOUNTING = "mounting"
    MOUNTED = "mounted"
    UNLOCKED = "unlocked"
    DETACHING = "detaching"
    LOCKED = "locked"
    EJECTED = "ejected"
    FAILED = "failed"
    CONFLICT = "conflict"
    STUCK = "stuck"
    REMOVED_UNSAFELY = "removed-unsafely"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Entry:
    """What is true of one volume, as it is published."""

    volume: Volume
    state: State
    reason: str = ""
    rule: str = ""
    """The name of the rule that matches it; empty if none does."""
    blob: str = ""
    """The path of its blob; empty like the rule."""
    mapping_name: str = ""
    """Of a mapping that is live, with its node; else empty."""
    mapping_node: str = ""
    mount_point: str = ""
    """Empty while it is not mounted, like what follows."""
    filesystem: str = ""
    read_only: bool = False
    since: float = field(default=0.0, compare=False)
    """When it came to this state, in seconds of CLOCK_REALTIME."""
    steps: abc.Mapping[str, float] = field(default_factory=dict)
    """How long each step of its last unlocking took, in seconds."""


class SecretBytes:
    """Key bytes in a buffer that is overwritten on exit and never printed, copied or pickled."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: bytearray) -> None:
        self.buffer = buffer

    def __enter__(self) -> SecretBytes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wipe()

    def __len__(self) -> int:
        return len(self.buffer)

    def __repr__(self) -> str:
        return f"<{len(self.buffer)} secret bytes>"

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Copies, which pickle, copy and dataclasses.asdict make, would not be overwritten."""
        raise TypeError("secret bytes are not copied")

    def wipe(self) -> None:
        """Overwrite the bytes in place."""
        self.buffer[:] = bytes(len(self.buffer))


@dataclass(frozen=True, slots=True)
class KeyReference:
    """A key in a keyring, as a crypt table refers to it; not the key."""

    type: KeyType
    length: int
    """The payload's, in bytes, which the table must say."""

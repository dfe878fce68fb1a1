"""Values that every part of the agent shares: volumes, mappings, mounts, states, events."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NewType, NoReturn

from caam_hotplug.errors import shown

Sectors = NewType("Sectors", int)
"""A count of 512-byte sectors, whatever the device's own sector size."""
SECTOR_BYTES = 512

KeyType = Literal["logon", "trusted", "encrypted"]
"""Type of a key that dm-crypt takes from a keyring (dm-crypt.rst)."""


class Bus(Enum):
    """Bus that a medium is attached to, from the sysfs chain of its disk."""

    USB = "usb"
    MMC = "mmc"
    SCSI = "scsi"
    ATA = "ata"
    NVME = "nvme"
    VIRTIO = "virtio"
    LOOP = "loop"
    OTHER = "other"


def number(text: str) -> int:
    """Parse an unsigned number as the kernel prints it. Raises: ValueError for any other form."""
    if not _is_number(text):
        raise ValueError(f"expected a whole number, found {text[:20]!a}")
    return int(text)


class DevType(Enum):
    PARTITION = "partition"
    DISK = "disk"


@dataclass(frozen=True, slots=True, order=True)
class VolumeId:
    """Identity of a volume within this boot: the disk's sequence number and the partition.

    The kernel gives every insertion a new number: the same `sdb1` later is another volume.
    """

    diskseq: int
    partition: int
    """Number of the partition, 0 for a whole disk."""

    def __str__(self) -> str:
        return f"{self.diskseq}-{self.partition}"

    @classmethod
    def from_text(cls, text: str) -> VolumeId | None:
        """Parse what `str()` returns; None for any other form."""
        diskseq, _, partition = text.partition("-")
        if not (_is_number(diskseq) and _is_number(partition)):
            return None
        return cls(int(diskseq), int(partition))


def _is_number(text: str) -> bool:
    """Whether the kernel would print an unsigned number so; int() takes more forms."""
    return len(text) <= 20 and text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")


@dataclass(frozen=True, slots=True, order=True)
class DeviceNumber:
    """Device number (dev_t) of a block device."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"

    @classmethod
    def from_text(cls, text: str) -> DeviceNumber:
        """Parse `8:17`, as sysfs and mountinfo spell it. Raises: ValueError for any other form."""
        major, _, minor = text.removesuffix("\n").partition(":")
        if not (_is_number(major) and _is_number(minor)):
            raise ValueError(f"expected a device number such as 8:17, found {text[:20]!a}")
        return cls(int(major), int(minor))


@dataclass(frozen=True, slots=True)
class Volume:
    """A partition or whole disk, as it is at this moment.

    An attacker may have written the texts. None: neither the medium nor the kernel has the fact.
    """

    id: VolumeId
    name: str
    """Name that the kernel gives, such as `sdb1`. Users read it; it identifies nothing."""
    number: DeviceNumber
    devtype: DevType
    size: Sectors
    bus: Bus
    removable: bool
    """Whether users may pull it: the kernel's removable flag, USB, or an MMC card slot."""
    read_only: bool
    partlabel: str | None = None
    partuuid: str | None = None
    parttype: str | None = None
    label: str | None = None
    uuid: str | None = None
    header: str | None = None
    """Type of a header that makes it another program's, such as `crypto_LUKS`, LVM's or md's."""
    serial: str | None = None
    vendor: str | None = None
    model: str | None = None
    path: str | None = None
    """Socket that the disk sits in: udev's ID_PATH."""
    opted_out: bool = False
    """Whether a udev rule of the board keeps the agent off this device."""
    identified: bool = True
    """Whether udev has reported label and identifiers; otherwise they must be probed."""
    awaits_udev: bool = False
    """Whether udev has yet to report it; until then all facts that only udev knows are None."""

    @property
    def node(self) -> str:
        """Device node that devtmpfs keeps."""
        return f"/dev/{self.name}"

    def __str__(self) -> str:
        label = "" if self.partlabel is None else f"{self.partlabel!a} "
        return f"{label}({self.name}, {self.id})"


@dataclass(frozen=True, slots=True)
class Appeared:
    """A volume is present: it arrived, or one of its facts may have changed."""

    volume: Volume


@dataclass(frozen=True, slots=True)
class Announced:
    """A volume is present, and only the kernel has reported it so far."""

    volume: Volume


@dataclass(frozen=True, slots=True)
class Disappeared:
    """No device has this kernel name any more."""

    name: str


@dataclass(frozen=True, slots=True)
class EventsLost:
    """The kernel dropped events; only a scan of sysfs tells what is present."""


Event = Appeared | Announced | Disappeared | EventsLost


@dataclass(frozen=True, slots=True)
class Mapping:
    """A live device-mapper device; reads and writes of a suspended one wait."""

    name: str
    uuid: str
    number: DeviceNumber
    table: tuple[str, ...]
    """Target lines as `START LENGTH TYPE PARAMETERS`; empty while none is live."""
    open_count: int
    is_suspended: bool = False
    is_removed_at_last_close: bool = False

    @property
    def node(self) -> str:
        """Device node that devtmpfs makes at once, whether or not udevd runs."""
        return f"/dev/dm-{self.number.minor}"


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo, as far as it matters here (proc_pid_mountinfo(5))."""

    number: DeviceNumber
    point: str
    source: str
    read_only: bool
    filesystem: str
    leaves_journal: bool = False
    """Whether it shows the medium without the changes that its journal may have."""
    is_filesystem_read_only: bool = field(default=False, compare=False)
    is_point_read_only: bool = field(default=False, compare=False)
    """Whether this mount is. A remount makes both read-only, an error the filesystem alone."""
    stops_at_errors: bool = field(default=False, compare=False)
    identity: int = field(default=0, compare=False)
    """Number that the kernel gives the mount: unique across places and namespaces."""
    parent: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a filesystem from being unmounted."""

    pid: int
    command: str
    holds: str
    """How the process holds it, in words, such as `has /run/media/x/file open`."""
    is_user: bool = True
    """Whether the process uses the filesystem; otherwise it only keeps a copy of the mount."""

    def __str__(self) -> str:
        return f"pid {self.pid} ({shown(self.command)}) {shown(self.holds)}"


class State(Enum):
    """State of a volume, as published. README.md has the meanings."""

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
    """Published status of a volume."""

    volume: Volume
    state: State
    reason: str = ""
    rule: str = ""
    """Name of the rule that matches it; empty if none does, like the path of its blob."""
    blob: str = ""
    mapping_name: str = ""
    """Name of its live mapping; empty without one, like the node."""
    mapping_node: str = ""
    mount_point: str = ""
    """Mount point; empty while it is not mounted, like the filesystem."""
    filesystem: str = ""
    read_only: bool = False
    since: float = field(default=0.0, compare=False)
    """When it came to this state, in seconds of CLOCK_REALTIME."""
    observed_at: float = field(default=0.0, compare=False)
    """As `since`: when the kernel was last asked."""
    steps: abc.Mapping[str, float] = field(default_factory=dict)
    """Seconds that each step of its last unlocking took."""
    is_parked: bool = False


class SecretBytes:
    """Key bytes in a buffer that is overwritten on exit and never printed, copied or pickled."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: bytearray) -> None:
        self.buffer = buffer

    def __enter__(self) -> SecretBytes:
        return self

    def __exit__(self, *_error: object) -> None:
        self.wipe()

    def __len__(self) -> int:
        return len(self.buffer)

    def __repr__(self) -> str:
        return f"<{len(self.buffer)} secret bytes>"

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse the copies of pickle, copy and asdict, which nobody would overwrite."""
        raise TypeError("secret bytes are not copied")

    def wipe(self) -> None:
        """Overwrite the bytes in place."""
        self.buffer[:] = bytes(len(self.buffer))


@dataclass(frozen=True, slots=True)
class KeyReference:
    """A key in a keyring, as a crypt table refers to it, with its bytes' number; not the key."""

    type: KeyType
    length: int

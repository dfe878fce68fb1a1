"""The kernel as a volume's lifecycle uses it: each call one step, synchronous, without policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

from caam_hotplug import names
from caam_hotplug.errors import BlobError, HotplugError, MasterKeyError, MountError, UnknownError
from caam_hotplug.formats.blobs import Backend, Blob, Encrypted, Trusted
from caam_hotplug.kernel import (
    blkid,
    blob_files,
    caam,
    changed_disk,
    device_xattr,
    devmapper,
    emptied_disk,
    error_table,
    inotify,
    keyring,
    medium_sample,
    mount,
    mount_directories,
    mountinfo,
    offline,
    open_files,
    sysfs,
    trusted,
)
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.mount_places import MountPlaces, Mounts
from caam_hotplug.kernel.open_volume import OpenVolume
from caam_hotplug.kernel.reserve import spent_on
from caam_hotplug.kernel.write_watch import WriteWatch
from caam_hotplug.model import DeviceNumber, Holder, Mapping, Mount, SecretBytes, Volume, VolumeId


class LinuxKernel:
    """This machine's kernel, for one blob directory and one mount root.

    Raises, in every method: KernelError and its subclasses. Worker: methods about mappings run on
    the dm worker, but for `load_error_table`; all others on any thread.
    """

    def __init__(
        self, blob_directory: Path, mount_root: Path, caam_device: Path = names.CAAM_DEVICE
    ) -> None:
        self.blob_directory = blob_directory
        self.mount_root = mount_root
        self._caam_device = caam_device
        self._places = MountPlaces(mount_root)

    def prepare(self) -> None:
        """Load what the first medium would wait for: libraries, and the kernel's modules.

        A failure is no error yet: a medium that needs the missing part reports it. Worker: dm.
        """
        with suppress(HotplugError, OSError):
            blkid.Blkid.open()
        with suppress(HotplugError, OSError):
            devmapper.target_version("crypt")

    def is_present(self, volume: Volume) -> bool:
        """Return whether the volume is still at its kernel name; also while that is not known."""
        try:
            found = sysfs.present_id(volume.name)
            return found == volume.id or (found is not None and offline.is_offline(volume.name))
        except UnknownError:
            return True

    def is_offline(self, volume: Volume) -> bool:
        """Return whether the kernel has taken the volume's disk offline. Raises: UnknownError."""
        return offline.is_offline(volume.name)

    def open_volume(self, volume: Volume) -> OpenVolume:
        """Open the volume's node, and read its labels and identifiers off the disk.

        Raises: DeviceLockedError if udev, too, waits for a program that has locked the disk.
        """
        return OpenVolume(volume)

    def remember(self, volume: Volume, text: str) -> None:
        """Store a text for the volume, for later runs of the agent, too; "" removes it."""
        device_xattr.mark(volume, text)

    def remembered(self, volume: Volume) -> str:
        """Return the text stored last, by any run of the agent; empty if there is none."""
        return device_xattr.marked(volume)

    def remembered_on(self, disk: Volume) -> list[str]:
        """Return the texts stored for the disk and its partitions, also for those that are gone."""
        return device_xattr.all_marked(disk)

    def read_blob(self, name: str, form: Backend | None = None) -> Blob:
        """Read the blob, in this form or in any. Raises: BlobMissingError, BlobError."""
        return blob_files.read(self.blob_directory, name, form)

    def import_blob(self, blob: bytes) -> SecretBytes:
        """Return the blob's tagged key, for the caller to wipe. Raises: BlobRejectedError."""
        return caam.import_blob(self._caam_device, blob)

    def add_key(self, description: str, payload: SecretBytes) -> None:
        """Add the logon key to the agent's session keyring."""
        keyring.add_key("logon", description, payload)

    def load_trusted_key(self, description: str, blob: Trusted, options: str) -> None:
        """Load the trusted key into the agent's session keyring. Raises: BlobRejectedError."""
        trusted.load_trusted(description, blob, options)

    def load_encrypted_key(self, description: str, blob: Encrypted, options: str) -> None:
        """Load the encrypted key into the agent's session keyring, and its master into none.

        Raises: MasterKeyError for the master, whose blob has its name; BlobRejectedError.
        """
        name = f"{blob.master}.bb"
        try:
            master = cast(Trusted, blob_files.read(self.blob_directory, name, "trusted"))
        except BlobError as error:
            raise MasterKeyError(f"load the master key {blob.master}: {error}") from error
        trusted.load_encrypted(description, blob, master, options)

    def has_key(self, description: str) -> bool:
        """Return whether the agent's session keyring has a key of that description."""
        return any(keyring.find_key(kind, description) is not None for kind in keyring.KEY_TYPES)

    def unlink_key(self, description: str) -> None:
        """Unlink the keys of that description from the agent's session keyring."""
        keyring.unlink_key(description)

    def find_mapping(self, uuid: str) -> Mapping | None:
        """Return the mapping with this DM-UUID, or None."""
        return devmapper.find(uuid)

    def our_mappings(self) -> list[Mapping]:
        """Return every mapping with our DM-UUID prefix."""
        with suppress(HotplugError):  # open from the start: later no descriptor may be left
            error_table.prepare()
        return devmapper.ours()

    def create_mapping(self, name: str, uuid: str) -> None:
        """Create a mapping of this name and DM-UUID, without a table."""
        devmapper.create(name, uuid)

    def load_table(self, name: str, line: str, *, read_only: bool) -> None:
        """Load the target line as the mapping's inactive table, which copies the key."""
        devmapper.load(name, line, read_only=read_only)

    def activate_mapping(self, name: str) -> None:
        """Make the table loaded last the live one."""
        devmapper.resume(name)

    def load_error_table(self, uuid: str) -> None:
        """Have all I/O of the mapping fail, if it has a table, and its key wiped. Any thread."""
        error_table.load(uuid)

    def has_error_table(self, uuid: str) -> bool:
        """Return whether the mapping's live table is an error table. It waits for no medium."""
        return error_table.is_live(uuid)

    def resume_mapping(self, name: str) -> None:
        """Resume a suspended mapping with its live table; a table that waits is dropped."""
        devmapper.clear(name)
        devmapper.resume(name)

    def remove_mapping(self, name: str) -> None:
        """Remove the mapping, at its last close if somebody holds it open."""
        devmapper.remove(name)

    def keep_mapping(self, name: str) -> None:
        """Cancel an earlier deferred removal of the mapping."""
        devmapper.keep(name)

    def plaintexts(self, mapping: Mapping) -> medium_sample.Plaintexts:
        """Return digests of what the mapping gives at a few places."""
        return medium_sample.plaintexts(mapping)

    def ciphertexts(self, volume: Volume, mapping: Mapping) -> medium_sample.Ciphertexts:
        """Return digests of what the medium has at the same places."""
        return medium_sample.ciphertexts(volume, mapping)

    def sample(self, volume: Volume, mapping: Mapping) -> medium_sample.Sample:
        """Return both as they were at one moment."""
        return medium_sample.sample(volume, mapping)

    def probe(self, node: str, filesystems: Sequence[str]) -> str | None:
        """Return the type of the device's filesystem if it is one of those allowed, else None."""
        return blkid.probe(node, filesystems)

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
        """Mount the filesystem at the place, a directory made if missing.

        Raises: MountPointOccupiedError; MountError.
        """
        with (
            reported_as("make mount point", str(self.mount_root / place), MountError),
            mount_directories.mount_point(self.mount_root, place) as target,
        ):
            if names.is_path(place):
                device_xattr.mark_place(node, place)
            mount.mount(
                node, kind, target, read_only=read_only, options=options,
                filesystem_options=filesystem_options,
            )  # fmt: skip
            self._places.keep(place, "..", target)

    def keep_place(self, place: str) -> None:
        """Keep the directory open that has the mount point, where the path leads to now."""
        with reported_as("look at", str((self.mount_root / place).parent), MountError):
            self._places.keep_seen(place)

    def point_of(self, place: str) -> str:
        """Return the path of the mount point, as the table of mounts has it."""
        return self._places.point(place)

    def place_of(self, mapping: Mapping) -> str:
        """Return the path outside the mount root that is noted as the agent's for it, or ""."""
        return device_xattr.marked_place(mapping.node)

    def note_place(self, mapping: Mapping, place: str) -> None:
        """Note that a mount of it at this path is the agent's; with "", that none is any more."""
        device_xattr.mark_place(mapping.node, place)

    def mounts(self) -> list[Mount]:
        """Return all mounts of this process's namespace."""
        return mountinfo.mounts()

    def holders(self, mapping: Mapping, also: DeviceNumber | None = None) -> list[Holder]:
        """Return who holds the mapping's filesystem, which may have `also` another number."""
        return open_files.find(mapping, also)

    def end_holders(self, mapping: Mapping, number: int, within_s: float) -> None:
        """Send every holder the signal, and wait until it has ended or its time is up."""
        open_files.end(mapping, number, within_s)

    def changed_disk(self, which: VolumeId, number: DeviceNumber) -> str | None:
        """Return the node of the volume's disk if that has another medium. Raises: UnknownError."""
        return changed_disk.node(which, number)

    def read_table(self, disk: str) -> None:
        """Have the kernel read the table of the disk's new medium."""
        changed_disk.read_table(disk)

    def disk_users(self, volume: Volume) -> list[str]:
        """Return who has mounted or mapped anything of the volume's disk, but for the agent."""
        return emptied_disk.users(volume)

    def has_partitions(self, disk: Volume) -> bool:
        """Return whether the kernel has a partition of the disk. Raises: UnknownError."""
        return emptied_disk.has_partitions(disk)

    def empty_disk(self, volume: Volume) -> emptied_disk.EmptiedDisk:
        """Hold the volume's disk, remove its partitions from the kernel, and flush its cache.

        Raises: VolumeBusyError with the users; then all is as before.
        """
        return emptied_disk.empty(volume)

    def watch_writes(self, mapping: Mapping) -> WriteWatch:
        """Watch the mapping for failed writes, until the watch is closed. It holds the mapping."""
        return WriteWatch(mapping, self.mount_root, self._places)

    def unmount(self, place: str, which: Mounts, *, lazily: bool = False) -> None:
        """Unmount the place, if one of these mounts is seen there. Raises: MountBusyError."""
        spent_on(partial(self._places.unmount, place, which, lazily=lazily))

    def remove_mount_point(self, place: str) -> None:
        """Remove the directory if we made it."""
        with reported_as("remove mount point", str(self.mount_root / place), MountError):
            spent_on(partial(self._places.remove, place))

    def why_occupied(self, place: str) -> str:
        """Return what makes `mount` refuse the place, in its words; empty if nothing does."""
        with reported_as("look at", str(self.mount_root / place), MountError):
            return mount_directories.why_occupied(self.mount_root, place)

    def watch_mount_point(self, place: str) -> inotify.Directory:
        """Watch the mount point, until the watch is closed. Raises: UnknownError."""
        return inotify.Directory(self.mount_root / place, removals=True)

    def our_mount_points(self) -> list[str]:
        """Return the directories in the mount root that we made and nothing is mounted on."""
        with reported_as("list mount points in", str(self.mount_root), MountError):
            return mount_directories.our_mount_points(self.mount_root)

    def our_paths(self, globs: Iterable[str]) -> list[str]:
        """As `our_mount_points`, of the paths outside the mount root that the globs stand for."""
        return mount_directories.our_paths(globs)

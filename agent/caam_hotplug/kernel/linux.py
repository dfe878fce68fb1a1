"""The kernel as a volume's lifecycle uses it: each call one step, synchronous, without policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from caam_hotplug import names
from caam_hotplug.errors import BlobError, HotplugError, MasterKeyError, MountError
from caam_hotplug.formats.blobs import Backend, Blob, Encrypted, Trusted
from caam_hotplug.kernel import (
    blkid,
    blob_files,
    caam,
    device_users,
    device_xattr,
    devmapper,
    keyring,
    medium_sample,
    mount,
    mountinfo,
    open_files,
    paths,
    power,
    sysfs,
    trusted,
)
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.model import Holder, Mapping, Mount, SecretBytes, Sectors, Volume


class LinuxKernel:
    """This machine's kernel, for one blob directory and one mount root.

    Raises, in every method: KernelError and its subclasses. Worker: methods about mappings run on
    the dm worker, all others on any thread.
    """

    def __init__(
        self, blob_directory: Path, mount_root: Path, caam_device: Path = names.CAAM_DEVICE
    ) -> None:
        self.blob_directory = blob_directory
        self.mount_root = mount_root
        self._caam_device = caam_device

    def prepare(self) -> None:
        """Load what the first medium would wait for: libraries, and the kernel's modules.

        A failure is no error yet: the first medium that needs the missing part reports it.
        Worker: dm.
        """
        with suppress(HotplugError, OSError):
            blkid.Blkid.open()
        with suppress(HotplugError, OSError):
            devmapper.target_version("crypt")

    def is_present(self, volume: Volume) -> bool:
        """Return whether the volume is still at its kernel name."""
        return sysfs.present_id(volume.name) == volume.id

    def identify(self, volume: Volume) -> Volume:
        """Return the volume with its labels and identifiers, read off the medium.

        If it awaits udev, those are the partition table's; udev will report its contents. Raises:
        DeviceLockedError if udev, too, waits for a program that has locked the disk.
        """
        if volume.awaits_udev:
            device_users.require_unlocked(volume.name)
        found = blkid.identify(volume.node, contents=not volume.awaits_udev)
        return replace(
            volume,
            partlabel=found.partlabel,
            partuuid=found.partuuid,
            parttype=found.parttype,
            label=found.label,
            uuid=found.uuid,
            identified=True,
        )

    def remember(self, volume: Volume, state: str) -> None:
        """Store the state on the volume's node, for later runs of the agent, too; "" removes it."""
        device_xattr.mark(volume, state)

    def remembered(self, volume: Volume) -> str:
        """Return the state stored last, by any run of the agent; empty if there is none."""
        return device_xattr.marked(volume)

    def require_unused(self, volume: Volume) -> None:
        """Raise DeviceInUseError with the users if something else uses the volume."""
        device_users.require_unused(volume)

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
        found = (keyring.find_key(kind, description) for kind in keyring.KEY_TYPES)
        return any(serial is not None for serial in found)

    def unlink_key(self, description: str) -> None:
        """Unlink the keys of that description from the agent's session keyring."""
        keyring.unlink_key(description)

    def find_mapping(self, uuid: str) -> Mapping | None:
        """Return the mapping with this DM-UUID, or None."""
        return devmapper.find(uuid)

    def our_mappings(self) -> list[Mapping]:
        """Return every mapping with our DM-UUID prefix."""
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

    def load_error_table(self, name: str, size: Sectors) -> None:
        """Replace the table with an error table: all I/O fails, and the kernel wipes the key."""
        devmapper.load_error_table(name, size)

    def remove_mapping(self, name: str) -> None:
        """Remove the mapping, at its last close if somebody holds it open."""
        devmapper.remove(name)

    def keep_mapping(self, name: str) -> None:
        """Cancel an earlier deferred removal of the mapping."""
        devmapper.keep(name)

    def hold_mapping(self, name: str) -> None:
        """Have all I/O of the mapping wait until it is activated again."""
        devmapper.suspend(name)

    def plaintexts(self, mapping: Mapping) -> medium_sample.Plaintexts:
        """Return digests of what the mapping gives at a few places."""
        return medium_sample.plaintexts(mapping)

    def ciphertexts(self, volume: Volume, mapping: Mapping) -> medium_sample.Ciphertexts:
        """Return digests of what the medium has at the same places."""
        return medium_sample.ciphertexts(volume, mapping)

    def probe(self, node: str, filesystems: Sequence[str]) -> str | None:
        """Return the type of the device's filesystem if it is one of those allowed, else None."""
        return blkid.probe(node, filesystems)

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
        """Mount the filesystem on `name` in the mount root, a directory made if missing.

        Raises: MountPointOccupiedError; MountError.
        """
        point = self.mount_root / name
        with (
            reported_as("make mount point", str(point), MountError),
            paths.mount_point(self.mount_root, name) as target,
        ):
            mount.mount(
                node,
                kind,
                target,
                read_only=read_only,
                options=options,
                filesystem_options=filesystem_options,
            )

    def mounts(self) -> list[Mount]:
        """Return all mounts of this process's namespace."""
        with reported_as("read", "/proc/self/mountinfo", MountError):
            return mountinfo.mounts()

    def holders(self, mapping: Mapping) -> list[Holder]:
        """Return the holders of the mapping's filesystem, as far as this process can see them."""
        return open_files.find(mapping)

    def end_holders(self, mapping: Mapping, number: int, within_s: float) -> None:
        """Send every holder the signal, and wait until it has ended or its time is up."""
        open_files.end(mapping, number, within_s)

    def power_off(self, volume: Volume) -> None:
        """Stop the volume's disk and switch its USB port off. Raises: DeviceInUseError."""
        power.off(volume)

    def flush(self, name: str, node: str) -> None:
        """Write what the mount point's filesystem has cached to its medium, the device `node`."""
        mount.flush(str(self.mount_root / name), node)

    def unmount(self, name: str, *, lazily: bool = False) -> None:
        """Unmount `name` in the mount root. Raises: MountBusyError."""
        point = self.mount_root / name
        try:
            with (
                reported_as("unmount", str(point), MountError),
                paths.directory(self.mount_root) as root,
            ):
                mount.unmount(f"/proc/self/fd/{root}/{name}", lazily=lazily)
        except MountError as error:
            raise type(error)("unmount", str(point), error.errno or 0) from error

    def remove_mount_point(self, name: str) -> None:
        """Remove the directory if we made it."""
        with reported_as("remove mount point", str(self.mount_root / name), MountError):
            paths.remove_mount_point(self.mount_root, name)

    def our_mount_points(self) -> list[str]:
        """Return the directories that we made and that nothing is mounted on."""
        with reported_as("list mount points in", str(self.mount_root), MountError):
            return paths.our_mount_points(self.mount_root)

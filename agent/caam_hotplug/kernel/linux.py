"""The kernel as a volume's life uses it: each call one step, synchronous, without policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    mount,
    mountinfo,
    open_files,
    paths,
    power,
    sysfs,
    trusted,
)
from caam_hotplug.model import Holder, Mapping, Mount, SecretBytes, Sectors, Volume


@contextmanager
def _said(operation: str, path: Path) -> Iterator[None]:
    """A path that cannot be walked is told with what was wanted of it. Raises: MountError."""
    try:
        yield
    except HotplugError:
        raise
    except OSError as error:
        raise MountError(operation, str(path), error.errno or 0) from error


class LinuxKernel:
    """This machine's kernel, for one blob directory and one mount root.

    Raises, in every method: KernelError and its kin. Lane: methods that speak of mappings run on
    the dm lane, all others on any thread.
    """

    def __init__(
        self, blob_directory: Path, mount_root: Path, caam_device: Path = names.CAAM_DEVICE
    ) -> None:
        self.blob_directory = blob_directory
        self.mount_root = mount_root
        self._caam_device = caam_device

    def prepare(self) -> None:
        """What the first medium would wait for is there: libraries, and the kernel's modules.

        What is missing the first medium tells, which is asked for nothing if none ever comes.
        Lane: dm.
        """
        with suppress(HotplugError, OSError):
            blkid.Blkid.open()
        with suppress(HotplugError, OSError):
            devmapper.target_version("crypt")

    def is_present(self, volume: Volume) -> bool:
        """Whether the volume still sits where it sat."""
        return sysfs.present_id(volume.name) == volume.id

    def identify(self, volume: Volume) -> Volume:
        """The volume with what it says of itself, read off the medium.

        If it awaits udev, that is what the partition table has; what lies on it udev will tell.
        Raises: DeviceLockedError if udev, too, waits for whoever has the disk to himself.
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
        """The volume is in this state until it leaves, whatever becomes of the agent; "": none."""
        device_xattr.mark(volume, state)

    def remembered(self, volume: Volume) -> str:
        """The state that was said of it last, by any run of the agent; empty if none was."""
        return device_xattr.marked(volume)

    def require_unused(self, volume: Volume) -> None:
        """Nothing else uses the volume. Raises: DeviceInUseError, which says who."""
        device_users.require_unused(volume)

    def read_blob(self, name: str, form: Backend | None = None) -> Blob:
        """The blob, in this form or in any. Raises: BlobMissingError, BlobError."""
        return blob_files.read(self.blob_directory, name, form)

    def import_blob(self, blob: bytes) -> SecretBytes:
        """The blob's tagged key, for the caller to wipe. Raises: BlobRejectedError."""
        return caam.import_blob(self._caam_device, blob)

    def add_key(self, description: str, payload: SecretBytes) -> None:
        """The logon key is in the agent's session keyring."""
        keyring.add_key("logon", description, payload)

    def load_trusted_key(self, description: str, blob: Trusted, options: str) -> None:
        """The trusted key is in the agent's session keyring. Raises: BlobRejectedError."""
        trusted.load_trusted(description, blob, options)

    def load_encrypted_key(self, description: str, blob: Encrypted, options: str) -> None:
        """The encrypted key is in the agent's session keyring, and its master in none.

        Raises: MasterKeyError for the master, whose blob has its name; BlobRejectedError.
        """
        name = f"{blob.master}.bb"
        try:
            master = cast(Trusted, blob_files.read(self.blob_directory, name, "trusted"))
        except BlobError as error:
            raise MasterKeyError(f"load the master key {blob.master}: {error}") from error
        trusted.load_encrypted(description, blob, master, options)

    def has_key(self, description: str) -> bool:
        """Whether the agent's session keyring has a key of that description."""
        found = (keyring.find_key(kind, description) for kind in keyring.KEY_TYPES)
        return any(serial is not None for serial in found)

    def unlink_key(self, description: str) -> None:
        """No key of that description is in the agent's session keyring."""
        keyring.unlink_key(description)

    def find_mapping(self, uuid: str) -> Mapping | None:
        """The mapping with this DM-UUID, or None."""
        return devmapper.find(uuid)

    def our_mappings(self) -> list[Mapping]:
        """Every mapping with our DM-UUID prefix."""
        return devmapper.ours()

    def create_mapping(self, name: str, uuid: str) -> None:
        """A mapping of this name and DM-UUID exists, without a table."""
        devmapper.create(name, uuid)

    def load_table(self, name: str, line: str, *, read_only: bool) -> None:
        """The mapping has the target line as its inactive table, and its own copy of the key."""
        devmapper.load(name, line, read_only=read_only)

    def activate_mapping(self, name: str) -> None:
        """The table loaded last is live."""
        devmapper.resume(name)

    def poison_mapping(self, name: str, size: Sectors) -> None:
        """All I/O of the mapping fails; its key is wiped from the kernel."""
        devmapper.poison(name, size)

    def remove_mapping(self, name: str) -> None:
        """The mapping is gone, or goes when its last holder closes it."""
        devmapper.remove(name)

    def keep_mapping(self, name: str) -> None:
        """An earlier deferred removal of the mapping is called off."""
        devmapper.keep(name)

    def probe(self, node: str, filesystems: Sequence[str]) -> str | None:
        """The allowed filesystem that lies on the device, or None."""
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
        """The filesystem is mounted on `name` in the mount root, a directory made if missing.

        Raises: MountPointOccupiedError; MountError.
        """
        point = self.mount_root / name
        with _said("make mount point", point), paths.mount_point(self.mount_root, name) as target:
            mount.mount(
                node,
                kind,
                target,
                read_only=read_only,
                options=options,
                filesystem_options=filesystem_options,
            )

    def mounts(self) -> list[Mount]:
        """All mounts of this process's namespace."""
        with _said("read", Path("/proc/self/mountinfo")):
            return mountinfo.mounts()

    def holders(self, mapping: Mapping) -> list[Holder]:
        """Who uses a filesystem of the mapping, as far as that can be told from here."""
        return open_files.find(mapping)

    def end_holders(self, mapping: Mapping, number: int, within_s: float) -> None:
        """Every user of the mapping was sent the signal, and has ended or had its time."""
        open_files.end(mapping, number, within_s)

    def power_off(self, volume: Volume) -> None:
        """The volume's disk is stopped and its USB port off. Raises: DeviceInUseError."""
        power.off(volume)

    def flush(self, name: str, node: str) -> None:
        """What was written below the mount point, to the device `node`, is on the medium."""
        mount.flush(str(self.mount_root / name), node)

    def unmount(self, name: str, *, lazily: bool = False) -> None:
        """Nothing is mounted on `name` in the mount root. Raises: MountBusyError."""
        point = self.mount_root / name
        try:
            with _said("unmount", point), paths.directory(self.mount_root) as root:
                mount.unmount(f"/proc/self/fd/{root}/{name}", lazily=lazily)
        except MountError as error:
            raise type(error)("unmount", str(point), error.errno or 0) from error

    def remove_mount_point(self, name: str) -> None:
        """The directory is gone if we made it."""
        with _said("remove mount point", self.mount_root / name):
            paths.remove_mount_point(self.mount_root, name)

    def our_mount_points(self) -> list[str]:
        """Directories that we made and that nothing is mounted on."""
        with _said("list mount points in", self.mount_root):
            return paths.our_mount_points(self.mount_root)

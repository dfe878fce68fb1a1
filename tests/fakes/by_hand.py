"""What users and other programs do to mounts and mappings, in the kernel in memory."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caam_hotplug.errors import MappingBusyError, MountBusyError
from caam_hotplug.model import DeviceNumber, Mount
from fakes.kernel import FakeKernel, FakeMapping


@dataclass(frozen=True)
class ByHand:
    """Commands of others than the agent; each is reported as the kernel reports it."""

    kernel: FakeKernel

    def mount_at(self, point: str) -> Mount:
        """Return the topmost mount at the point."""
        return next(m for m in reversed(self.kernel.mounts) if m.point == point)

    def umount(self, point: str, *, lazily: bool = False) -> None:
        """Unmount what is there; lazily also what lies in it. Raises: MountBusyError."""
        kernel = self.kernel
        mount = self.mount_at(point)
        tree = self._tree(mount)
        has_inner = any(m.parent == mount.identity for m in kernel.mounts)
        if not lazily and (kernel.users.get(Path(point).name, 0) or has_inner):
            raise MountBusyError("unmount", point, errno.EBUSY)
        for gone in tree:
            kernel.take_away(gone)
        for gone in tree:
            users = kernel.users.pop(Path(gone.point).name, 0)
            for mapping in list(kernel.mappings.values()):
                if mapping.number == gone.number:
                    mapping.holders += users
                    kernel.remove_if_closed(mapping)
        kernel.mounts_changed()

    def _tree(self, mount: Mount) -> list[Mount]:
        """Return the mount, and all in it with their copies in peers, which go with them."""
        is_peer = self.kernel.is_in_root(mount, Path(mount.point).parent)
        mounts, same = self.kernel.mounts, (mount.point, mount.number)
        copies = [m for m in mounts if (m.point, m.number) == same]
        tree = copies if is_peer else [mount]
        for above in tree:
            inner = [m for m in self.kernel.mounts if m.parent == above.identity]
            alike = {(m.point, m.number) for m in inner}
            known = {m.identity for m in tree}
            found = (m for m in self.kernel.mounts if (m.point, m.number) in alike)
            tree += [m for m in found if m.identity not in known]
        return tree

    def remount(self, point: str, *, read_only: bool, filesystem: bool = True) -> None:
        """Change who may write: to the filesystem, or only by this mount."""
        mount = self.mount_at(point)
        whole = read_only if filesystem else mount.is_filesystem_read_only
        self._change(
            mount, read_only=read_only, is_filesystem_read_only=whole, is_point_read_only=read_only
        )

    def fail(self, point: str) -> None:
        """Have the filesystem turn read-only by an error; the kernel reports nothing of that."""
        mount = self.mount_at(point)
        failed = replace(mount, read_only=True, is_filesystem_read_only=True)
        self.kernel.mounts[:] = [failed if m is mount else m for m in self.kernel.mounts]

    def move(self, point: str, to: str) -> None:
        """Move the mount elsewhere."""
        mount, kernel = self.mount_at(point), self.kernel
        kernel.take_away(mount)
        below = next((m for m in reversed(kernel.mounts) if m.point == to), None)
        parent = 0 if below is None else below.identity
        kernel.mounts.append(replace(mount, point=to, parent=parent))
        kernel.mounts_changed()

    def rename_folder(self, folder: str, to: str) -> None:
        """Rename a directory of mount points; the table of mounts has its new path."""
        self.kernel.renamed[folder] = to
        for mount in self.kernel.mounts[:]:
            above, _, name = mount.point.rpartition("/")
            if above == folder:
                self._change(mount, point=f"{to}/{name}")

    def _change(self, mount: Mount, **facts: Any) -> None:
        changed = replace(mount, **facts)
        self.kernel.mounts[:] = [changed if m is mount else m for m in self.kernel.mounts]
        self.kernel.mounts_changed()

    def mount(self, source: Mount, point: str) -> None:
        """Mount the same filesystem at another point, or at the same once more."""
        below = next((m for m in reversed(self.kernel.mounts) if m.point == point), None)
        source = replace(source, parent=0 if below is None else below.identity)
        self.kernel.mounts.append(replace(source, point=point, identity=self.kernel.next_mount()))
        self.kernel.mounts_changed()

    def cover(self, point: str, source: str = "tmpfs") -> None:
        """Mount something else there, or over what is there."""
        kind = "fuse" if source.startswith("/dev/") else "tmpfs"
        self.mount(Mount(DeviceNumber(0, 99), point, source, False, kind), point)

    def suspend(self, mapping: FakeMapping) -> None:
        """Suspend the mapping; the kernel reports nothing of that."""
        mapping.is_suspended = True

    def resume(self, mapping: FakeMapping) -> None:
        """Resume the mapping, with the table that was loaded last."""
        mapping.is_suspended = False
        if mapping.inactive is not None:
            mapping.live, mapping.inactive, mapping.key = mapping.inactive, None, None
        self.kernel.mapping_changed(f"dm-{mapping.number.minor}")

    def clear(self, mapping: FakeMapping) -> None:
        """Drop the table that waits, if there is one."""
        mapping.inactive = None

    def load(self, mapping: FakeMapping, line: str) -> None:
        """Load another table; the kernel reports nothing of that."""
        mapping.inactive = line

    def remove(self, mapping: FakeMapping, *, force: bool = False) -> None:
        """Remove the mapping; with `force`, replace its table by an error table first.

        Raises: MappingBusyError if it is open.
        """
        if force:
            self.load(mapping, f"0 {(mapping.live or '').split()[1]} error")
            self.resume(mapping)
        if self.kernel.open_count(mapping):
            raise MappingBusyError("remove mapping", mapping.name, errno.EBUSY)
        mapping.is_removed_at_last_close = True
        self.kernel.remove_if_closed(mapping)

    def rename(self, mapping: FakeMapping, name: str) -> None:
        """Give the mapping another name."""
        self.kernel.mappings[name] = self.kernel.mappings.pop(mapping.name)
        mapping.name = name
        self.kernel.mapping_changed(f"dm-{mapping.number.minor}")

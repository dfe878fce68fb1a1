"""The kernel behaviour that a volume's lifecycle relies on: one suite, for real and fake.

`from fakes.contract import *` in a test module that has a fixture `world` runs it there.
"""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

from caam_hotplug import names
from caam_hotplug.config.rules import KeySource
from caam_hotplug.errors import (
    BlobMissingError,
    BlobRejectedError,
    DeviceInUseError,
    DmError,
    HotplugError,
    KernelError,
    MappingBusyError,
    MountBusyError,
    MountError,
    MountPointOccupiedError,
    VolumeBusyError,
)
from caam_hotplug.formats.crypt_table import Crypt, CryptTarget, crypt_target
from caam_hotplug.kernel.api import Kernel, OpenVolume
from caam_hotplug.kernel.medium_sample import Sample
from caam_hotplug.keys import backends
from caam_hotplug.model import (
    DeviceNumber,
    KeyReference,
    Mapping,
    Mount,
    Volume,
    VolumeId,
)

BLOB: Final = "cartridge-01.bb"
"""Blob of the key under which the medium's filesystem is written."""
OTHER_BLOB: Final = "ccm-16.bb"
"""Valid blob of another key."""
DAMAGED_BLOB: Final = "damaged.bb"
"""Blob with one flipped bit."""
POINT: Final = "contract"
"""Name in the mount root."""
NOWHERE: Final = DeviceNumber(8, 240)
"""Number that no device has."""
DEADLINE_S: Final = 120


class KernelUnderTest(Kernel, Protocol):
    """Steps of the kernel, and a check of the keyring."""

    def has_key(self, description: str) -> bool: ...


class World(Protocol):
    """Kernel under test with a medium in it, and events outside the agent."""

    @property
    def kernel(self) -> KernelUnderTest: ...

    @property
    def volume(self) -> Volume:
        """Volume with an ext4 filesystem under the key of `BLOB`."""
        ...

    def reads_as_written(self, node: str) -> bool:
        """Whether the device's bytes are the filesystem's. Raises: OSError."""
        ...

    def held(self, node: str) -> AbstractContextManager[None]:
        """Hold the device open in a process."""
        ...

    def inside(self, name: str) -> AbstractContextManager[None]:
        """Keep a process inside a mount point."""
        ...

    def directory(self, name: str, *, content: bool) -> AbstractContextManager[None]:
        """Make a directory of the board in the mount root; check afterwards that it remains."""
        ...

    def foreign_mapping(self) -> AbstractContextManager[None]:
        """Make a live mapping of another program."""
        ...

    def changes(self) -> set[str]:
        """Return what was reported since the last call: 'mounts', and names of mappings."""
        ...

    def umount(self, name: str, *, lazily: bool = False) -> None:
        """Unmount what is at the name in the mount root."""
        ...

    def remount(self, name: str, *, read_only: bool, filesystem: bool) -> None:
        """Change who may write: to the filesystem, or by this mount alone."""
        ...

    @property
    def folder(self) -> Path:
        """Directory outside the mount root, of root alone and empty."""
        ...

    def unsafe(self, folder: Path) -> AbstractContextManager[None]:
        """Let everybody write to the directory meanwhile."""
        ...

    def over_root(self) -> AbstractContextManager[None]:
        """Bind the mount root to itself meanwhile, so that what is mounted in it is hidden."""
        ...

    def suspend(self, name: str) -> None:
        """Suspend a mapping."""
        ...

    def waiting(self, call: Callable[[], object]) -> AbstractContextManager[None]:
        """Check that the call waits; after the block it goes on to its end."""
        ...

    def load_zeros(self, name: str) -> None:
        """Load a table of zeros into a mapping, which stays inactive."""
        ...


def until(
    condition: Callable[[], bool], *, within_s: float = DEADLINE_S, every_s: float = 0.05
) -> None:
    """Wait until the condition holds. Raises: AssertionError after a deadline."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "still not so"
        time.sleep(every_s)


def dm_name(world: World) -> str:
    """Return the name of the test's mapping."""
    return names.dm_name(world.volume.id, POINT)


def dm_uuid(world: World) -> str:
    """Return the DM-UUID of the test's mapping."""
    return names.dm_uuid(world.volume.id)


def description(world: World) -> str:
    """Return the description of the mapping's key."""
    return names.key_description(world.volume.id)


def target(world: World, key_bytes: int = 36, **changes: Any) -> CryptTarget:
    """Return the lifecycle's target for the medium, with the changes."""
    return replace(crypt_target(world.volume, Crypt(), KeyReference("logon", key_bytes)), **changes)


def is_gone(world: World) -> bool:
    """Whether the test's mapping is gone."""
    return world.kernel.find_mapping(dm_uuid(world)) is None


def found(world: World) -> Mapping:
    """Find the test's mapping. Raises: AssertionError if there is none."""
    mapping = world.kernel.find_mapping(dm_uuid(world))
    assert mapping is not None
    return mapping


@contextmanager
def created(world: World) -> Iterator[str]:
    """Create a mapping without a table, remove it afterwards; yield its name."""
    name = dm_name(world)
    world.kernel.create_mapping(name, dm_uuid(world))
    try:
        yield name
    finally:
        world.kernel.remove_mapping(name)
        until(lambda: is_gone(world))


@contextmanager
def key_added(world: World, blob: str = BLOB) -> Iterator[int]:
    """Add a blob's key to the keyring; yield its length in bytes."""
    kernel = world.kernel
    key = backends.load(kernel, kernel.read_blob(blob), KeySource(), description(world))
    try:
        yield key.length
    finally:
        kernel.unlink_key(description(world))


@contextmanager
def mapped(world: World, blob: str = BLOB, *, read_only: bool = False) -> Iterator[Mapping]:
    """Make a live mapping under a blob's key, which is in no keyring; remove it afterwards."""
    with created(world) as name:
        with key_added(world, blob) as length:
            line = target(world, length).to_line()
            world.kernel.load_table(name, line, read_only=read_only)
        world.kernel.activate_mapping(name)
        yield found(world)


@contextmanager
def opened(world: World) -> Iterator[OpenVolume]:
    """Open the medium's node."""
    with closing(world.kernel.open_volume(world.volume)) as node:
        yield node


def test_a_volume_with_a_mapping_on_it_is_in_use(world: World) -> None:
    with opened(world) as node:
        node.require_unused()
        with mapped(world) as mapping, pytest.raises(DeviceInUseError, match=mapping.name):
            node.require_unused()


def test_a_table_is_loaded_over_a_device_that_is_open(world: World) -> None:
    with opened(world) as node:
        with mapped(world) as mapping:
            node.require_same()
            assert world.reads_as_written(mapping.node)
        node.require_unused()


def test_a_volume_that_is_encrypted_says_nothing_of_itself(world: World) -> None:
    with opened(world) as node:
        assert node.volume.identified
        assert (node.volume.label, node.volume.uuid, node.volume.header) == (None, None, None)


def test_a_volume_whose_place_another_medium_has_is_not_opened(world: World) -> None:
    later = replace(world.volume, id=replace(world.volume.id, diskseq=1 << 40))
    with pytest.raises(KernelError) as refused:
        world.kernel.open_volume(later)
    assert refused.value.errno == errno.ENODEV


def test_a_volume_that_is_not_there_is_not_opened(world: World) -> None:
    with pytest.raises(KernelError) as refused:
        world.kernel.open_volume(replace(world.volume, name="sdzz1"))
    assert refused.value.errno == errno.ENOENT


def mount(
    world: World,
    mapping: Mapping,
    *,
    kind: str = "ext4",
    name: str = POINT,
    read_only: bool = False,
) -> None:
    """Mount the mapping's filesystem."""
    world.kernel.mount(
        mapping.node,
        kind,
        name,
        read_only=read_only,
        options=("nosuid", "nodev", "noexec"),
        filesystem_options=(),
    )


@contextmanager
def mounted(world: World, mapping: Mapping, *, read_only: bool = False) -> Iterator[None]:
    """Mount the mapping's filesystem; afterwards unmount it and remove the directory."""
    try:
        mount(world, mapping, read_only=read_only)
        yield
    finally:
        unmount(world, lazily=True)
        world.kernel.remove_mount_point(POINT)


def mounts_there(world: World) -> list[Mount]:
    """List the mounts in the mount root."""
    root = str(world.kernel.mount_root)
    return [there for there in world.kernel.mounts() if there.point.startswith(f"{root}/")]


def numbers(world: World) -> set[int]:
    """Return the numbers of the mounts in the mount root."""
    return {there.identity for there in mounts_there(world)}


def unmount(world: World, *, lazily: bool = False) -> None:
    """Unmount what the mount point shows."""
    world.kernel.unmount(POINT, numbers(world), lazily=lazily)


# mappings


def test_a_mapping_that_was_never_made_is_not_found_and_its_removal_is_no_error(
    world: World,
) -> None:
    assert world.kernel.find_mapping(dm_uuid(world)) is None
    world.kernel.remove_mapping(dm_name(world))
    unmount(world)
    unmount(world, lazily=True)
    world.kernel.remove_mount_point(POINT)
    world.kernel.unlink_key(description(world))
    assert world.kernel.our_mappings() == []
    assert world.kernel.our_mount_points() == []


def test_a_mapping_that_does_not_exist_accepts_no_table(world: World) -> None:
    name = dm_name(world)
    with key_added(world) as length:
        line = target(world, length).to_line()
        with pytest.raises(DmError) as load:
            world.kernel.load_table(name, line, read_only=False)
    with pytest.raises(DmError) as activate:
        world.kernel.activate_mapping(name)
    with pytest.raises(DmError) as keep:
        world.kernel.keep_mapping(name)
    assert {e.value.errno for e in (load, activate, keep)} == {errno.ENXIO}


def test_a_new_mapping_has_no_table_and_no_holder(world: World) -> None:
    with created(world) as name:
        mapping = found(world)
        assert (mapping.name, mapping.uuid) == (name, dm_uuid(world))
        assert (mapping.table, mapping.open_count) == ((), 0)
        assert world.kernel.our_mappings() == [mapping]


def test_a_mapping_without_a_table_has_no_node_even_when_it_is_activated(world: World) -> None:
    with created(world) as name:
        world.kernel.activate_mapping(name)
        assert found(world).table == ()
        with pytest.raises(KernelError) as probe:
            world.kernel.probe(found(world).node, ("ext4",))
    assert probe.value.errno == errno.ENOENT


def test_a_name_and_a_dm_uuid_can_be_used_only_once(world: World) -> None:
    with created(world) as name:
        with pytest.raises(MappingBusyError) as same_name:
            world.kernel.create_mapping(name, names.dm_uuid(VolumeId(999_999, 1)))
        with pytest.raises(MappingBusyError) as same_uuid:
            world.kernel.create_mapping(f"{name}-2", dm_uuid(world))
        assert len(world.kernel.our_mappings()) == 1
    assert same_name.value.errno == same_uuid.value.errno == errno.EBUSY


def test_a_table_is_not_loaded_without_its_key(world: World) -> None:
    with created(world) as name:
        with pytest.raises(DmError) as refused:
            world.kernel.load_table(name, target(world).to_line(), read_only=False)
        assert found(world).table == ()
    assert refused.value.errno == errno.ENOKEY


@pytest.mark.parametrize("too_many", [-4, 12])
def test_a_table_is_not_loaded_with_a_key_of_another_size(world: World, too_many: int) -> None:
    with created(world) as name, key_added(world) as length:
        with pytest.raises(DmError) as refused:
            line = target(world, length + too_many).to_line()
            world.kernel.load_table(name, line, read_only=False)
        assert found(world).table == ()
    assert refused.value.errno == errno.EINVAL


def test_a_table_is_not_loaded_over_a_device_that_does_not_exist(world: World) -> None:
    with created(world) as name, key_added(world) as length:
        with pytest.raises(DmError) as refused:
            line = target(world, length, device=NOWHERE).to_line()
            world.kernel.load_table(name, line, read_only=False)
        assert found(world).table == ()
    assert refused.value.errno == errno.ENXIO


def test_a_loaded_table_is_not_live_before_it_is_activated(world: World) -> None:
    with created(world) as name, key_added(world) as length:
        line = target(world, length).to_line()
        world.kernel.load_table(name, line, read_only=False)
        assert found(world).table == ()
        world.kernel.activate_mapping(name)
        assert found(world).table == (line,)


def test_a_live_table_reads_as_it_was_loaded(world: World) -> None:
    with mapped(world) as mapping:
        assert mapping.table == (target(world).to_line(),)
        assert CryptTarget.from_line(mapping.table[0]) == target(world)
        assert world.kernel.our_mappings() == [mapping]


def test_the_options_of_a_live_table_read_as_they_were_loaded(world: World) -> None:
    options = frozenset({"allow_discards", "sector_size:4096", "iv_large_sectors"})
    with created(world) as name:
        with key_added(world) as length:
            wanted = target(world, length, options=options)
            world.kernel.load_table(name, wanted.to_line(), read_only=False)
        world.kernel.activate_mapping(name)
        (line,) = found(world).table
    read = CryptTarget.from_line(line)
    assert read is not None
    assert read.does_the_same(wanted)


def test_a_mapping_works_without_its_key_in_the_keyring(world: World) -> None:
    with mapped(world) as mapping:
        assert not world.kernel.has_key(description(world))
        assert world.reads_as_written(mapping.node)


def test_a_mapping_under_another_key_reads_noise(world: World) -> None:
    with mapped(world, OTHER_BLOB) as mapping:
        assert not world.reads_as_written(mapping.node)


def test_holders_are_counted(world: World) -> None:
    with mapped(world) as mapping:
        assert found(world).open_count == 0
        with world.held(mapping.node):
            assert found(world).open_count == 1
        with mounted(world, mapping):
            assert found(world).open_count == 1
        assert found(world).open_count == 0


def test_a_held_mapping_is_removed_when_its_holder_closes_it(world: World) -> None:
    with mapped(world) as mapping:
        with world.held(mapping.node):
            world.kernel.remove_mapping(mapping.name)
            going = replace(mapping, open_count=1, is_removed_at_last_close=True)
            assert found(world) == going
        until(lambda: is_gone(world))


def test_a_deferred_removal_can_be_cancelled(world: World) -> None:
    with mapped(world) as mapping:
        with world.held(mapping.node):
            world.kernel.remove_mapping(mapping.name)
            world.kernel.keep_mapping(mapping.name)
        assert found(world) == mapping


def test_cancelling_a_removal_that_nobody_requested_is_no_error(world: World) -> None:
    with mapped(world) as mapping:
        world.kernel.keep_mapping(mapping.name)
        assert found(world) == mapping


def test_a_mapping_with_an_error_table_fails_all_reads(world: World) -> None:
    with mapped(world) as mapping, world.held(mapping.node):
        assert not world.kernel.has_error_table(mapping.uuid)
        world.kernel.load_error_table(mapping.uuid)
        assert world.kernel.has_error_table(mapping.uuid)
        assert found(world).table == (f"0 {target(world).length} error",)
        with pytest.raises(OSError) as failed:
            world.reads_as_written(mapping.node)
    assert failed.value.errno == errno.EIO


def test_a_mapping_with_an_error_table_can_be_unmounted_and_removed(world: World) -> None:
    with mapped(world) as mapping:
        with mounted(world, mapping):
            world.kernel.load_error_table(mapping.uuid)
            unmount(world)
            assert mounts_there(world) == []
        world.kernel.remove_mapping(mapping.name)
        until(lambda: is_gone(world))


def test_an_error_table_for_a_mapping_without_a_table_changes_nothing(world: World) -> None:
    world.kernel.load_error_table(dm_uuid(world))
    assert is_gone(world)
    with pytest.raises(DmError) as failed:
        world.kernel.has_error_table(dm_uuid(world))
    assert failed.value.errno == errno.ENXIO
    with created(world):
        world.kernel.load_error_table(dm_uuid(world))
        assert found(world).table == ()
        assert not world.kernel.has_error_table(dm_uuid(world))


def test_a_disk_whose_medium_is_still_there_has_not_changed(world: World) -> None:
    volume = world.volume
    assert world.kernel.changed_disk(volume.id, volume.number) is None
    assert world.kernel.changed_disk(VolumeId(volume.id.diskseq + 1, 1), NOWHERE) is None


def test_loading_an_error_table_twice_is_no_error(world: World) -> None:
    with mapped(world) as mapping:
        for _ in range(2):
            world.kernel.load_error_table(mapping.uuid)
        assert found(world).table == (f"0 {target(world).length} error",)


@pytest.mark.parametrize("is_suspended", [False, True])
def test_an_error_table_takes_the_place_of_a_table_that_waits(
    world: World, *, is_suspended: bool
) -> None:
    with mapped(world) as mapping:
        if is_suspended:
            world.kernel.load_error_table(mapping.uuid)
            world.suspend(mapping.name)
        world.load_zeros(mapping.name)
        world.kernel.load_error_table(mapping.uuid)
        assert world.kernel.has_error_table(mapping.uuid)
        world.kernel.activate_mapping(mapping.name)
        assert world.kernel.has_error_table(mapping.uuid)


def test_what_a_mapping_gives_depends_on_its_key_and_what_its_medium_holds_does_not(
    world: World,
) -> None:
    with mapped(world) as mapping:
        plain = world.kernel.plaintexts(mapping)
        cipher = world.kernel.ciphertexts(world.volume, mapping)
        assert world.kernel.plaintexts(mapping) == plain
        assert None not in plain
        assert world.kernel.sample(world.volume, mapping) == Sample(plain, cipher)
        assert len(plain) == len(cipher.digests)
    with mapped(world, OTHER_BLOB) as mapping:
        assert not set(world.kernel.plaintexts(mapping)) & set(plain)
        assert world.kernel.ciphertexts(world.volume, mapping) == cipher


def test_a_mapping_whose_reads_fail_gives_nothing(world: World) -> None:
    with mapped(world) as mapping:
        world.kernel.load_error_table(mapping.uuid)
        assert set(world.kernel.plaintexts(mapping)) == {None}


def test_mappings_of_others_are_not_the_agents(world: World) -> None:
    with world.foreign_mapping():
        assert world.kernel.our_mappings() == []
        with created(world):
            assert world.kernel.our_mappings() == [found(world)]


# whole disks


def require_unused(world: World) -> None:
    with closing(world.kernel.open_volume(world.volume)) as node:
        node.require_unused()


def test_nobody_else_can_use_an_emptied_disk_until_it_is_restored(world: World) -> None:
    emptied = world.kernel.empty_disk(world.volume)
    assert not world.kernel.has_partitions(emptied.disk)
    with pytest.raises(HotplugError):
        require_unused(world)
    emptied.restore()
    assert world.kernel.has_partitions(emptied.disk) == bool(world.volume.id.partition)
    assert world.kernel.is_present(world.volume)
    require_unused(world)


def test_a_disk_that_was_emptied_can_be_emptied_again_and_restored(world: World) -> None:
    world.kernel.empty_disk(world.volume).close()
    emptied = world.kernel.empty_disk(world.volume)
    emptied.close()
    emptied.restore()
    assert world.kernel.is_present(world.volume)


def test_a_disk_below_a_mapping_is_not_emptied(world: World) -> None:
    with mapped(world) as mapping:
        assert world.kernel.disk_users(world.volume) == []
        with pytest.raises(VolumeBusyError) as refused:
            world.kernel.empty_disk(world.volume)
        assert refused.value.holders == (f"mapping {mapping.name} lies on it",)
        assert world.kernel.is_present(world.volume)
        assert world.reads_as_written(mapping.node)


# what others do


def test_each_change_of_the_mounts_is_reported(world: World) -> None:
    with mapped(world) as mapping:
        world.changes()
        mount(world, mapping)
        assert "mounts" in world.changes()
        for filesystem in (False, True):
            world.remount(POINT, read_only=True, filesystem=filesystem)
            assert world.changes() == {"mounts"}
        world.umount(POINT)
        assert world.changes() == {"mounts"}
        world.kernel.remove_mount_point(POINT)
        assert world.changes() == set()


def test_a_mapping_is_reported_when_it_changes_and_when_it_goes(world: World) -> None:
    world.changes()
    with mapped(world) as mapping:
        name = mapping.node.rpartition("/")[2]
        assert world.changes() == {name}
        world.suspend(mapping.name)
        world.load_zeros(mapping.name)
        assert world.changes() == set()
        world.kernel.resume_mapping(mapping.name)
        assert world.changes() == {name}
        world.kernel.load_error_table(mapping.uuid)
        assert world.changes() == {name}
    assert world.changes() == {name}


def test_a_suspended_mapping_is_resumed_with_the_table_that_it_had(world: World) -> None:
    with mapped(world) as mapping:
        world.suspend(mapping.name)
        assert found(world).is_suspended
        world.load_zeros(mapping.name)
        world.kernel.resume_mapping(mapping.name)
        assert found(world) == mapping
        world.kernel.resume_mapping(mapping.name)
        assert found(world) == mapping


def test_a_suspended_mapping_has_a_probe_wait_until_it_is_resumed(world: World) -> None:
    with mapped(world) as mapping:
        world.suspend(mapping.name)
        with world.waiting(lambda: world.kernel.probe(mapping.node, ("ext4",))):
            world.kernel.resume_mapping(mapping.name)


@pytest.mark.parametrize("filesystem", [False, True])
def test_a_remount_shows_whether_the_whole_filesystem_is_read_only(
    world: World, *, filesystem: bool
) -> None:
    with mapped(world) as mapping, mounted(world, mapping):
        (before,) = mounts_there(world)
        world.remount(POINT, read_only=True, filesystem=filesystem)
        (after,) = mounts_there(world)
        assert (before.read_only, after.read_only) == (False, True)
        assert after.is_filesystem_read_only is filesystem
        assert (after.identity, after.number) == (before.identity, before.number)


def test_a_mount_below_a_mount_over_the_root_is_unmounted_with_its_directory(
    world: World,
) -> None:
    with mapped(world) as mapping:
        mount(world, mapping)
        with world.over_root():
            unmount(world)
            world.kernel.remove_mount_point(POINT)
            assert found(world).open_count == 0
        assert mounts_there(world) == []
        assert world.kernel.our_mount_points() == []


def unmount_at(world: World, place: str) -> None:
    """Unmount all that is mounted at the place, with its directory."""
    there = {mount.identity for mount in world.kernel.mounts() if mount.point == place}
    world.kernel.unmount(place, there)
    world.kernel.remove_mount_point(place)


def test_a_mount_at_its_own_path_is_noted_with_its_mapping(world: World) -> None:
    place = str(world.folder / POINT)
    with mapped(world) as mapping:
        assert world.kernel.place_of(mapping) == ""
        mount(world, mapping, name=place)
        assert [m.point for m in world.kernel.mounts() if m.number == mapping.number] == [place]
        assert world.kernel.our_paths([place]) == []
        assert world.kernel.place_of(mapping) == place
        unmount_at(world, place)
        assert world.kernel.place_of(mapping) == place
        assert found(world).open_count == 0
        world.kernel.note_place(mapping, "")
        assert world.kernel.place_of(mapping) == ""
        world.kernel.note_place(mapping, place)
        assert world.kernel.place_of(mapping) == place
    with mapped(world) as mapping:
        assert world.kernel.place_of(mapping) == ""


def test_a_directory_made_at_its_own_path_is_found_and_removed(world: World) -> None:
    place = str(world.folder / POINT)
    with mapped(world) as mapping:
        with pytest.raises(MountError):
            mount(world, mapping, name=place, kind="vfat")
        assert world.kernel.our_mount_points() == []
        assert world.kernel.our_paths([place]) == [place]
        world.kernel.remove_mount_point(place)
        assert world.kernel.our_paths([place]) == []


def test_a_mount_at_its_own_path_is_flushed_and_unmounted(world: World) -> None:
    place = str(world.folder / POINT)
    with mapped(world) as mapping, closing(world.kernel.watch_writes(mapping)) as watch:
        mount(world, mapping, name=place)
        there = {m.identity for m in world.kernel.mounts() if m.point == place}
        world.kernel.keep_place(place)
        assert world.kernel.point_of(place) == place
        watch.unmount(place, there, anyway=False)
        assert (watch.lost, world.kernel.our_paths([place])) == ("", [place])
        world.kernel.remove_mount_point(place)


def test_nothing_is_mounted_at_a_path_that_others_could_change(world: World) -> None:
    place = str(world.folder / POINT)
    words = (
        f"open {world.folder}: {world.folder} can be written by others than root; "
        f"chmod go-w {world.folder}"
    )
    with mapped(world) as mapping:
        with world.unsafe(world.folder):
            assert world.kernel.why_occupied(place) == words
            with pytest.raises(MountPointOccupiedError, match="can be written by others"):
                mount(world, mapping, name=place)
            world.kernel.remove_mount_point(place)
            watch = world.kernel.watch_mount_point(place)
            assert watch.read() == []
        with closing(watch):
            assert watch.read()
        assert world.kernel.why_occupied(place) == ""
        assert world.kernel.our_paths([place]) == []
        assert found(world).open_count == 0


def test_a_mount_in_a_root_that_is_bound_to_itself_is_unmounted_with_its_copy(
    world: World,
) -> None:
    with mapped(world) as mapping, world.over_root():
        mount(world, mapping)
        unmount(world)
        assert mounts_there(world) == []
        world.kernel.remove_mount_point(POINT)
        assert found(world).open_count == 0


# filesystems and mounts


def test_a_probe_finds_the_filesystem_under_the_right_key(world: World) -> None:
    with mapped(world) as mapping:
        assert world.kernel.probe(mapping.node, ("vfat", "ext4")) == "ext4"
        assert found(world).open_count == 0


def test_a_probe_finds_only_allowed_filesystems(world: World) -> None:
    with mapped(world) as mapping:
        assert world.kernel.probe(mapping.node, ("vfat", "exfat")) is None


def test_a_probe_finds_nothing_under_another_key(world: World) -> None:
    with mapped(world, OTHER_BLOB) as mapping:
        assert world.kernel.probe(mapping.node, ("vfat", "ext4")) is None


def test_a_mapping_with_an_error_table_cannot_be_probed(world: World) -> None:
    with mapped(world) as mapping:
        world.kernel.load_error_table(mapping.uuid)
        with pytest.raises(KernelError) as failed:
            world.kernel.probe(mapping.node, ("ext4",))
    assert failed.value.errno == errno.EIO


@pytest.mark.parametrize("read_only", [False, True])
def test_a_mount_is_listed_until_it_is_unmounted(world: World, *, read_only: bool) -> None:
    with mapped(world) as mapping, mounted(world, mapping, read_only=read_only):
        point = str(world.kernel.mount_root / POINT)
        expected = Mount(mapping.number, point, mapping.node, read_only, "ext4")
        assert mounts_there(world) == [expected]
        watch = world.kernel.watch_writes(mapping)
        watch.unmount(POINT, numbers(world), anyway=False)
        assert mounts_there(world) == []
        assert found(world).open_count == 1
        watch.close()
        assert (watch.lost, found(world).open_count) == ("", 0)


def test_a_read_only_mapping_is_mounted_only_for_reading(world: World) -> None:
    with mapped(world, read_only=True) as mapping:
        with pytest.raises(MountError) as refused, mounted(world, mapping):
            pass
        with mounted(world, mapping, read_only=True):
            assert [there.read_only for there in mounts_there(world)] == [True]
    assert refused.value.errno == errno.EACCES


def test_nothing_is_mounted_over_content(world: World) -> None:
    with mapped(world) as mapping, world.directory(POINT, content=True):
        with pytest.raises(MountPointOccupiedError):
            mount(world, mapping)
        assert mounts_there(world) == []
        assert found(world).open_count == 0


def test_nothing_is_mounted_over_another_mount(world: World) -> None:
    with mapped(world) as mapping, mounted(world, mapping):
        with pytest.raises(MountPointOccupiedError):
            mount(world, mapping)
        assert len(mounts_there(world)) == 1


def test_why_nothing_can_be_mounted_is_known_without_an_attempt(world: World) -> None:
    point = world.kernel.mount_root / POINT
    assert world.kernel.why_occupied(POINT) == ""
    with world.directory(POINT, content=False):
        assert world.kernel.why_occupied(POINT) == ""
    with world.directory(POINT, content=True):
        assert world.kernel.why_occupied(POINT) == f"{point} is not empty"
    with mapped(world) as mapping, mounted(world, mapping):
        assert world.kernel.why_occupied(POINT) == f"something is mounted at {point}"
    assert world.kernel.why_occupied(POINT) == ""


def test_a_mount_point_that_is_emptied_is_reported(world: World) -> None:
    with world.directory(POINT, content=True):
        watch = world.kernel.watch_mount_point(POINT)
        assert watch.read() == []
    with closing(watch):
        assert select.select([watch.fileno()], [], [], 0)[0]
        assert watch.read()


@pytest.mark.parametrize(("blob", "kind"), [(BLOB, "vfat"), (OTHER_BLOB, "ext4")])
def test_a_filesystem_that_is_not_there_is_not_mounted(world: World, blob: str, kind: str) -> None:
    with mapped(world, blob) as mapping:
        with pytest.raises(MountError) as refused:
            mount(world, mapping, kind=kind)
        assert mounts_there(world) == []
        assert world.kernel.our_mount_points() == [POINT]
        world.kernel.remove_mount_point(POINT)
    assert refused.value.errno == errno.EINVAL


def test_a_mount_in_use_stays_unless_it_is_detached(world: World) -> None:
    with mapped(world) as mapping:
        with mounted(world, mapping), world.inside(POINT):
            with pytest.raises(MountBusyError) as refused:
                unmount(world)
            assert len(mounts_there(world)) == 1
            unmount(world, lazily=True)
            assert mounts_there(world) == []
            assert found(world).open_count == 1
        until(lambda: found(world).open_count == 0)
    assert refused.value.errno == errno.EBUSY


def test_a_mapping_under_a_detached_mount_goes_with_its_last_user(world: World) -> None:
    with mapped(world) as mapping:
        with mounted(world, mapping), world.inside(POINT):
            unmount(world, lazily=True)
            world.kernel.remove_mapping(mapping.name)
            assert not is_gone(world)
        until(lambda: is_gone(world))


def test_a_mount_point_of_the_agent_is_listed_once_nothing_is_mounted_there(world: World) -> None:
    with mapped(world) as mapping, mounted(world, mapping):
        assert world.kernel.our_mount_points() == []
        world.kernel.remove_mount_point(POINT)
        assert len(mounts_there(world)) == 1
        unmount(world)
        assert world.kernel.our_mount_points() == [POINT]
        world.kernel.remove_mount_point(POINT)
        assert world.kernel.our_mount_points() == []


def test_a_directory_of_the_board_is_not_the_agents(world: World) -> None:
    with mapped(world) as mapping, world.directory(POINT, content=False):
        with mounted(world, mapping):
            assert len(mounts_there(world)) == 1
        assert mounts_there(world) == []
        assert world.kernel.our_mount_points() == []


# blobs and keys


def test_a_volume_is_present_while_it_is_the_same(world: World) -> None:
    assert world.kernel.is_present(world.volume)
    later = VolumeId(world.volume.id.diskseq + 1000, world.volume.id.partition)
    assert not world.kernel.is_present(replace(world.volume, id=later))
    assert not world.kernel.is_present(replace(world.volume, name="sdzz1"))


def test_the_recorded_state_of_a_volume_belongs_to_this_insertion_alone(world: World) -> None:
    later = replace(world.volume, id=replace(world.volume.id, diskseq=1 << 40))
    assert world.kernel.remembered(world.volume) == ""
    world.kernel.remember(world.volume, "ejected")
    try:
        assert world.kernel.remembered(world.volume) == "ejected"
        assert world.kernel.remembered(later) == ""
        world.kernel.remember(world.volume, "locked")
        assert world.kernel.remembered(world.volume) == "locked"
        assert world.kernel.remembered_on(world.volume) == ["locked"]
        assert world.kernel.remembered_on(later) == []
    finally:
        world.kernel.remember(world.volume, "")
    assert world.kernel.remembered(world.volume) == ""
    world.kernel.remember(world.volume, "")


def test_a_blob_that_is_not_there_is_missing(world: World) -> None:
    with pytest.raises(BlobMissingError, match=r"no blob .*/no-such\.bb"):
        world.kernel.read_blob("no-such.bb")


def test_a_damaged_blob_is_refused_by_the_caam(world: World) -> None:
    with pytest.raises(BlobRejectedError):
        backends.load(
            world.kernel, world.kernel.read_blob(DAMAGED_BLOB), KeySource(), description(world)
        )
    assert not world.kernel.has_key(description(world))


def test_a_blob_becomes_a_key_of_the_length_that_its_table_names(world: World) -> None:
    lengths = []
    for blob in (BLOB, OTHER_BLOB):
        with key_added(world, blob) as length:
            lengths.append(length)
    assert lengths == [36, 48]


def test_a_key_exists_until_it_is_unlinked(world: World) -> None:
    assert not world.kernel.has_key(description(world))
    with key_added(world):
        assert world.kernel.has_key(description(world))
        assert not world.kernel.has_key(f"{description(world)}1")
        for _ in range(2):
            world.kernel.unlink_key(description(world))
            assert not world.kernel.has_key(description(world))


def test_a_key_of_the_same_description_is_replaced(world: World) -> None:
    with key_added(world, OTHER_BLOB), mapped(world) as mapping:
        assert world.reads_as_written(mapping.node)
    assert not world.kernel.has_key(description(world))


__all__ = [
    "test_a_blob_becomes_a_key_of_the_length_that_its_table_names",
    "test_a_blob_that_is_not_there_is_missing",
    "test_a_damaged_blob_is_refused_by_the_caam",
    "test_a_deferred_removal_can_be_cancelled",
    "test_a_directory_made_at_its_own_path_is_found_and_removed",
    "test_a_directory_of_the_board_is_not_the_agents",
    "test_a_disk_below_a_mapping_is_not_emptied",
    "test_a_disk_that_was_emptied_can_be_emptied_again_and_restored",
    "test_a_disk_whose_medium_is_still_there_has_not_changed",
    "test_a_filesystem_that_is_not_there_is_not_mounted",
    "test_a_held_mapping_is_removed_when_its_holder_closes_it",
    "test_a_key_exists_until_it_is_unlinked",
    "test_a_key_of_the_same_description_is_replaced",
    "test_a_live_table_reads_as_it_was_loaded",
    "test_a_loaded_table_is_not_live_before_it_is_activated",
    "test_a_mapping_is_reported_when_it_changes_and_when_it_goes",
    "test_a_mapping_that_does_not_exist_accepts_no_table",
    "test_a_mapping_that_was_never_made_is_not_found_and_its_removal_is_no_error",
    "test_a_mapping_under_a_detached_mount_goes_with_its_last_user",
    "test_a_mapping_under_another_key_reads_noise",
    "test_a_mapping_whose_reads_fail_gives_nothing",
    "test_a_mapping_with_an_error_table_can_be_unmounted_and_removed",
    "test_a_mapping_with_an_error_table_cannot_be_probed",
    "test_a_mapping_with_an_error_table_fails_all_reads",
    "test_a_mapping_without_a_table_has_no_node_even_when_it_is_activated",
    "test_a_mapping_works_without_its_key_in_the_keyring",
    "test_a_mount_at_its_own_path_is_flushed_and_unmounted",
    "test_a_mount_at_its_own_path_is_noted_with_its_mapping",
    "test_a_mount_below_a_mount_over_the_root_is_unmounted_with_its_directory",
    "test_a_mount_in_a_root_that_is_bound_to_itself_is_unmounted_with_its_copy",
    "test_a_mount_in_use_stays_unless_it_is_detached",
    "test_a_mount_is_listed_until_it_is_unmounted",
    "test_a_mount_point_of_the_agent_is_listed_once_nothing_is_mounted_there",
    "test_a_mount_point_that_is_emptied_is_reported",
    "test_a_name_and_a_dm_uuid_can_be_used_only_once",
    "test_a_new_mapping_has_no_table_and_no_holder",
    "test_a_probe_finds_nothing_under_another_key",
    "test_a_probe_finds_only_allowed_filesystems",
    "test_a_probe_finds_the_filesystem_under_the_right_key",
    "test_a_read_only_mapping_is_mounted_only_for_reading",
    "test_a_remount_shows_whether_the_whole_filesystem_is_read_only",
    "test_a_suspended_mapping_has_a_probe_wait_until_it_is_resumed",
    "test_a_suspended_mapping_is_resumed_with_the_table_that_it_had",
    "test_a_table_is_loaded_over_a_device_that_is_open",
    "test_a_table_is_not_loaded_over_a_device_that_does_not_exist",
    "test_a_table_is_not_loaded_with_a_key_of_another_size",
    "test_a_table_is_not_loaded_without_its_key",
    "test_a_volume_is_present_while_it_is_the_same",
    "test_a_volume_that_is_encrypted_says_nothing_of_itself",
    "test_a_volume_that_is_not_there_is_not_opened",
    "test_a_volume_whose_place_another_medium_has_is_not_opened",
    "test_a_volume_with_a_mapping_on_it_is_in_use",
    "test_an_error_table_for_a_mapping_without_a_table_changes_nothing",
    "test_an_error_table_takes_the_place_of_a_table_that_waits",
    "test_cancelling_a_removal_that_nobody_requested_is_no_error",
    "test_each_change_of_the_mounts_is_reported",
    "test_holders_are_counted",
    "test_loading_an_error_table_twice_is_no_error",
    "test_mappings_of_others_are_not_the_agents",
    "test_nobody_else_can_use_an_emptied_disk_until_it_is_restored",
    "test_nothing_is_mounted_at_a_path_that_others_could_change",
    "test_nothing_is_mounted_over_another_mount",
    "test_nothing_is_mounted_over_content",
    "test_the_options_of_a_live_table_read_as_they_were_loaded",
    "test_the_recorded_state_of_a_volume_belongs_to_this_insertion_alone",
    "test_what_a_mapping_gives_depends_on_its_key_and_what_its_medium_holds_does_not",
    "test_why_nothing_can_be_mounted_is_known_without_an_attempt",
]
assert set(__all__) == {name for name in globals() if name.startswith("test_")}

"""Device-mapper as only the real kernel shows it; the rest is in the contract."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.errors import DmError
from caam_hotplug.kernel import devmapper
from caam_hotplug.model import VolumeId
from caam_hotplug.names import dm_name, dm_uuid
from fakes.contract import created, found, key_added, mapped, target, until
from fakes.contract import dm_name as name_of
from kernel.real import RealWorld
from kernel.witness import run

CYCLES = 200


@pytest.fixture
def no_udevd() -> Iterator[None]:
    """Stop udevd: a call that waits for a cookie of udev's would never return."""
    units = [f"systemd-udevd{suffix}" for suffix in ("-kernel.socket", "-control.socket", "")]
    run("systemctl", "stop", *units)
    yield
    run("systemctl", "start", *units)


def test_two_hundred_mappings_leave_nothing_without_udevd(world: RealWorld, no_udevd: None) -> None:
    kernel, name = world.kernel, name_of(world)
    files = sorted(os.listdir("/proc/self/fd"))
    with key_added(world) as length:
        line = target(world, length).to_line()
        for _ in range(CYCLES):
            kernel.create_mapping(name, dm_uuid(world.volume.id))
            kernel.load_table(name, line, read_only=False)
            kernel.activate_mapping(name)
            assert os.path.exists(f"/dev/mapper/{name}")
            kernel.remove_mapping(name)
            assert kernel.find_mapping(dm_uuid(world.volume.id)) is None
    assert not os.path.lexists(f"/dev/mapper/{name}")
    assert sorted(os.listdir("/proc/self/fd")) == files
    assert Path("/proc/sysvipc/sem").read_text().count("\n") == 1


def test_a_mapping_works_after_it_was_suspended_without_its_key(world: RealWorld) -> None:
    with mapped(world) as mapping:
        run("dmsetup", "suspend", mapping.name)
        run("dmsetup", "resume", mapping.name)
        assert world.reads_as_written(mapping.node)


@pytest.mark.parametrize("times", [1, 2])
def test_a_suspended_mapping_goes_on_with_an_error_table(world: RealWorld, times: int) -> None:
    with mapped(world) as mapping:
        for _ in range(times):
            run("dmsetup", "suspend", mapping.name)
            world.kernel.load_error_table(mapping.uuid)
            with pytest.raises(OSError, match="Input/output error"):
                world.reads_as_written(mapping.node)


def test_a_mapping_of_several_targets_gets_an_error_table_of_the_same_size(
    world: RealWorld,
) -> None:
    with created(world) as name:
        lines = "".join(f"{start} 8 zero\n" for start in range(0, 800, 8))
        run("dmsetup", "load", name, stdin=lines.encode())
        run("dmsetup", "resume", name)
        world.kernel.load_error_table(dm_uuid(world.volume.id))
        assert found(world).table == ("0 800 error",)


def test_a_table_that_is_longer_than_the_kernels_answer_is_replaced(world: RealWorld) -> None:
    with created(world) as name:
        device, uuid = world.volume.number, dm_uuid(world.volume.id)
        lines = "".join(f"{start} 8 linear {device} {start}\n" for start in range(0, 3200, 8))
        run("dmsetup", "load", name, stdin=lines.encode())
        run("dmsetup", "resume", name)
        assert not world.kernel.has_error_table(uuid)
        world.kernel.load_error_table(uuid)
        assert world.kernel.has_error_table(uuid)
        (line,) = found(world).table
        assert line.endswith(" error")


def test_a_mapping_has_its_node_when_it_is_activated(world: RealWorld) -> None:
    with mapped(world) as mapping:
        node = Path(mapping.node)
        assert node.is_block_device()
        link = Path(f"/dev/mapper/{mapping.name}")
        until(link.exists)
        assert link.is_symlink()
        assert link.stat().st_rdev == node.stat().st_rdev
    until(lambda: not node.exists())


@pytest.mark.parametrize("read_only", [False, True])
def test_a_mapping_is_as_writable_as_its_table(world: RealWorld, *, read_only: bool) -> None:
    with mapped(world, read_only=read_only) as mapping:
        written = Path(f"/sys/class/block/dm-{mapping.number.minor}/ro").read_text()
        assert written == f"{int(read_only)}\n"


def test_all_mappings_of_the_agent_are_found_among_many(world: RealWorld) -> None:
    ids = [VolumeId(world.volume.id.diskseq, number) for number in range(1, 6)]
    with world.foreign_mapping():
        for which in ids:
            devmapper.create(dm_name(which, "x" * 90), dm_uuid(which))
        try:
            assert {mapping.uuid for mapping in devmapper.ours()} == set(map(dm_uuid, ids))
        finally:
            for which in ids:
                devmapper.remove(dm_name(which, "x" * 90))


def test_a_failure_says_what_the_kernel_wants_and_the_library_prints_nothing(
    world: RealWorld, capfd: pytest.CaptureFixture[str]
) -> None:
    with created(world) as name:
        with pytest.raises(DmError) as no_key:
            devmapper.load(name, target(world).to_line(), read_only=False)
        unknown = target(world, cipher="capi:tk(cbc(none))-plain").to_line()
        with key_added(world), pytest.raises(DmError) as no_cipher:
            devmapper.load(name, unknown, read_only=False)
        assert found(world).table == ()
    assert str(no_key.value) == (
        f"load table of mapping {name}: Required key not available "
        "(the kernel does not find the key)"
    )
    assert no_cipher.value.errno == errno.ENOENT
    assert str(no_cipher.value).endswith("(the kernel lacks dm-crypt or the cipher)")
    assert capfd.readouterr() == ("", "")


def test_a_name_that_device_mapper_does_not_take_is_an_error(world: RealWorld) -> None:
    assert world.kernel.our_mappings() == []
    with pytest.raises(DmError) as too_long:
        devmapper.create("x" * 200, dm_uuid(world.volume.id))
    with pytest.raises(DmError):
        devmapper.create("a/b", dm_uuid(world.volume.id))
    assert too_long.value.errno == errno.EINVAL

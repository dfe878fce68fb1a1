"""A volume that is not served is tried again when what is in its way has gone, and not before."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from caam_hotplug.errors import (
    DeviceInUseError,
    DeviceLockedError,
    HotplugError,
    MasterKeyError,
    MountError,
    NoFilesystemError,
    RequestRefusedError,
    UnknownError,
    UnsafePathError,
)
from caam_hotplug.model import DeviceNumber, Mount, State, Volume
from caam_hotplug.volume.obstacles import Obstacle, obstacle_of
from fakes.bench import Bench
from fakes.kernel import FakeKernel, Fault
from life.test_failed_attempts import hold

POINT = "/run/media/cartridge-01"
FOREIGN = Mount(DeviceNumber(8, 99), POINT, "/dev/sdz1", False, "vfat", identity=900)
ELSEWHERE = replace(FOREIGN, point="/mnt")
EXISTS = MountError("mount", "/dev/dm-1 (btrfs)", errno.EEXIST)


def attempts(bench: Bench) -> int:
    return bench.kernel.steps.count("create_mapping")


def occupied(bench: Bench, by: Mount = FOREIGN) -> Volume:
    """Insert a medium whose mount point somebody else has."""
    bench.kernel.mounts.append(by)
    volume = bench.insert()
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.CONFLICT,
        f"/dev/sdz1 is mounted at {POINT}",
    )
    return volume


def in_use(bench: Bench, error: HotplugError = EXISTS, step: str = "mount") -> Volume:
    """Insert a medium whose filesystem is mounted already, as far as the kernel is concerned."""
    bench.kernel.mounts.append(ELSEWHERE)
    bench.kernel.faults.append(Fault(step, error, lasting=True))
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    return volume


def test_a_mount_point_that_somebody_else_gives_back_is_used(bench: Bench) -> None:
    volume = occupied(bench)
    bench.kernel.mounts.remove(FOREIGN)
    bench.report_mounts()
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED


def test_a_mount_point_that_is_given_back_during_the_attempt_is_used(bench: Bench) -> None:
    bench.kernel.mounts.append(FOREIGN)
    volume = bench.insert()
    bench.run_turns(1)

    def give_back(step: str) -> None:
        if step == "remove_mapping" and FOREIGN in bench.kernel.mounts:
            bench.kernel.mounts.remove(FOREIGN)

    bench.kernel.before = give_back
    bench.settle()
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED


def test_mounts_of_others_lead_to_a_check_and_to_no_attempt(bench: Bench) -> None:
    volume = occupied(bench)
    before, published = attempts(bench), len(bench.states)
    for _ in range(5):
        bench.kernel.mounts.append(ELSEWHERE)
        bench.report_mounts()
        bench.wait(5)
    assert (attempts(bench), len(bench.states)) == (before, published)
    assert bench.state(volume) is State.CONFLICT
    bench.kernel.mounts.clear()


def test_what_is_at_the_mount_point_now_is_published(bench: Bench) -> None:
    volume = occupied(bench)
    bench.kernel.directories["cartridge-01"] = "content"
    bench.kernel.mounts.remove(FOREIGN)
    bench.report_mounts()
    bench.wait(5)
    assert bench.reason(volume) == f"{POINT} is not empty"
    bench.kernel.mounts.append(FOREIGN)
    bench.report_mounts()
    bench.wait(5)
    assert bench.reason(volume) == f"/dev/sdz1 is mounted at {POINT}"
    assert bench.kernel.path_watches == []
    bench.kernel.mounts.remove(FOREIGN)
    bench.report_mounts()
    bench.wait(5)
    bench.kernel.free_mount_point("cartridge-01")
    bench.wait(5)
    assert bench.state(volume) is State.MOUNTED


def test_a_mount_point_that_is_emptied_is_used(bench: Bench) -> None:
    bench.kernel.directories["cartridge-01"] = "content"
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.CONFLICT
    bench.kernel.free_mount_point("cartridge-01")
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.path_watches == []


def test_a_mount_point_that_is_written_all_the_time_costs_one_check_a_second(bench: Bench) -> None:
    bench.kernel.directories["cartridge-01"] = "content"
    volume = bench.insert()
    bench.settle()
    before = bench.kernel.steps.count("why_occupied")
    for _ in range(100):
        for watch in bench.kernel.path_watches:
            watch.change()
        bench.wait(0.1)
    assert 8 <= bench.kernel.steps.count("why_occupied") - before <= 11
    assert (attempts(bench), bench.state(volume)) == (1, State.CONFLICT)
    bench.kernel.free_mount_point("cartridge-01")


@pytest.mark.parametrize("end", ["pull", "lock", "stop"])
def test_a_watched_mount_point_is_watched_no_more_afterwards(bench: Bench, end: str) -> None:
    bench.kernel.directories["cartridge-01"] = "content"
    volume = bench.insert()
    bench.settle()
    assert len(bench.kernel.path_watches) == 1
    if end == "pull":
        bench.pull()
    elif end == "lock":
        bench.answer("lock", volume)
    else:
        bench.begin_stop()
    bench.settle()
    assert bench.kernel.path_watches == []
    del bench.kernel.directories["cartridge-01"]


def test_a_mount_point_that_cannot_be_watched_is_looked_at_when_mounts_change(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    exhausted = UnknownError("watch", POINT, errno.ENOSPC)
    bench.kernel.faults.append(Fault("watch_mount_point", exhausted, lasting=True))
    bench.kernel.directories["cartridge-01"] = "content"
    volume = bench.insert()
    bench.settle()
    assert "No space left on device; until then, ask for `retry`" in caplog.text
    bench.kernel.free_mount_point("cartridge-01")
    bench.report_mounts()
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED


def test_a_filesystem_that_is_mounted_elsewhere_is_tried_when_that_has_gone(bench: Bench) -> None:
    volume = in_use(bench)
    bench.kernel.mounts.remove(ELSEWHERE)
    bench.kernel.faults.clear()
    bench.report_mounts()
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED


def test_a_new_mount_is_no_reason_to_try_a_filesystem_in_use(bench: Bench) -> None:
    in_use(bench)
    bench.kernel.mounts.append(replace(ELSEWHERE, point="/mnt/other", number=DeviceNumber(8, 98)))
    bench.report_mounts()
    bench.wait(60)
    del bench.kernel.mounts[0]  # the same filesystem is mounted twice
    bench.kernel.mounts.append(replace(ELSEWHERE, point="/srv"))
    bench.report_mounts()
    bench.wait(60)
    assert attempts(bench) == 1
    bench.kernel.mounts.clear()


def test_a_filesystem_that_stays_in_use_after_its_last_mount_is_tried_a_few_times(
    bench: Bench,
) -> None:
    volume = in_use(bench)
    bench.kernel.mounts.remove(ELSEWHERE)
    bench.wait(5)
    bench.report_mounts()
    tried = []
    for seconds in (0, 1, 2, 4, 8, 3600):
        bench.wait(seconds)
        tried.append(attempts(bench))
    assert tried == [2, 3, 4, 5, 6, 6]
    bench.kernel.faults.clear()
    bench.kernel.mounts.append(ELSEWHERE)
    bench.report_mounts()
    bench.kernel.mounts.remove(ELSEWHERE)
    bench.wait(2)
    bench.report_mounts()
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED


def test_many_changes_lead_to_a_few_attempts(bench: Bench) -> None:
    in_use(bench)
    for _ in range(600):
        bench.kernel.mounts.remove(ELSEWHERE)
        bench.report_mounts()
        bench.wait(0.1)
        bench.kernel.mounts.append(ELSEWHERE)
        bench.report_mounts()
        bench.wait(0.1)
    assert attempts(bench) <= 10
    bench.kernel.mounts.clear()


@pytest.mark.parametrize("step", ["require_unused", "mount"])
def test_a_volume_in_use_is_tried_at_a_report_of_its_device(bench: Bench, step: str) -> None:
    error = DeviceInUseError("use /dev/sda1: it is swap") if step == "require_unused" else EXISTS
    volume = in_use(bench, error, step)
    bench.kernel.faults.clear()
    bench.kernel.mounts.clear()
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


@pytest.mark.parametrize("turn", range(40))
@pytest.mark.parametrize("is_held", [False, True])
def test_a_report_of_a_device_in_use_at_any_turn_after_its_attempt_leads_to_another(
    bench: Bench, turn: int, *, is_held: bool
) -> None:
    bench.settle()
    if is_held:
        hold(bench)
    bench.kernel.faults.append(Fault("mount", EXISTS))
    volume = bench.insert()
    bench.run_turns(turn)
    has_failed = "mount" in bench.kernel.steps
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED or not has_failed


@pytest.mark.parametrize("turn", range(40))
def test_a_master_key_that_comes_at_any_turn_after_its_attempt_leads_to_another(
    bench: Bench, turn: int
) -> None:
    bench.settle()
    bench.kernel.faults.append(Fault("import_blob", MasterKeyError("load the master key x")))
    volume = bench.insert()
    bench.run_turns(turn)
    has_failed = "import_blob" in bench.kernel.steps
    bench.add_blob("master")
    assert bench.state(volume) is State.MOUNTED or not has_failed


def test_a_request_is_answered_between_attempts(bench: Bench) -> None:
    volume = in_use(bench)
    bench.kernel.mounts.remove(ELSEWHERE)
    bench.report_mounts()
    with pytest.raises(RequestRefusedError, match="File exists"):
        bench.answer("retry", volume)
    bench.answer("lock", volume)
    bench.wait(3600)
    assert bench.state(volume) is State.LOCKED


def test_mounts_that_cannot_be_read_are_read_again(bench: Bench) -> None:
    volume = in_use(bench)
    bench.kernel.mounts.remove(ELSEWHERE)
    bench.kernel.faults = [Fault("mounts", UnknownError("read", "mounts", errno.EMFILE))]
    bench.wait(5)
    bench.report_mounts()
    bench.wait(5)
    assert bench.state(volume) is State.MOUNTED


def test_mounts_that_cannot_be_read_for_long_are_asked_for_once_a_second(bench: Bench) -> None:
    volume = in_use(bench)
    bench.kernel.mounts.remove(ELSEWHERE)
    failure = UnknownError("read", "mounts", errno.ENOMEM)
    bench.kernel.faults = [Fault("mounts", failure, lasting=True)]
    bench.report_mounts()
    bench.kernel.steps.clear()
    bench.wait(60)
    assert bench.kernel.steps.count("mounts") == 60
    bench.kernel.faults.clear()
    bench.wait(5)
    assert bench.state(volume) is State.MOUNTED


def test_a_master_key_that_comes_later_is_used_whatever_its_name(bench: Bench) -> None:
    error = MasterKeyError("load the master key master: no blob /data/caam/master.bb")
    bench.kernel.backend = "encrypted"
    bench.kernel.fail_next("load_encrypted_key", error)
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    bench.add_blob("master.bb")
    assert bench.state(volume) is State.MOUNTED


def test_the_blob_of_another_medium_is_no_reason_for_an_attempt(bench: Bench) -> None:
    bench.kernel.blobs["cartridge-01.bb"] = b"foreign"
    bench.insert()
    bench.settle()
    before = list(bench.kernel.steps)
    bench.add_blob("other.bb")
    assert bench.kernel.steps == before


def test_a_blob_directory_whose_owner_or_mode_is_mended_is_read(bench: Bench) -> None:
    folder = Path("/data/caam")
    error = UnsafePathError(folder, folder, "can be written by others", "chmod go-w")
    bench.kernel.fail_next("read_blob", error)
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert bench._supervisor is not None
    bench._supervisor.blob_appeared(None)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_blob_that_comes_while_the_failed_attempt_ends_is_used(bench: Bench) -> None:
    bench.kernel.fail_next("read_blob", UnsafePathError(Path("/data"), Path("/data"), "is", "mend"))
    volume = bench.insert()
    while not any(state is State.FAILED for _, state, _ in bench.states):
        bench.run_turns(1)
    assert bench._supervisor is not None
    bench._supervisor.blob_appeared(None)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_filesystem_that_is_mounted_after_the_failure_and_soon_goes_is_noticed(
    bench: Bench,
) -> None:
    bench.kernel.faults.append(Fault("mount", EXISTS))
    volume = bench.insert()
    bench.settle()
    for change in (bench.kernel.mounts.append, bench.kernel.mounts.remove):
        change(ELSEWHERE)
        bench.report_mounts()
    bench.wait(1)
    assert bench.state(volume) is State.MOUNTED


def test_a_mount_root_that_is_mended_is_used(bench: Bench) -> None:
    root = Path("/run/media")
    error = UnsafePathError(root, root, "can be written by others", "chmod go-w")
    bench.kernel.faults = [Fault("mount", error), Fault("why_occupied", error)]
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    (watch,) = bench.kernel.path_watches
    watch.change()
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED


@pytest.mark.parametrize(
    ("error", "obstacle"),
    [
        (NoFilesystemError("none"), Obstacle.BLOB),
        (DeviceLockedError("locked"), Obstacle.NONE),
        (MountError("mount", "/dev/dm-1", errno.EBUSY), Obstacle.MOUNTED),
        (MountError("mount", "/dev/dm-1", errno.EINVAL), Obstacle.NONE),
        (OSError(errno.EBUSY, "busy"), Obstacle.NONE),
    ],
)
def test_an_error_has_the_obstacle_that_can_go(error: Exception, obstacle: Obstacle) -> None:
    assert obstacle_of(error, FakeKernel().start_process()) is obstacle

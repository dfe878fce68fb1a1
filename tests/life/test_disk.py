"""What the disk itself says of a volume counts, and not what was reported of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.model import State, Volume, VolumeId
from fakes.bench import Bench, InlineWorker

OTHER = "cartridge-02"


@pytest.fixture
def bench(bench: Bench) -> Bench:
    """Agent that has started, with blobs for two labels."""
    bench.settle()
    bench.kernel.blobs[f"{OTHER}.bb"] = bench.kernel.blobs["cartridge-01.bb"] = b"x" * 36
    return bench


def misreported(bench: Bench, on_disk: str | None = OTHER) -> Volume:
    """Insert a medium of this label that udev reports as `cartridge-01`, and settle."""
    volume = bench.kernel.insert(key=b"x" * 36)
    bench.kernel.media["sda1"].says = replace(volume, partlabel=on_disk)
    bench.misreport(volume)
    bench.settle()
    return volume


def points(bench: Bench) -> list[str]:
    return [mount.point.removeprefix("/run/media/") for mount in bench.kernel.mounts]


def test_a_medium_that_udev_takes_for_another_is_mounted_as_what_it_is(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    volume = misreported(bench)
    assert points(bench) == [OTHER]
    assert bench.entry(volume).volume.partlabel == OTHER
    said = [line for line in caplog.messages if "what the disk says counts" in line]
    assert said == [
        "'cartridge-02' (sda1, 1-1): partlabel is 'cartridge-02' on the disk, and udev reports "
        "'cartridge-01'; what the disk says counts"
    ]
    assert all("cartridge-01" not in subject for subject in bench.kernel.subjects)


def test_a_medium_whose_disk_has_no_entry_for_it_is_not_opened(bench: Bench) -> None:
    volume = misreported(bench, None)
    assert bench.state(volume) is State.IGNORED
    assert bench.kernel.keyrings[-1] == {}
    assert "create_mapping" not in bench.kernel.steps


def test_a_medium_whose_disk_cannot_be_read_is_not_opened(bench: Bench) -> None:
    bench.kernel.fail_next("identify", errno.EIO)
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert "read_blob" not in bench.kernel.steps
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("header", ["crypto_LUKS", "LVM2_member", "linux_raid_member"])
@pytest.mark.parametrize("is_early", [False, True], ids=["after udev", "before udev"])
def test_a_medium_with_another_programs_header_is_not_opened(
    bench: Bench, header: str, is_early: bool
) -> None:
    volume = bench.kernel.insert(header=header)
    if is_early:
        bench.announce(volume)
        bench.settle()
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.IGNORED
    assert header in bench.reason(volume)
    assert "create_mapping" not in bench.kernel.steps


@pytest.mark.parametrize("during", ["require_unused", "import_blob", "create_mapping"])
def test_another_medium_in_its_place_is_not_mounted_by_its_label(bench: Bench, during: str) -> None:
    def swap(step: str) -> None:
        if step == during:
            medium = bench.kernel.media["sda1"]
            which = VolumeId(medium.volume.id.diskseq + 10, 1)
            medium.volume = replace(medium.volume, id=which, partlabel=OTHER)

    bench.kernel.before = swap
    volume = bench.insert(key=b"x" * 36)
    bench.settle()
    bench.kernel.before = lambda _step: None
    assert bench.kernel.leftovers() == []
    assert State.MOUNTED not in [state for _, state, _ in bench.states]
    assert "activate_mapping" not in bench.kernel.steps
    later = bench.kernel.media["sda1"].volume
    bench.appear(later)
    bench.settle()
    assert bench.state(volume) is State.GONE
    assert points(bench) == [OTHER]


def test_a_device_is_open_from_the_look_at_its_disk_until_its_table_is_loaded(
    bench: Bench,
) -> None:
    held: dict[str, int] = {}
    bench.kernel.before = lambda step: held.update({step: len(bench.kernel.open_nodes)})
    bench.insert(key=b"x" * 36)
    bench.settle()
    assert {step for step, count in held.items() if count} == {
        "require_unused", "read_blob", "import_blob", "add_key", "create_mapping", "load_table",
        "unlink_key", "require_same",
    }  # fmt: skip
    assert bench.kernel.open_nodes == []


def test_a_medium_that_waits_for_its_mount_point_is_not_held_open_and_is_read_again(
    bench: Bench,
) -> None:
    bench.insert(key=b"x" * 36)
    bench.settle()
    second = bench.kernel.insert(name="sdb1", key=b"x" * 36)
    bench.announce(second)
    bench.settle()
    assert bench.state(second) is State.CONFLICT
    assert bench.kernel.open_nodes == []
    bench.kernel.media["sdb1"].says = replace(second, partlabel=OTHER)
    bench.pull()
    bench.settle()
    assert points(bench) == [OTHER]


def served_early(bench: Bench) -> Volume:
    """Mount a medium before udev has reported it."""
    volume = bench.kernel.insert(key=b"x" * 36)
    bench.announce(volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.steps.clear()
    return volume


def test_a_report_that_the_disk_contradicts_releases_nothing(bench: Bench) -> None:
    volume = served_early(bench)
    bench.misreport(replace(volume, partlabel=OTHER))
    bench.settle()
    assert (points(bench), bench.kernel.steps) == (["cartridge-01"], ["identify"])
    assert bench.entry(volume).volume.partlabel == "cartridge-01"
    assert bench.kernel.open_nodes == []


def test_a_report_with_which_the_disk_agrees_releases_the_medium(bench: Bench) -> None:
    volume = served_early(bench)
    bench.appear(replace(volume, partlabel=OTHER))
    bench.settle()
    assert points(bench) == [OTHER]


def test_a_report_that_cannot_be_compared_with_the_disk_releases_nothing(bench: Bench) -> None:
    volume = served_early(bench)
    bench.kernel.fail_next("identify", errno.EIO)
    bench.misreport(replace(volume, partlabel=OTHER))
    bench.settle()
    assert points(bench) == ["cartridge-01"]


def test_a_fact_that_only_udev_has_releases_the_medium_whatever_the_disk_says(
    bench: Bench,
) -> None:
    volume = served_early(bench)
    bench.misreport(replace(volume, partlabel=OTHER, opted_out=True))
    bench.settle()
    assert points(bench) == []
    assert bench.state(volume) is State.IGNORED


def test_after_a_report_that_the_disk_contradicted_the_next_one_counts_as_the_first(
    bench: Bench,
) -> None:
    volume = misreported(bench)
    assert points(bench) == [OTHER]
    bench.appear(replace(volume, partlabel=OTHER, opted_out=True))
    bench.settle()
    assert points(bench) == []


def test_a_report_that_agrees_with_the_disk_after_one_that_did_not_is_the_first_one(
    bench: Bench,
) -> None:
    volume = misreported(bench)
    for opted_out in (False, True):
        bench.appear(replace(volume, partlabel=OTHER, opted_out=opted_out))
        bench.settle()
        assert points(bench) == [OTHER]


def test_a_mapping_of_another_name_is_adopted_by_what_the_disk_says(bench: Bench) -> None:
    volume = bench.insert(OTHER, key=b"x" * 36)
    bench.settle()
    assert points(bench) == [OTHER]
    medium = bench.kernel.media["sda1"]
    medium.says, medium.volume = volume, replace(volume, partlabel="cartridge-01")
    bench.kill()
    bench.start()
    bench.settle()
    assert points(bench) == [OTHER]
    assert bench.state(volume) is State.MOUNTED


def test_a_mapping_of_another_name_is_adopted_though_its_disk_has_no_entry_any_more(
    bench: Bench,
) -> None:
    volume = bench.insert(OTHER, key=b"x" * 36)
    bench.settle()
    medium = bench.kernel.media["sda1"]
    medium.says = replace(volume, partlabel=None)
    medium.volume = replace(volume, partlabel="cartridge-01")
    bench.kill()
    bench.kernel.steps.clear()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.steps.count("identify") == 1


def test_a_report_releases_nothing_if_the_disk_has_no_entry_any_more(bench: Bench) -> None:
    volume = served_early(bench)
    bench.kernel.media["sda1"].says = replace(volume, partlabel=None)
    bench.misreport(replace(volume, partlabel=OTHER))
    bench.settle()
    assert points(bench) == ["cartridge-01"]


def test_a_mounted_medium_whose_disk_cannot_be_read_is_adopted(bench: Bench) -> None:
    volume = bench.insert(key=b"x" * 36)
    bench.settle()
    bench.kill()
    bench.kernel.fail_next("identify", errno.EIO)
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert points(bench) == ["cartridge-01"]
    bench.kernel.faults.clear()


def test_a_disk_that_says_something_else_each_time_is_read_now_and_then(bench: Bench) -> None:
    looks = count()

    def say_another(step: str) -> None:
        if step == "identify" and (number := next(looks)) < 50:
            medium = bench.kernel.media["sda1"]
            medium.says = replace(medium.volume, partuuid=f"number {number}")

    volume = bench.kernel.insert(key=b"x" * 36)
    bench.kernel.before = say_another
    bench.misreport(volume)
    bench.settle()
    assert next(looks) < 5
    bench.wait(60.0)
    assert bench.state(volume) is State.MOUNTED


def test_a_device_that_no_thread_can_close_now_ends_no_service(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(worker: InlineWorker, words: str, function: Callable[[], Any]) -> Any:
        if words == "close the device":
            raise KernelError("start a thread for", worker.name, errno.EAGAIN)
        return begin(worker, words, function)

    begin = InlineWorker._start
    monkeypatch.setattr(InlineWorker, "_start", start)
    assert bench.state(misreported(bench)) is State.MOUNTED
    assert "start a thread for" in caplog.text
    assert bench.kernel.open_nodes == []


def without_entry(volume: Volume) -> Volume:
    """Return the volume as udev reports it while table and kernel give it different sizes."""
    return replace(volume, partlabel=None, partuuid=None, parttype=None)


def test_a_medium_that_udev_reports_without_its_entry_is_mounted_by_what_the_disk_says(
    bench: Bench,
) -> None:
    volume = bench.kernel.insert(key=b"x" * 36)
    bench.misreport(without_entry(volume))
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert points(bench) == ["cartridge-01"]


def test_a_medium_without_an_entry_anywhere_is_read_once_and_ignored(bench: Bench) -> None:
    volume = bench.kernel.insert(key=b"x" * 36)
    bench.kernel.media["sda1"].says = without_entry(volume)
    bench.misreport(without_entry(volume))
    bench.settle()
    assert bench.state(volume) is State.IGNORED
    assert bench.kernel.steps.count("identify") == 1
    assert bench.kernel.open_nodes == []


def test_a_partition_that_no_rule_matches_under_any_label_is_not_read(bench: Bench) -> None:
    volume = bench.kernel.insert(removable=False)
    bench.misreport(without_entry(volume))
    bench.settle()
    assert bench.state(volume) is State.IGNORED
    assert "identify" not in bench.kernel.steps


def test_a_mounted_medium_keeps_its_label_while_udev_does_not_find_its_entry(
    bench: Bench,
) -> None:
    volume = bench.insert(key=b"x" * 36)
    bench.settle()
    for _ in range(2):
        bench.misreport(without_entry(volume))
        bench.reload_rules(*bench.rules)
        assert bench.state(volume) is State.MOUNTED
    assert bench.entry(volume).volume.partlabel == "cartridge-01"


def test_other_rules_release_nothing_for_a_report_that_the_disk_contradicts(bench: Bench) -> None:
    volume = bench.insert(key=b"x" * 36)
    bench.settle()
    bench.misreport(replace(volume, partlabel=OTHER))
    bench.reload_rules(*bench.rules)
    assert (bench.state(volume), points(bench)) == (State.MOUNTED, ["cartridge-01"])


def test_other_rules_release_a_medium_that_was_relabelled_while_it_was_mounted(
    bench: Bench,
) -> None:
    volume = bench.insert(key=b"x" * 36)
    bench.settle()
    bench.appear(replace(volume, partlabel=OTHER))
    bench.reload_rules(*bench.rules)
    assert (bench.state(volume), points(bench)) == (State.MOUNTED, [OTHER])

"""Release on request: the published state is true of the whole medium, until the next request."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings, OnBusy, OnStop, Rule
from caam_hotplug.config.templates import UnitTemplate
from caam_hotplug.errors import BlobError, DmError, RequestRefusedError, VolumeBusyError
from caam_hotplug.model import DeviceNumber, State, Volume, VolumeId
from fakes.bench import Bench
from fakes.kernel import KEY, Fault

(RULE,) = BUILT_IN
END = UnitTemplate("end@{partlabel}.service")


def running(**changes: object) -> Bench:
    """Start a bench whose agent serves by the built-in rule with these changes."""
    bench = Bench((replace(RULE, **changes),))  # type: ignore[arg-type]
    bench.start()
    bench.settle()
    return bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = running()
    yield made
    if made.running:
        made.cancel()
    made.close()


def served(bench: Bench) -> Volume:
    """Insert a volume and wait until it is mounted."""
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    return volume


def two_of_one_medium(bench: Bench) -> tuple[Volume, Volume]:
    """Insert a disk with two partitions, both mounted."""
    first = served(bench)
    second = bench.kernel.insert("cartridge-02", "sda2")
    object.__setattr__(second, "id", VolumeId(first.id.diskseq, 2))
    object.__setattr__(second, "number", DeviceNumber(8, 99))
    bench.appear(second)
    bench.settle()
    assert bench.state(second) is State.MOUNTED
    return first, second


def test_no_volume_of_a_medium_is_ejected_while_another_is_in_use(bench: Bench) -> None:
    first, second = two_of_one_medium(bench)
    bench.kernel.users["cartridge-02"] = 1
    with pytest.raises(VolumeBusyError, match="cartridge-02 is in use"):
        bench.answer("eject", first)
    assert bench.state(first) is State.MOUNTED
    assert State.EJECTED not in {state for _, state, _ in bench.states}
    bench.kernel.users["cartridge-02"] = 0
    assert bench.answer("eject", first) == "cartridge-01: safe to remove"
    assert bench.state(first) is bench.state(second) is State.EJECTED


def test_a_medium_with_a_volume_that_is_unlocked_again_is_not_safe_to_remove(bench: Bench) -> None:
    first, second = two_of_one_medium(bench)
    bench.answer("eject", first)
    bench.answer("unlock", second)
    assert bench.state(second) is State.MOUNTED
    assert bench.state(first) is State.LOCKED
    assert bench.reason(first) == "another volume of its medium was unlocked"


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_locked_volume_stays_locked_when_the_agent_is_started_again(
    end: str, bench: Bench
) -> None:
    volume = served(bench)
    bench.answer("lock", volume)
    getattr(bench, end)()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.LOCKED
    assert bench.kernel.mounts == []
    bench.answer("unlock", volume)
    bench.kill()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_released_medium_that_is_inserted_again_is_served(bench: Bench) -> None:
    volume = served(bench)
    bench.answer("eject", volume)
    bench.kill()
    bench.kernel.pull()
    again = bench.kernel.insert()
    bench.start()
    bench.settle()
    assert bench.state(again) is State.MOUNTED


def test_an_earlier_change_of_facts_does_not_mount_a_volume_that_is_detached_but_held() -> None:
    bench = running(on_busy=OnBusy.DETACH)
    volume = served(bench)
    bench.appear(replace(volume, vendor="Another"))
    bench.settle()
    bench.kernel.users["cartridge-01"] = 1
    with pytest.raises(RequestRefusedError, match="it goes when they close it"):
        bench.answer("eject", volume)
    assert bench.state(volume) is State.FAILED
    bench.kernel.close_holders()
    bench.settle()
    assert bench.kernel.leftovers() == []
    bench.cancel()
    bench.close()


def test_a_stop_keeps_a_volume_even_while_a_lock_waits_for_its_unit() -> None:
    bench = running(on_stop=OnStop.KEEP, on_unmount=END)
    bench.units.duration_s = 20
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    asked = bench.ask("lock", volume)
    bench.wait(2)
    assert bench.state(volume) is State.DETACHING
    bench.stop()
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/cartridge-01"]
    assert isinstance(asked.exception(), RequestRefusedError)
    bench.close()


def test_a_departed_volume_is_not_published_as_stuck_in_its_power_off(bench: Bench) -> None:
    volume = served(bench)
    bench.kernel.faults.append(Fault("power_off", hangs_s=600))
    bench.ask("eject", volume)
    bench.settle()
    bench.pull()
    bench.settle()
    bench.wait(20)
    assert bench.state(volume) is State.GONE
    assert bench.registry.entries() == []
    bench.wait(900)
    assert [state for _, state, _ in bench.states].count(State.GONE) == 1


def test_a_stop_names_the_power_off_that_it_waits_for(bench: Bench) -> None:
    volume = served(bench)
    bench.kernel.faults.append(Fault("power_off", hangs_s=600))
    bench.ask("eject", volume)
    bench.settle()
    bench.begin_stop()
    assert bench._supervisor is not None
    left = bench.run(bench._supervisor.ended(5))
    assert left == [f"{volume}: power off"]
    bench.wait(900)


def test_a_blob_that_was_read_half_written_is_read_again_when_it_is_complete(bench: Bench) -> None:
    volume = bench.kernel.insert()
    del bench.kernel.blobs["cartridge-01.bb"]
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.WAITING
    bench.kernel.faults.append(Fault("read_blob", BlobError("is cut short: 0 bytes")))
    bench.add_blob("cartridge-01.bb")
    assert bench.state(volume) is State.FAILED
    bench.add_blob("cartridge-01.bb")
    assert bench.state(volume) is State.MOUNTED


def test_a_blob_that_replaces_another_is_tried(bench: Bench) -> None:
    volume = bench.kernel.insert()
    bench.kernel.blobs["cartridge-01.bb"] = b"foreign"
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    bench.add_blob("cartridge-01.bb")
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.blobs["cartridge-01.bb"] == KEY


@pytest.mark.parametrize("nth", range(6))
@pytest.mark.parametrize("holders", [0, 1])
def test_a_volume_is_not_published_as_locked_while_its_mapping_may_exist(
    nth: int, holders: int
) -> None:
    bench = running()
    volume = served(bench)
    for mapping in bench.kernel.mappings.values():
        mapping.holders += holders
    bench.kernel.faults.append(
        Fault("find_mapping", DmError("find mapping", "x", errno.ENOMEM), after=nth)
    )
    try:
        bench.answer("lock", volume)
    except RequestRefusedError:
        assert bench.state(volume) is not State.LOCKED
    else:
        assert bench.state(volume) is State.LOCKED
        assert bench.kernel.mappings == {}
    bench.kernel.faults.clear()
    bench.pull()
    bench.settle()
    bench.kernel.close_holders()
    assert bench.kernel.leftovers() == []
    bench.cancel()
    bench.close()


def test_data_that_users_write_at_their_end_is_flushed_too() -> None:
    bench = running(on_busy=OnBusy.SIGNAL)
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.kernel.fatal_signals = {signal.SIGTERM}
    bench.kernel.steps.clear()
    bench.answer("lock", volume)
    steps = bench.kernel.steps
    ended = steps.index("end_holders")
    assert "flush" in steps[ended : steps.index("unmount", ended)]
    bench.cancel()
    bench.close()


def test_a_medium_that_is_pulled_while_its_users_end_was_removed_unsafely() -> None:
    bench = running(on_busy=OnBusy.SIGNAL)
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.kernel.fatal_signals = {signal.SIGTERM}
    bench.kernel.faults.append(Fault("end_holders", hangs_s=2.0))
    bench.ask("lock", volume)
    bench.wait(1)
    bench.pull()
    bench.wait(5)
    assert State.REMOVED_UNSAFELY in {state for v, state, _ in bench.states if v.id == volume.id}
    bench.cancel()
    bench.close()


@pytest.mark.parametrize("on_busy", [OnBusy.SIGNAL, OnBusy.DETACH])
def test_changed_rules_take_no_volume_from_its_users(on_busy: OnBusy) -> None:
    bench = running(on_busy=on_busy)
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.kernel.fatal_signals = {signal.SIGKILL}
    changed: Rule = replace(RULE, on_busy=on_busy, mount=MountSettings(read_only=True))
    bench.reload_rules(changed)
    assert "end_holders" not in bench.kernel.steps
    assert bench.state(volume) is State.MOUNTED
    assert len(bench.kernel.mounts) == 1
    bench.cancel()
    bench.close()


def test_holders_of_a_volume_that_is_only_unlocked_are_ended_if_the_rule_says_so() -> None:
    bench = running(on_busy=OnBusy.SIGNAL, action=Action.UNLOCK, on_mount=END)
    volume = bench.insert()
    bench.settle()
    (mapping,) = bench.kernel.mappings.values()
    mapping.holders = 1
    with pytest.raises(VolumeBusyError):
        bench.answer("lock", volume)
    assert bench.kernel.steps.count("end_holders") == 2
    assert bench.units.started == []
    bench.cancel()
    bench.close()


def test_a_defect_in_a_power_off_disturbs_no_other_volume(bench: Bench) -> None:
    volume = served(bench)
    bench.kernel.faults.append(Fault("power_off", ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError):
        bench.answer("eject", volume)
    other = bench.insert("cartridge-02", "sdb1")
    bench.settle()
    assert bench.state(other) is State.MOUNTED

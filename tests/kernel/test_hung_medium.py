"""A medium whose I/O never completes: it is published as stuck, and delays no other medium."""

from __future__ import annotations

import pytest

from fakes.contract import until
from kernel.agents import ARRIVAL, Room, mappings
from kernel.cartridges import Faulty
from kernel.forked import Stop

UNTIL_PROBE = ARRIVAL.index("dm resume") + 1
UNTIL_MOUNT = ARRIVAL.index("mkdir") + 1


@pytest.mark.parametrize(
    ("step", "after"), [("probe", UNTIL_PROBE), ("mount", UNTIL_MOUNT)], ids=["probe", "mount"]
)
def test_a_hung_medium_is_published_as_stuck_and_others_are_served_meanwhile(
    faulty: Faulty, room: Room, step: str, after: int
) -> None:
    room.agent.start(Stop(after))
    with faulty.plugged():
        room.agent.until_called(after)
        with faulty.hung():
            room.agent.go_on()
            room.agent.until_said(f"cartridge-03.*: stuck: {step}: the kernel has not answered")
            room.plug_and_check()
            room.plug_and_check(room.neighbour)
            room.pull_and_check()
            room.agent.until_pinged(times=3)
        room.agent.until_said("cartridge-03.*: mounted: at ")
        room.agent.stop()
        assert mappings() == []


@pytest.mark.parametrize("after", [UNTIL_PROBE, UNTIL_MOUNT], ids=["probe", "mount"])
def test_a_stop_does_not_wait_for_a_hung_medium_beyond_its_deadline(
    faulty: Faulty, room: Room, after: int
) -> None:
    room.configure(stop_within_s=5)
    room.agent.start(Stop(after))
    with faulty.plugged():
        room.agent.until_called(after)
        with faulty.hung():
            room.agent.go_on()
            room.agent.until_said("cartridge-03.*: stuck: ")
            room.plug_and_check(room.neighbour)
            (room.point(room.neighbour) / "written").write_bytes(b"before the stop")
            room.agent.request_stop()
            room.agent.until_said("cartridge-03.*: not released within 5 s")
            assert not room.point(room.neighbour).exists()
            assert [name for name in mappings() if "cartridge-03" not in name] == []
        room.agent.until_ended(status=1)
        room.configure()
        room.agent.start()
        until((room.mount_root / faulty.label).is_mount)
        until(room.point(room.neighbour).is_mount)
        assert (room.point(room.neighbour) / "written").read_bytes() == b"before the stop"
        (room.point(room.neighbour) / "written").unlink()
        room.agent.stop()
        assert mappings() == []

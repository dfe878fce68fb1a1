"""docs/how-it-works.md has the outcome of every event in every phase; these tests try each cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN
from caam_hotplug.errors import RequestRefusedError
from caam_hotplug.model import Volume
from caam_hotplug.volume.phases import Phase
from fakes.bench import Bench
from fakes.kernel import Fault

PAGE: Final = Path(__file__).parents[2] / "docs" / "how-it-works.md"
HEADING: Final = "| phase "


def table() -> dict[tuple[str, str], str]:
    """Return the cells of the page's table, by phase and event."""
    lines = PAGE.read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith(HEADING))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    (_, *events), _, *phases = rows
    cells = ((row[0], zip(events, row[1:], strict=True)) for row in phases)
    return {(phase, event): cell for phase, row in cells for event, cell in row}


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    made.start()
    made.settle()
    yield made
    if made.running:
        made.cancel()
    made.close()


def evaluate(bench: Bench) -> Volume:
    volume = bench.kernel.insert()
    bench.kernel.faults.append(Fault("identify", hangs_s=1.0))
    bench.announce(volume)
    bench.wait(0.5)
    return volume


def queued(bench: Bench) -> Volume:
    active(bench)
    volume = bench.insert("cartridge-01", "sdb1")
    bench.settle()
    return volume


def active(bench: Bench) -> Volume:
    volume = bench.insert()
    bench.settle()
    return volume


def idle(bench: Bench) -> Volume:
    bench.kernel.blobs["cartridge-01.bb"] = b"foreign"
    return active(bench)


def parked(bench: Bench) -> Volume:
    volume = active(bench)
    bench.answer("lock", volume)
    return volume


def broken(bench: Bench) -> Volume:
    bench.kernel.fail_next("probe", TypeError("a defect"))
    return active(bench)


ENTER: Final = {
    "Evaluate": evaluate, "Queued": queued, "Active": active, "Idle": idle, "Parked": parked,
    "Broken": broken,
}  # fmt: skip


def asked(verb: str) -> Callable[[Bench, Volume], str]:
    """Return an event that sends this request about the volume. The event returns the answer."""

    def ask(bench: Bench, volume: Volume) -> str:
        task = bench.ask(verb, volume)
        bench.wait(5)
        try:
            bench.run(bench._answer_of(task))
        except RequestRefusedError:
            return "refused"
        return "done"

    return ask


def facts(bench: Bench, volume: Volume) -> str:
    bench.appear(replace(volume, serial="another"))
    return ""


def rules(bench: Bench, _volume: Volume) -> str:
    (rule,) = BUILT_IN
    bench.reload_rules(replace(rule, name="others", match=Match(partlabel="others-*")))
    return ""


def blob(bench: Bench, _volume: Volume) -> str:
    bench.add_blob("cartridge-01.bb")
    return ""


def departs(bench: Bench, volume: Volume) -> str:
    bench.pull(volume.name)
    return ""


def loses_key(bench: Bench, volume: Volume) -> str:
    mapping = bench.kernel.mappings.get(f"caam-cartridge-01-{volume.id}")
    if mapping is not None:
        mapping.key = b"another"
    bench.wake()
    return ""


def unmounts(bench: Bench, volume: Volume) -> str:
    point = f"/run/media/{volume.partlabel}"
    ours = [m for m in bench.kernel.mappings.values() if m.uuid.endswith(f"-{volume.id}")]
    if any(m.point == point and m.number == ours[0].number for m in bench.kernel.mounts if ours):
        bench.by_hand.umount(point)
    return ""


def changes_table(bench: Bench, volume: Volume) -> str:
    mapping = bench.kernel.mappings.get(f"caam-cartridge-01-{volume.id}")
    if mapping is not None:
        bench.by_hand.load(mapping, "0 32768 zero")
        bench.by_hand.resume(mapping)
    return ""


def stops(bench: Bench, _volume: Volume) -> str:
    bench.begin_stop()
    return ""


EVENTS: Final[dict[str, Callable[[Bench, Volume], str]]] = {
    "lock": asked("lock"), "eject": asked("eject"), "unlock": asked("unlock"),
    "retry": asked("retry"), "other facts": facts, "no rule matches": rules,
    "blob appears": blob, "medium departs": departs, "agent stops": stops,
    "key lost in sleep": loses_key, "unmounted by others": unmounts,
    "another table": changes_table,
}  # fmt: skip


def phase_of(bench: Bench, volume: Volume) -> Phase | None:
    assert bench._supervisor is not None
    lifecycle = bench._supervisor._lifecycles.get(volume.id)
    return None if lifecycle is None else lifecycle.record.phase


def test_the_table_has_every_phase_and_every_event() -> None:
    phases = {kind.__name__ for kind in Phase.__subclasses__()}
    assert phases == set(ENTER)
    assert table().keys() == {(phase, event) for phase in ENTER for event in EVENTS}


@pytest.mark.parametrize("phase", ENTER)
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_in_a_phase_leads_where_the_table_says(
    bench: Bench, phase: str, event: str
) -> None:
    volume = ENTER[phase](bench)
    assert type(phase_of(bench, volume)).__name__ == phase
    answer = EVENTS[event](bench, volume)
    bench.wait(5)
    after = phase_of(bench, volume)
    name = "ends" if after is None else type(after).__name__
    outcome = "stays" if name == phase else name
    assert table()[phase, event] == (f"{answer}, {outcome}" if answer else outcome)

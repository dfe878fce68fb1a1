"""What a run of the agent has left at a path is known to the next one, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from caam_hotplug.config.rules import Rule
from caam_hotplug.model import State
from fakes.bench import Bench
from fakes.kernel import Fault
from life.test_own_paths import BY_NAME, POINT, at


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Bench whose rule names a path; afterwards all media are pulled and nothing may be left."""
    bench = Bench((at(POINT),))
    bench.start()
    yield bench
    for name in list(bench.kernel.media):
        bench.pull(name)
    bench.wait(120)
    while bench.kernel.mounts:  # those of others
        bench.by_hand.umount(bench.kernel.mounts[-1].point)
    bench.stop()
    left = bench.kernel.leftovers()
    bench.close()
    assert left == []


def named(rule: Rule, label: str) -> Rule:
    return replace(rule, name=label, match=replace(rule.match, partlabel=label))


def test_a_folder_that_does_not_answer_keeps_no_volume_waiting(bench: Bench) -> None:
    bench.kill()
    bench.kernel.directories["/srv/other"] = "ours"
    bench.kernel.faults.append(Fault("our_paths", hangs_s=3600))
    bench.rules = (named(BY_NAME, "other"), at("/srv/{partlabel}"))
    volume = bench.kernel.insert("other", "sdb1")
    bench.start()
    bench.wait(1)
    assert bench.state(volume) is State.MOUNTED
    bench.answer("lock", volume)
    bench.wait(3600)
    assert bench.kernel.directories == {}

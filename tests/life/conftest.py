"""A bench for every test, with a check that the agent leaves nothing on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fakes.bench import Bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Bench with a running agent; afterwards all media are pulled and nothing may be left."""
    bench = Bench()
    bench.start()
    yield bench
    if bench.running:
        for name in list(bench.kernel.media):
            bench.pull(name)
        bench.settle()
        bench.stop()
    bench.kernel.close_holders()
    left = bench.kernel.leftovers()
    bench.close()
    assert left == []

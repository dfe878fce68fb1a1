"""The soak's first cycles, and a few damaged filesystems; `make soak` runs for hours."""

from __future__ import annotations

from typing import Final

import pytest

from kernel.soak import Figures, soak

CYCLES: Final = 15
DAMAGED: Final = 3
"""Of each of two filesystems."""


@pytest.mark.timeout(1800)
def test_cycles_with_random_faults_leave_nothing_and_lose_no_data(
    udev_rule: None, nothing_left: None
) -> None:
    figures = Figures(seed=7)
    soak(cycles=CYCLES, damaged=DAMAGED, figures=figures, say=print)
    assert figures.cycles == CYCLES
    assert figures.files_checked > 0
    assert figures.damaged.total() == 2 * DAMAGED

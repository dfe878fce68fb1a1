"""The soak's first fifty cycles, and a few damaged filesystems; `make soak` runs for hours."""

from __future__ import annotations

import pytest

from kernel.soak import Figures, soak


@pytest.mark.timeout(1800)
def test_fifty_cycles_with_random_faults_leave_nothing_and_lose_no_data(
    udev_rule: None, nothing_left: None
) -> None:
    figures = Figures(seed=7)
    soak(cycles=50, damaged=5, figures=figures, say=print)
    assert figures.cycles == 50
    assert figures.files_checked > 0
    assert figures.damaged.total() == 10

"""Whatever users do by hand to real media, no published state is false, and no synced file lost."""

from __future__ import annotations

from typing import Final

import pytest

from kernel.saboteur import sabotage

SEED: Final = 7
STEPS: Final = 100


@pytest.mark.timeout(600)
def test_no_state_is_false_whatever_is_done_by_hand(udev_rule: None, nothing_left: None) -> None:
    figures = sabotage(SEED, STEPS, print)
    assert figures.acts.total() == STEPS
    assert figures.files_checked > 0
    print(figures)

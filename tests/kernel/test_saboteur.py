"""Whatever users do by hand to real media, no published state is false, and no synced file lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import pytest

from fakes.oracle import Claim
from kernel import asked
from kernel.compared import FalsehoodError
from kernel.saboteur import at_work, sabotage

SEED: Final = 7
STEPS: Final = 100
LIES: Final[list[tuple[Callable[[Claim], Claim], str]]] = [
    (lambda claim: replace(claim, read_only=True, reason="at it, read-only"), "read-only"),
    (lambda claim: Claim(claim.volume, "ejected", "safe to remove"), "ejected"),
    (lambda claim: Claim(claim.volume, "locked", "lock asked for by uid 0"), "left over"),
]


@pytest.mark.timeout(600)
def test_no_state_is_false_whatever_is_done_by_hand(udev_rule: None, nothing_left: None) -> None:
    figures = sabotage(SEED, STEPS, print)
    assert figures.acts.total() == STEPS
    assert figures.files_checked > 0
    print(figures)


def test_a_published_lie_is_found(
    udev_rule: None, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = asked.Asked.claims
    with at_work(print) as saboteur:
        saboteur.serve_one()
        for lie, kind in LIES:
            said = partial(_lying, truth, lie)
            monkeypatch.setattr(asked.Asked, "claims", lambda of, look, said=said: said(of, look))
            with pytest.raises(FalsehoodError) as raised:
                saboteur.comparison.compare(within_s=1)
            assert kind in {each.kind for each in raised.value.found}
        monkeypatch.setattr(asked.Asked, "claims", truth)
        saboteur.finish()


def _lying(
    truth: Callable[..., list[Claim]], lie: Callable[[Claim], Claim], of: asked.Asked, look: bool
) -> list[Claim]:
    return [lie(each) if each.state == "mounted" else each for each in truth(of, look=look)]


def test_a_file_that_is_not_on_its_medium_is_found(udev_rule: None, nothing_left: None) -> None:
    with at_work(print) as saboteur:
        saboteur.written.expect("cartridge-02", "never-written", b"")
        with pytest.raises(FalsehoodError, match=r"lost byte.*never-written of cartridge-02"):
            saboteur.finish()

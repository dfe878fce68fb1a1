"""Whatever users do by hand, no published state is false; and who compares that can see a lie."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import pytest

from fakes.oracle import Claim
from life.saboteur import FalsehoodError, Saboteur, Step, plan, run, sabotage

SEEDS: Final = 100
STEPS: Final = 100
"""Of each seed: 10,000 in all."""
WITHOUT_EVENT: Final = {"suspended", "ejected", "hidden"}
"""Facts that change without an event, and are found when all is looked at."""
Lie = Callable[[Claim], Claim]


@pytest.fixture
def saboteur() -> Iterator[Saboteur]:
    made = Saboteur()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Collect no log of thousands of steps."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("first", range(1, SEEDS + 1, 10))
def test_no_state_is_false_whatever_is_done_by_hand(first: int) -> None:
    for seed in range(first, first + 10):
        assert set(run(seed, STEPS)) <= WITHOUT_EVENT


def test_a_seed_does_the_same_again() -> None:
    said: list[list[str]] = [[], []]
    for lines in said:
        sabotage(plan(3, 40), lines.append)
    assert said[0] == said[1]
    assert plan(3, 20) == plan(3, 40)[:20]


@pytest.mark.parametrize(
    ("lie", "kind"),
    [
        (lambda claim: replace(claim, read_only=True, reason="at it, read-only"), "read-only"),
        (lambda claim: Claim(claim.volume, "ejected", "safe to remove"), "ejected"),
        (lambda claim: Claim(claim.volume, "locked", "lock asked for by uid 0"), "left over"),
    ],
    ids=["how it is mounted", "safe to remove", "released"],
)
def test_a_published_lie_is_found_and_the_command_that_repeats_it_named(
    saboteur: Saboteur, lie: Lie, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = Saboteur._claims

    def claims(of: Saboteur) -> list[Claim]:
        return [lie(each) if each.state == "mounted" else each for each in truth(of)]

    monkeypatch.setattr(Saboteur, "_claims", claims)
    with pytest.raises(FalsehoodError) as raised:
        run(2, STEPS)
    assert kind in {each.kind for each in raised.value.found}
    assert any("--seed 2 --steps" in note for note in raised.value.__notes__)


def test_a_byte_of_one_medium_on_another_is_found(saboteur: Saboteur) -> None:
    saboteur.bench.insert("cartridge-01", "sdr1")
    saboteur.settle()
    (mount,) = saboteur.kernel.mounts
    assert saboteur.pages.write(mount, "a file")
    saboteur.kernel.change("cartridge-02", "sdr1")
    (mapping,) = saboteur.kernel.mappings.values()
    saboteur.pages.write_back(mapping, False)  # the kernel does so before its event
    with pytest.raises(FalsehoodError, match="foreign byte"):
        saboteur.do(Step("swap", random.Random(1).getrandbits(32), settles=True))

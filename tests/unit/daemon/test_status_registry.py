from __future__ import annotations

import logging

import pytest

from caam_hotplug.daemon.status_registry import Board
from caam_hotplug.model import Entry, State, VolumeId
from unit.volumes import stick

FIRST = stick()
SECOND = stick(id=VolumeId(8, 1), name="sdc1")


def listened() -> tuple[Board, list[Entry]]:
    board = Board()
    heard: list[Entry] = []
    board.listen(heard.append)
    return board, heard


def test_every_listener_hears_what_is_published() -> None:
    board, heard = listened()
    also: list[Entry] = []
    board.listen(also.append)
    board.publish(Entry(FIRST, State.UNLOCKING, ""))
    board.publish(Entry(FIRST, State.MOUNTED, "at /run/media/cartridge"))
    assert (
        heard
        == also
        == [
            Entry(FIRST, State.UNLOCKING, ""),
            Entry(FIRST, State.MOUNTED, "at /run/media/cartridge"),
        ]
    )


def test_a_listener_does_not_hear_what_was_before_it() -> None:
    board = Board()
    board.publish(Entry(FIRST, State.MOUNTED, ""))
    heard: list[Entry] = []
    board.listen(heard.append)
    assert heard == []


def test_what_is_known_already_is_not_published_again() -> None:
    board, heard = listened()
    board.publish(Entry(FIRST, State.WAITING, "no blob"))
    board.publish(Entry(FIRST, State.WAITING, "no blob"))
    assert len(heard) == 1


def test_another_reason_or_another_fact_of_the_volume_is_news() -> None:
    board, heard = listened()
    board.publish(Entry(FIRST, State.WAITING, "no blob"))
    board.publish(Entry(FIRST, State.WAITING, "no blob yet"))
    board.publish(Entry(stick(read_only=True), State.WAITING, "no blob yet"))
    assert len(heard) == 3
    assert board.entries() == [Entry(stick(read_only=True), State.WAITING, "no blob yet")]


def test_entries_stand_in_the_order_of_arrival_whatever_happens_to_them_later() -> None:
    board, _ = listened()
    board.publish(Entry(SECOND, State.UNLOCKING, ""))
    board.publish(Entry(FIRST, State.UNLOCKING, ""))
    board.publish(Entry(SECOND, State.MOUNTED, ""))
    assert [entry.volume for entry in board.entries()] == [SECOND, FIRST]


def test_a_volume_that_is_gone_is_told_and_forgotten() -> None:
    board, heard = listened()
    board.publish(Entry(FIRST, State.MOUNTED, ""))
    board.publish(Entry(FIRST, State.GONE, ""))
    assert heard[-1] == Entry(FIRST, State.GONE, "")
    assert board.entries() == []


def test_an_unsafe_removal_stays_until_the_next_volume_arrives() -> None:
    board, _ = listened()
    board.publish(Entry(FIRST, State.MOUNTED, ""))
    board.publish(Entry(FIRST, State.REMOVED_UNSAFELY, "was mounted"))
    assert board.entries() == [Entry(FIRST, State.REMOVED_UNSAFELY, "was mounted")]
    board.publish(Entry(SECOND, State.UNLOCKING, ""))
    assert board.entries() == [Entry(SECOND, State.UNLOCKING, "")]


def test_news_of_a_volume_that_is_present_does_not_hide_an_unsafe_removal() -> None:
    board, _ = listened()
    board.publish(Entry(FIRST, State.MOUNTED, ""))
    board.publish(Entry(SECOND, State.UNLOCKING, ""))
    board.publish(Entry(FIRST, State.REMOVED_UNSAFELY, "was mounted"))
    board.publish(Entry(SECOND, State.MOUNTED, ""))
    assert [entry.state for entry in board.entries()] == [State.REMOVED_UNSAFELY, State.MOUNTED]


def test_the_summary_counts_states_and_leaves_out_what_is_ignored() -> None:
    board, _ = listened()
    assert board.summary() == "no media"
    board.publish(Entry(stick(id=VolumeId(1, 1)), State.IGNORED, "no rule"))
    assert board.summary() == "no media"
    for diskseq, state in enumerate([State.FAILED, State.MOUNTED, State.MOUNTED], start=2):
        board.publish(Entry(stick(id=VolumeId(diskseq, 1)), state, ""))
    assert board.summary() == "2 mounted, 1 failed"


@pytest.mark.parametrize(
    ("state", "level"),
    [
        (State.MOUNTED, logging.INFO),
        (State.WAITING, logging.WARNING),
        (State.CONFLICT, logging.WARNING),
        (State.REMOVED_UNSAFELY, logging.WARNING),
        (State.FAILED, logging.ERROR),
        (State.STUCK, logging.ERROR),
    ],
)
def test_the_journal_has_volume_state_and_reason_at_the_states_level(
    state: State, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    Board().publish(Entry(FIRST, state, "because"))
    assert caplog.record_tuples == [
        (
            "caam_hotplug.daemon.status_registry",
            level,
            f"'cartridge' (sdb1, 7-1): {state.value}: because",
        )
    ]


def test_a_state_without_a_reason_is_logged_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    Board().publish(Entry(FIRST, State.MOUNTING, ""))
    assert caplog.messages == ["'cartridge' (sdb1, 7-1): mounting"]


def test_other_facts_of_the_same_state_are_told_and_not_logged_and_do_not_make_it_younger(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    board, heard = listened()
    board.publish(Entry(FIRST, State.MOUNTED, rule="cartridges"))
    (first,) = board.entries()
    board.publish(Entry(FIRST, State.MOUNTED, rule="all"))
    assert [entry.rule for entry in heard] == ["cartridges", "all"]
    assert [entry.since for entry in board.entries()] == [first.since]
    assert len(caplog.messages) == 1


def test_how_often_a_state_was_reached_is_counted() -> None:
    board, _ = listened()
    for volume in (FIRST, SECOND, FIRST):
        for state in (State.UNLOCKING, State.MOUNTED, State.GONE):
            board.publish(Entry(volume, state))
    assert board.counters == {"unlocking": 3, "mounted": 3, "gone": 3}


def test_what_is_logged_has_fields_for_the_journal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Board().publish(Entry(FIRST, State.MOUNTED, rule="sticks"))
    (record,) = caplog.records
    fields = vars(record)["fields"]
    assert (fields["EVENT"], fields["VOLUME"], fields["RULE"]) == ("mounted", FIRST, "sticks")

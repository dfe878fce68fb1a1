from __future__ import annotations

import asyncio
import logging

import pytest

from caam_hotplug.daemon.status_registry import StatusRegistry
from caam_hotplug.model import Entry, State, VolumeId
from unit.volumes import stick

FIRST = stick()
SECOND = stick(id=VolumeId(8, 1), name="sdc1")


def listened() -> tuple[StatusRegistry, list[Entry]]:
    registry = StatusRegistry()
    heard: list[Entry] = []
    registry.listen(heard.append)
    return registry, heard


def test_every_listener_gets_every_entry() -> None:
    registry, heard = listened()
    also: list[Entry] = []
    registry.listen(also.append)
    registry.publish(Entry(FIRST, State.UNLOCKING, ""))
    registry.publish(Entry(FIRST, State.MOUNTED, "at /run/media/cartridge"))
    assert (
        heard
        == also
        == [
            Entry(FIRST, State.UNLOCKING, ""),
            Entry(FIRST, State.MOUNTED, "at /run/media/cartridge"),
        ]
    )


def test_a_listener_gets_no_earlier_entries() -> None:
    registry = StatusRegistry()
    registry.publish(Entry(FIRST, State.MOUNTED, ""))
    heard: list[Entry] = []
    registry.listen(heard.append)
    assert heard == []


def test_an_unchanged_entry_is_not_published_again() -> None:
    registry, heard = listened()
    registry.publish(Entry(FIRST, State.WAITING, "no blob"))
    registry.publish(Entry(FIRST, State.WAITING, "no blob"))
    assert len(heard) == 1


def test_another_reason_or_another_fact_of_the_volume_is_a_change() -> None:
    registry, heard = listened()
    registry.publish(Entry(FIRST, State.WAITING, "no blob"))
    registry.publish(Entry(FIRST, State.WAITING, "no blob yet"))
    registry.publish(Entry(stick(read_only=True), State.WAITING, "no blob yet"))
    assert len(heard) == 3
    assert registry.entries() == [Entry(stick(read_only=True), State.WAITING, "no blob yet")]


def test_entries_stay_in_the_order_of_arrival() -> None:
    registry, _ = listened()
    registry.publish(Entry(SECOND, State.UNLOCKING, ""))
    registry.publish(Entry(FIRST, State.UNLOCKING, ""))
    registry.publish(Entry(SECOND, State.MOUNTED, ""))
    assert [entry.volume for entry in registry.entries()] == [SECOND, FIRST]


def test_a_volume_that_is_gone_is_published_and_forgotten() -> None:
    registry, heard = listened()
    registry.publish(Entry(FIRST, State.MOUNTED, ""))
    registry.publish(Entry(FIRST, State.GONE, ""))
    assert heard[-1] == Entry(FIRST, State.GONE, "")
    assert registry.entries() == []


def test_an_unsafe_removal_stays_until_the_next_volume_arrives() -> None:
    registry, _ = listened()
    registry.publish(Entry(FIRST, State.MOUNTED, ""))
    registry.publish(Entry(FIRST, State.REMOVED_UNSAFELY, "was mounted"))
    assert registry.entries() == [Entry(FIRST, State.REMOVED_UNSAFELY, "was mounted")]
    registry.publish(Entry(SECOND, State.UNLOCKING, ""))
    assert registry.entries() == [Entry(SECOND, State.UNLOCKING, "")]


def test_a_change_of_a_present_volume_does_not_hide_an_unsafe_removal() -> None:
    registry, _ = listened()
    registry.publish(Entry(FIRST, State.MOUNTED, ""))
    registry.publish(Entry(SECOND, State.UNLOCKING, ""))
    registry.publish(Entry(FIRST, State.REMOVED_UNSAFELY, "was mounted"))
    registry.publish(Entry(SECOND, State.MOUNTED, ""))
    assert [entry.state for entry in registry.entries()] == [State.REMOVED_UNSAFELY, State.MOUNTED]


def test_the_summary_counts_states_without_ignored_volumes() -> None:
    registry, _ = listened()
    assert registry.summary() == "no media"
    registry.publish(Entry(stick(id=VolumeId(1, 1)), State.IGNORED, "no rule"))
    assert registry.summary() == "no media"
    for diskseq, state in enumerate([State.FAILED, State.MOUNTED, State.MOUNTED], start=2):
        registry.publish(Entry(stick(id=VolumeId(diskseq, 1)), state, ""))
    assert registry.summary() == "2 mounted, 1 failed"


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
    StatusRegistry().publish(Entry(FIRST, state, "because"))
    assert caplog.record_tuples == [
        (
            "caam_hotplug.daemon.status_registry",
            level,
            f"'cartridge' (sdb1, 7-1): {state.value}: because",
        )
    ]


def test_a_state_without_a_reason_is_logged_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    StatusRegistry().publish(Entry(FIRST, State.MOUNTING, ""))
    assert caplog.messages == ["'cartridge' (sdb1, 7-1): mounting"]


def test_other_facts_of_the_same_state_are_published_without_a_log_record_or_a_new_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    registry, heard = listened()
    registry.publish(Entry(FIRST, State.MOUNTED, rule="cartridges"))
    (first,) = registry.entries()
    registry.publish(Entry(FIRST, State.MOUNTED, rule="all"))
    assert [entry.rule for entry in heard] == ["cartridges", "all"]
    assert [entry.since for entry in registry.entries()] == [first.since]
    assert len(caplog.messages) == 1


def test_arrivals_at_a_state_are_counted() -> None:
    registry, _ = listened()
    for volume in (FIRST, SECOND, FIRST):
        for state in (State.UNLOCKING, State.MOUNTED, State.GONE):
            registry.publish(Entry(volume, state))
    assert registry.counters == {"unlocking": 3, "mounted": 3, "gone": 3}


def test_a_log_record_has_fields_for_the_journal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    StatusRegistry().publish(Entry(FIRST, State.MOUNTED, rule="sticks"))
    (record,) = caplog.records
    fields = vars(record)["fields"]
    assert (fields["EVENT"], fields["VOLUME"], fields["RULE"]) == ("mounted", FIRST, "sticks")


async def test_the_begin_of_a_release_is_published_with_what_follows() -> None:
    registry, heard = listened()
    registry.publish_soon(Entry(FIRST, State.DETACHING))
    registry.publish_soon(Entry(SECOND, State.MOUNTED))
    await asyncio.sleep(0)
    assert heard == []
    registry.publish_soon(Entry(FIRST, State.REMOVED_UNSAFELY))
    await asyncio.sleep(0)
    assert [entry.state for entry in heard] == [
        State.DETACHING,
        State.MOUNTED,
        State.REMOVED_UNSAFELY,
    ]


async def test_the_begin_of_a_long_release_is_published_a_moment_later() -> None:
    registry, heard = listened()
    published = asyncio.Event()
    registry.listen(lambda _: published.set())
    registry.publish_soon(Entry(FIRST, State.DETACHING))
    await published.wait()
    assert [entry.state for entry in heard] == [State.DETACHING]


async def test_an_entry_while_nothing_is_released_is_published_in_the_next_turn() -> None:
    registry, heard = listened()
    for state in (State.DETACHING, State.GONE, State.UNLOCKING):
        registry.publish_soon(Entry(FIRST, state))
    assert heard == []
    await asyncio.sleep(0)
    assert len(heard) == 3

"""Cards in readers that nobody polls and nobody reads, since udevd does not work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.kernel import udev
from kernel import gadgets
from kernel.agents import Room
from kernel.cartridges import Cartridge
from kernel.test_lost_events import udevd_hanging

DEFAULT: Final = Path("/sys/module/block/parameters/events_dfl_poll_msecs")


@pytest.fixture
def reader(media: list[Cartridge]) -> Iterator[gadgets.Reader]:
    """An empty reader, while udevd does not act on events."""
    with gadgets.reader_with([media[0].label], media[0].contents) as made, udevd_hanging():
        yield made
        made.take_out()


@contextmanager
def unpolled() -> Iterator[None]:
    """Set no interval for readers, as on a machine without udevd."""
    before = DEFAULT.read_text()
    DEFAULT.write_text("0")
    try:
        yield
    finally:
        DEFAULT.write_text(before)


def test_a_card_in_a_reader_that_nobody_polls_is_noticed_without_udevd(
    room: Room, reader: gadgets.Reader
) -> None:
    room.configuration.write_text('source = "kernel"\n' + room.configuration.read_text())
    with unpolled():
        room.agent.start()
        room.agent.until_said_ever("nobody asked it for cards; the kernel polls it now")
        for _ in range(2):
            room.agent.forget()
            reader.put_in(reader.cards[0])
            room.check_served()
            reader.take_out()
            room.wait_until_released()


def test_a_card_in_an_empty_reader_is_noticed_though_udevd_hangs(
    room: Room, reader: gadgets.Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udev, "UDEV_PATIENCE_S", 1.0)
    room.agent.start()
    reader.put_in(reader.cards[0])
    room.check_served()
    reader.take_out()
    room.wait_until_released()

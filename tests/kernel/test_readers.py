"""Cards in readers that nobody polls and nobody reads, since udevd does not work."""

from __future__ import annotations

import os
import tempfile
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
from kernel.witness import run

UNIT: Final = Path("/sys/kernel/config/usb_gadget/stick/functions/mass_storage.0/lun.0")
DEFAULT: Final = Path("/sys/module/block/parameters/events_dfl_poll_msecs")


class Reader:
    """A reader of a USB stick's kind, with its card."""

    def __init__(self, card: Path) -> None:
        self._card = card

    def put_in(self) -> None:
        (UNIT / "file").write_text(str(self._card))

    def take_out(self) -> None:
        (UNIT / "forced_eject").write_text("1")


@pytest.fixture
def reader(media: list[Cartridge]) -> Iterator[Reader]:
    """An empty reader, while udevd does not act on events."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        card = Path(folder) / "card"
        card.touch()
        os.truncate(card, len(media[0].contents) + (2 << 20))
        layout = f'label: gpt\nstart=2048, name="{media[0].label}"\n'
        run("sfdisk", "-q", str(card), stdin=layout.encode())
        with card.open("r+b") as opened:
            opened.seek(1 << 20)
            opened.write(media[0].contents)
        with gadgets.stick([card]):
            made = Reader(card)
            made.take_out()
            run("udevadm", "settle")
            with udevd_hanging():
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
    room: Room, reader: Reader
) -> None:
    room.configuration.write_text('source = "kernel"\n' + room.configuration.read_text())
    with unpolled():
        room.agent.start()
        room.agent.until_said_ever("nobody asked it for cards; the kernel polls it now")
        for _ in range(2):
            room.agent.forget()
            reader.put_in()
            room.check_served()
            reader.take_out()
            room.wait_until_released()


def test_a_card_in_an_empty_reader_is_noticed_though_udevd_hangs(
    room: Room, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udev, "UDEV_PATIENCE_S", 1.0)
    room.agent.start()
    reader.put_in()
    room.check_served()
    reader.take_out()
    room.wait_until_released()

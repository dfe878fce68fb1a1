from __future__ import annotations

import array
import ast
import fcntl
import logging
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import caam_hotplug
from caam_hotplug.model import Entry, SecretBytes, State
from caam_hotplug.systemd import journal
from caam_hotplug.systemd.journal import Event, JournalHandler, encoded, event
from unit.test_secrets import KEY, shows_the_key
from unit.volumes import stick

Fields = dict[str, list[bytes]]


def parsed(entry: bytes) -> Fields:
    """Return an entry as the journal reads it (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    found: Fields = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, end, rest = (
                rest[8 : 8 + length],
                rest[8 + length : 9 + length],
                rest[9 + length :],
            )
            assert len(value) == length
            assert end == b"\n"
        found.setdefault(name.decode(), []).append(value)
        entry = rest
    return found


class Journal:
    """The two sockets of a journal, and what was received on them."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "socket"
        self.datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagrams.bind(str(self.address))
        self.datagrams.setblocking(False)
        self.stream, self._read_end = socket.socketpair()
        self._read_end.setblocking(False)

    def close(self) -> None:
        for end in (self.datagrams, self.stream, self._read_end):
            end.close()

    def entry(self) -> Fields:
        """Receive the next entry. Raises: BlockingIOError if there is none."""
        return parsed(self.datagrams.recv(1 << 20))

    def entry_in_a_file(self) -> tuple[Fields, int]:
        """Receive the next entry, which came as a file, and return the file's seals."""
        files = array.array("i")
        content, ancillary, _, _ = self.datagrams.recvmsg(4096, socket.CMSG_SPACE(files.itemsize))
        assert content == b""
        files.frombytes(ancillary[0][2])
        with os.fdopen(files[0], "rb") as file:
            return parsed(os.pread(file.fileno(), 1 << 24, 0)), fcntl.fcntl(file, fcntl.F_GET_SEALS)

    def lines(self) -> bytes:
        """Receive all lines of the stream."""
        try:
            return self._read_end.recv(1 << 20)
        except BlockingIOError:
            return b""

    def fill_stream(self) -> None:
        """Fill the stream until it takes nothing more."""
        for size in (4096, 1):
            try:
                while True:
                    self.stream.send(bytes(size), socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path)
    yield made
    made.close()


@pytest.fixture
def log(there: Journal) -> Iterator[logging.Logger]:
    """A logger whose only handler writes to the journal."""
    logger = logging.Logger("caam_hotplug.test", logging.DEBUG)
    handler = JournalHandler(there.address, there.stream.fileno())
    logger.addHandler(handler)
    yield logger
    handler.close()


def test_a_record_is_one_entry_with_its_fields(there: Journal, log: logging.Logger) -> None:
    volume = stick(partlabel="cartridge-01")
    extra = event(State.MOUNTED, volume=volume, rule="sticks", mount_point=Path("/run/media/c"))
    log.info("%s: mounted", volume, extra=extra)
    entry = there.entry()
    assert entry["MESSAGE"] == [str(volume).encode() + b": mounted"]
    assert entry["PRIORITY"] == [b"6"]
    assert entry["SYSLOG_IDENTIFIER"] == [b"caam-hotplug"]
    assert entry["MESSAGE_ID"] == [Event.MOUNTED.value.encode()]
    assert entry["EVENT"] == [b"mounted"]
    assert entry["STATE"] == [b"mounted"]
    assert entry["VOLUME"] == [str(volume.id).encode()]
    assert entry["DEVICE"] == [volume.node.encode()]
    assert entry["LABEL"] == [b"cartridge-01"]
    assert entry["RULE"] == [b"sticks"]
    assert entry["MOUNT_POINT"] == [b"/run/media/c"]
    assert there.lines() == b""


def test_a_published_status_has_a_field_for_each_known_fact(
    there: Journal, log: logging.Logger
) -> None:
    entry = Entry(
        stick(),
        State.MOUNTED,
        rule="sticks",
        blob="/data/caam/cartridge.bb",
        mapping_name="caam-cartridge-7-1",
        mount_point="/run/media/cartridge",
        filesystem="ext4",
        steps={"mount": 0.042},
    )
    log.info("x", extra=journal.published(entry))
    found = there.entry()
    assert found["EVENT"] == found["STATE"] == [b"mounted"]
    assert found["BLOB"] == [b"/data/caam/cartridge.bb"]
    assert found["MAPPING"] == [b"caam-cartridge-7-1"]
    assert found["MOUNT_POINT"] == [b"/run/media/cartridge"]
    assert found["FILESYSTEM"] == [b"ext4"]
    assert found["DURATION_MOUNT_US"] == [b"42000"]
    assert "REASON" not in found
    log.info("x", extra=journal.published(replace(entry, state=State.DETACHING)))
    assert "DURATION_MOUNT_US" not in there.entry()


def test_fields_need_no_import_of_the_journal_module(there: Journal, log: logging.Logger) -> None:
    log.warning("adopting", extra={"fields": {"EVENT": "adopted", "VOLUME": stick()}})
    entry = there.entry()
    assert entry["MESSAGE_ID"] == [Event.ADOPTED.value.encode()]
    assert entry["VOLUME"] == [str(stick().id).encode()]


def test_a_record_without_fields_is_an_entry(there: Journal, log: logging.Logger) -> None:
    log.error("plain")
    assert there.entry() == {
        "MESSAGE": [b"plain"],
        "PRIORITY": [b"3"],
        "SYSLOG_IDENTIFIER": [b"caam-hotplug"],
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [("CRITICAL", b"2"), ("ERROR", b"3"), ("WARNING", b"4"), ("INFO", b"6"), ("DEBUG", b"7")],
)
def test_levels_are_priorities(
    there: Journal, log: logging.Logger, level: str, priority: bytes
) -> None:
    log.log(getattr(logging, level), "x")
    assert there.entry()["PRIORITY"] == [priority]


def test_durations_and_lists_become_several_fields_and_none_is_omitted(
    there: Journal, log: logging.Logger
) -> None:
    duration = {"import the blob": 0.000301, "mount": 0.042}
    extra = event(Event.BUSY, duration=duration, holder=["12 sh", "13 vi"], reason=None, fresh=True)
    log.info("x", extra=extra)
    entry = there.entry()
    assert entry["DURATION_IMPORT_THE_BLOB_US"] == [b"301"]
    assert entry["DURATION_MOUNT_US"] == [b"42000"]
    assert entry["HOLDER"] == [b"12 sh", b"13 vi"]
    assert entry["FRESH"] == [b"True"]
    assert "REASON" not in entry


def test_a_traceback_stays_with_its_message(there: Journal, log: logging.Logger) -> None:
    try:
        raise ValueError("of the test")
    except ValueError:
        log.exception("a defect", extra=event(Event.DEFECT))
    (message,) = there.entry()["MESSAGE"]
    assert message.startswith(b"a defect\nTraceback ")
    assert message.endswith(b"ValueError: of the test")


HOSTILE = st.text() | st.text(st.characters(codec=None, categories=None), max_size=20)


def as_bytes(text: str) -> bytes:
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")


@given(message=HOSTILE, label=HOSTILE, reason=HOSTILE)
def test_hostile_values_stay_in_their_own_fields(message: str, label: str, reason: str) -> None:
    fields = event(State.FAILED, volume=stick(partlabel=label), reason=reason)["fields"]
    entry = parsed(encoded(message, 3, fields))
    assert entry["MESSAGE"] == [as_bytes(message)]
    assert entry["LABEL"] == [as_bytes(label)]
    assert entry["REASON"] == [as_bytes(reason)]
    assert entry["PRIORITY"] == [b"3"]
    assert entry["MESSAGE_ID"] == [Event.FAILED.value.encode()]


def test_bytes_of_a_label_that_are_no_utf_8_are_kept(there: Journal, log: logging.Logger) -> None:
    label = b"a\xff\n\0MESSAGE_ID=0\nPRIORITY=0"
    volume = stick(partlabel=label.decode(errors="surrogateescape"))
    log.info("x", extra=event(State.IGNORED, volume=volume))
    entry = there.entry()
    assert entry["LABEL"] == [label]
    assert entry["PRIORITY"] == [b"6"]


@given(name=HOSTILE)
def test_every_field_name_is_one_that_the_journal_accepts(name: str) -> None:
    entry = parsed(encoded("x", 6, {name: "value", "VOLUME": "1-1"}))
    assert entry["MESSAGE"] == [b"x"]
    for field in entry:
        assert 0 < len(field) <= 64
        assert field[0].isalpha()
        assert all(c.isascii() and (c.isupper() or c.isdigit() or c == "_") for c in field)


def test_a_record_cannot_set_the_fields_of_the_entry(there: Journal, log: logging.Logger) -> None:
    log.info("x", extra={"fields": {"MESSAGE": "y", "PRIORITY": 0, "MESSAGE_ID": "0"}})
    assert there.entry()["MESSAGE"] == [b"x"]


def test_key_material_that_is_given_as_a_field_is_not_written() -> None:
    for key in (KEY, bytearray(KEY), memoryview(KEY), SecretBytes(bytearray(KEY)), [KEY]):
        entry = encoded(
            f"{SecretBytes(bytearray(KEY))}", 6, event(Event.UNLOCKED, key=key)["fields"]
        )
        assert b"35 " in entry
        assert not shows_the_key(entry.decode("latin-1"))


def test_an_entry_too_large_for_a_datagram_is_sent_as_a_sealed_file(
    there: Journal, log: logging.Logger
) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    reason = "line\n" * 1_000_000
    log.error("x", extra=event(State.FAILED, reason=reason))
    entry, seals = there.entry_in_a_file()
    assert entry["REASON"] == [reason.encode()]
    assert seals == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_without_the_journals_socket_a_line_goes_to_the_stream(
    there: Journal, log: logging.Logger
) -> None:
    there.address.unlink()
    log.warning("%s", "of \udcff", extra=event(Event.ADOPTED))
    assert there.lines() == b"<4>of \\udcff\n"


def test_a_journal_that_does_not_read_delays_nothing_and_later_gets_a_count_of_lost_messages(
    there: Journal, log: logging.Logger
) -> None:
    there.fill_stream()
    began = time.monotonic()
    for number in range(1000):  # a socket's queue has some ten or hundreds
        log.info("%d", number)
    assert time.monotonic() - began < 5
    taken = 0
    while True:
        try:
            assert there.entry()["MESSAGE"] == [b"%d" % taken]
        except BlockingIOError:
            break
        taken += 1
    assert 0 < taken < 1000
    log.info("again")
    lost, again = there.entry(), there.entry()
    assert lost["MESSAGE"] == [b"%d messages did not reach the journal" % (1000 - taken)]
    assert lost["MESSAGE_ID"] == [Event.LOG_LOST.value.encode()]
    assert again["MESSAGE"] == [b"again"]
    log.info("and again")
    assert there.entry()["MESSAGE"] == [b"and again"]


def test_records_go_to_the_stream_while_the_journals_socket_is_full(
    there: Journal, log: logging.Logger
) -> None:
    lines = b""
    for number in range(1000):
        log.info("%d", number)
        lines += there.lines()
    assert lines.endswith(b"<6>998\n<6>999\n")


def test_an_error_of_the_journal_is_not_logged_to_the_journal(
    there: Journal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.RootLogger(logging.DEBUG)
    handler = JournalHandler(there.address, there.stream.fileno())
    root.addHandler(handler)
    monkeypatch.setattr(logging, "root", root)
    root.info("x", extra={"fields": {"DURATION": {"step": "no number"}}})  # a defect
    assert "TypeError" in capsys.readouterr().err
    root.info("y")
    assert there.entry()["MESSAGE"] == [b"y"]
    there.address.unlink()
    root.info("z")
    handler.close()
    assert there.lines() == b"<6>z\n"


def names_stream(file: socket.socket) -> str:
    found = os.fstat(file.fileno())
    return f"{found.st_dev}:{found.st_ino}"


@pytest.mark.parametrize(
    ("reader", "kind", "line"),
    [
        ("journal", JournalHandler, b""),
        ("another", logging.StreamHandler, b"<6>x\n"),
        (None, logging.StreamHandler, b" INFO    x\n"),
    ],
)
def test_records_go_to_the_journal_only_if_it_reads_standard_error(
    there: Journal,
    monkeypatch: pytest.MonkeyPatch,
    reader: str | None,
    kind: type[Any],
    line: bytes,
) -> None:
    monkeypatch.setattr(journal, "SOCKET", there.address)
    monkeypatch.setattr(sys, "stderr", there.stream.makefile("w"))
    if reader is None:
        monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    else:
        stream = there.stream if reader == "journal" else there.datagrams
        monkeypatch.setenv("JOURNAL_STREAM", names_stream(stream))
    handler = journal.handler()
    assert type(handler) is kind
    logger = logging.Logger("caam_hotplug.test")
    logger.addHandler(handler)
    logger.info("x")
    handler.close()
    sys.stderr.close()
    assert there.lines().endswith(line)
    if kind is JournalHandler:
        assert there.entry()["MESSAGE"] == [b"x"]


def test_every_event_has_its_own_identifier() -> None:
    assert all(len(one.value) == 32 and int(one.value, 16) for one in Event)
    assert len(Event.__members__) == len({one.value for one in Event})


def test_the_page_of_the_journal_has_every_event() -> None:
    page = (Path(__file__).parents[3] / "docs" / "journal.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| `([0-9a-f]{32})` \|", page, re.MULTILINE))
    assert listed == {one.word: one.value for one in Event}


@pytest.mark.parametrize("state", State)
def test_every_state_is_an_event(state: State) -> None:
    entry = parsed(encoded("x", 6, event(state)["fields"]))
    assert entry["STATE"] == [state.value.encode()]
    expected = Event.UNLOCKED if state is State.MOUNTING else Event[state.name]
    assert entry["MESSAGE_ID"] == [expected.value.encode()]


def test_every_event_that_the_agent_logs_is_known() -> None:
    known = {one.word for one in Event}
    package = Path(caam_hotplug.__file__).parent
    logged = {word for source in package.rglob("*.py") for word in words_logged(source)}
    assert logged - known == set()
    assert {"adopted", "leftover-released"} <= logged


def words_logged(source: Path) -> Iterator[str]:
    """Yield the events that a module names as `{"EVENT": ...}` or `fields(...)`."""
    for node in ast.walk(ast.parse(source.read_text())):
        match node:
            case ast.Dict():
                named = zip(node.keys, node.values, strict=True)
                values = [v for k, v in named if isinstance(k, ast.Constant) and k.value == "EVENT"]
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant() as word, *_]
            ) if name.endswith("fields"):
                values = [word]
            case _:
                continue
        yield from (v.value for v in values if isinstance(v, ast.Constant))

"""Log records with fields that the journal keeps, so that it can be queried as an audit trail.

A record's fields travel as plain `extra`, so a module that logs need not import this one:

    log.warning("%s: adopting", volume, extra={"fields": {"EVENT": "adopted", "VOLUME": volume}})

`event` makes the same from keywords. Without a journal the lines are written without fields.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import IO, Final

from caam_hotplug import names
from caam_hotplug.model import Entry, State, Volume

SOCKET: Final = Path("/run/systemd/journal/socket")


class Event(Enum):
    """Kinds of events, to be queried by `journalctl MESSAGE_ID=…`; the identifiers never change."""

    UNLOCKING = "45e9b0797e09453c8634d1527b373293"
    UNLOCKED = "4d2a9b394c4e496a8514c481e22a25e3"
    """The mapping is live; a mount may follow."""
    MOUNTED = "d34349d68bac470593fc94e755e26a22"
    IGNORED = "add5ee8539a7462ebaf995c84a651afd"
    """No rule matches the volume."""
    WAITING = "86d090847b54463abd539189fa009564"
    FAILED = "ed926665d938401c82c932addd7ca5a0"
    """A step failed."""
    CONFLICT = "69cc055bc05f4dd0b74a45982f15db6d"
    STUCK = "3efd0b9989cc44608ea86a8442c0596b"
    DETACHING = "3d645786f14449cc8982e9021802758d"
    REMOVED_UNSAFELY = "26bc256d944343e7b47c634ec443614b"
    GONE = "5bdce2f851dd4e73bcb99216f0944ec5"
    LOCKED = "77863a8f64fc4e7bb8e09616ddb39dcc"
    """Unmounted and unmapped with its medium still there."""
    EJECTED = "6ea88e1fa5084a6eb9f0683f378e723c"
    BUSY = "ffb0931181bd40fe9df595881d8a1e99"
    """Processes still use the volume: which, and what the agent does about it."""
    ADOPTED = "d9b7532487df4b7fb7163b7e2c1e8e6b"
    LEFTOVER_RELEASED = "c2b5b28e7ea14986bd2203fcf7be8744"
    """What an earlier run left of a medium that is gone is released."""
    REQUESTED = "b288a65047724261b48556df7ad4baaa"
    """A request by a user who may make it."""
    REQUEST_REFUSED = "5b60b841666b4ced97646c6a5fec2cff"
    RELOADED = "2861cbae767e4c429b30af17eb08cad9"
    CONFIG_REFUSED = "1e6f6e1605d247339b32ddb2f1aae1a6"
    """A configuration with a mistake; the previous rules stay in force."""
    STARTED = "e17bb529ed2445e7ad27b73054a25751"
    STOPPING = "858bf3d86aa84294b756080f0db1b0cb"
    STOPPED = "37796a6cb8ea46ce906c2fda34a6b49e"
    HOOK = "0d9e0be3cbb8420b9eb428e35cfa9053"
    """A unit was started for a volume, or could not be."""
    EVENTS_LOST = "25c745f962444297a4bf74c5a3fa4409"
    DEFECT = "2f66885fee0b41a2aebdff8dcdcb9e18"
    """A defect of the agent."""
    LOG_LOST = "1ffb5d7f479444628b2efc31ab3e371b"
    """Messages that the journal did not take."""

    @property
    def word(self) -> str:
        """The event's name in the field EVENT, such as `removed-unsafely`."""
        return self.name.lower().replace("_", "-")


_IDS: Final = {event.word: event.value for event in Event}
_OF_STATE: Final = {State.MOUNTING: Event.UNLOCKED}
_ARRIVED: Final = {State.UNLOCKED, State.MOUNTED, State.FAILED}
"""States whose record has the durations of the steps. Later records would repeat them."""


def event(kind: Event | State, /, **fields: object) -> dict[str, dict[str, object]]:
    """Return what to pass as `extra`: `event(state, volume=volume, rule="sticks")`.

    A keyword is a field's name in lower case. Some values become several fields: see `_pairs`.
    `kind`: a state stands for the event that a volume came to it.
    """
    if isinstance(kind, State):
        fields.setdefault("state", kind)
        word = _OF_STATE[kind].word if kind in _OF_STATE else kind.value
    else:
        word = kind.word
    return {"fields": {"EVENT": word, **{name.upper(): value for name, value in fields.items()}}}


def published(entry: Entry) -> dict[str, dict[str, object]]:
    """Return what to pass as `extra` with a volume's published status."""
    known = {
        "reason": entry.reason,
        "rule": entry.rule,
        "blob": entry.blob,
        "mapping": entry.mapping_name,
        "mount_point": entry.mount_point,
        "filesystem": entry.filesystem,
    }
    fields = {name: value for name, value in known.items() if value}
    duration = entry.steps if entry.state in _ARRIVED else None
    return event(entry.state, volume=entry.volume, duration=duration, **fields)


def handler() -> logging.Handler:
    """Return a handler for the journal if it reads standard error, else one that writes lines."""
    if is_read_by_journal(sys.stderr.fileno()):
        return JournalHandler(SOCKET, sys.stderr.fileno())
    lines = logging.StreamHandler(sys.stderr)
    if "JOURNAL_STREAM" in os.environ:
        lines.setFormatter(_PrefixFormatter("%(message)s"))
    else:
        lines.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    return lines


def is_read_by_journal(fileno: int) -> bool:
    """Return whether JOURNAL_STREAM names this very stream. Source: systemd.exec(5)."""
    stream = os.fstat(fileno)
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def _priority(level: int) -> int:
    """Return the syslog(3) priority of a level of `logging`."""
    priorities = ((50, 2), (40, 3), (30, 4), (21, 5), (20, 6))
    return next((priority for least, priority in priorities if level >= least), 7)


class _PrefixFormatter(logging.Formatter):
    """Puts the priority before the line, as the journal reads a stream (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{_priority(record.levelno)}>{super().format(record)}"


class JournalHandler(logging.Handler):
    """Sends each record to the journal as one datagram with its fields.

    It never waits, since the loop that serves media logs too. A record that the journal's socket
    does not take goes to the stream as a line. If the stream does not take it either, it is
    counted as lost. The next record that is taken is preceded by that count.
    Synchronization: any thread.

    Source: systemd.io/JOURNAL_NATIVE_PROTOCOL.
    """

    def __init__(self, address: Path, stream: int) -> None:
        """`stream`: standard error, which is a socket of the journal."""
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._address = str(address)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._stream = socket.socket(fileno=os.dup(stream))
        self._lost = 0

    def close(self) -> None:
        """Close both sockets."""
        self._socket.close()
        self._stream.close()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record, or count it as lost."""
        try:
            fields = getattr(record, "fields", {})
            if self._lost:
                text = f"{self._lost} messages did not reach the journal"
                if self._write(text, 4, {"EVENT": Event.LOG_LOST.word}):
                    self._lost = 0
            if not self._write(self.format(record), _priority(record.levelno), fields):
                self._lost += 1
        except Exception:  # noqa: BLE001  as in every logging.Handler: report the defect and go on
            self.handleError(record)

    def _write(self, message: str, priority: int, fields: Mapping[str, object]) -> bool:
        try:
            self._send(encoded(message, priority, fields))
        except OSError:
            line = f"<{priority}>{message[:_LINE_MAX]}\n".encode(errors="backslashreplace")
            try:
                self._stream.send(line, _AT_ONCE)
            except OSError:
                return False
        return True

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.sendto(entry, _AT_ONCE, self._address)
        except OSError as error:
            if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            with _sealed(entry) as file:
                rights = array.array("i", [file.fileno()])
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                self._socket.sendmsg([], ancillary, _AT_ONCE, self._address)


_AT_ONCE: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_LINE_MAX: Final = 8192
"""Characters of a line to the stream; the journal cuts at 48 KiB (journald.conf(5), LineMax=)."""


def _sealed(entry: bytes) -> IO[bytes]:
    """Return a file in memory with the entry, sealed against changes, as the journal requires."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    file = open(os.memfd_create("journal-entry", flags), "wb", buffering=0)  # noqa: PTH123, SIM115
    with ExitStack() as undo:
        undo.enter_context(file)
        file.write(entry)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        undo.pop_all()
    return file


def encoded(message: str, priority: int, fields: Mapping[str, object]) -> bytes:
    """Return an entry as the journal reads it: `NAME=VALUE`, or a length before a binary value."""
    own = {
        "MESSAGE": message,
        "PRIORITY": str(priority),
        "SYSLOG_IDENTIFIER": names.PROGRAM,
        "MESSAGE_ID": _IDS.get(str(fields.get("EVENT"))),
    }
    texts = [(name, text) for name, text in own.items() if text is not None]
    for name, value in fields.items():
        if name not in own:
            _add(texts, name, value)
    lines = [f"{name}={text}\n" for name, text in texts if "\n" not in text]
    try:
        entry = "".join(lines).encode(errors="surrogateescape")
    except UnicodeEncodeError:
        entry = b"".join(map(_bytes, lines))
    for name, text in texts:
        if "\n" in text:
            content = _bytes(text)
            entry += b"%b\n%b%b\n" % (name.encode(), struct.pack("<Q", len(content)), content)
    return entry


def _add(texts: list[tuple[str, str]], name: str, value: object) -> None:
    """Add the name and the text of a field. A volume and a list become several fields.

    `DURATION` is a mapping of steps to seconds. Bytes are not written, since they may be a key.
    """
    match value:
        case str():
            texts.append((_field_name(name), value))
        case None:
            pass
        case Volume():
            texts += [("VOLUME", str(value.id)), ("DEVICE", value.node)]
            _add(texts, "LABEL", value.partlabel)
            _add(texts, "PARTUUID", value.partuuid)
            _add(texts, "SERIAL", value.serial)
        case Enum():
            texts.append((_field_name(name), str(value.value)))
        case Mapping():
            for step, seconds in value.items():
                texts.append((_field_name(f"{name}_{step}_US"), str(round(seconds * 1_000_000))))
        case list() | tuple():
            for part in value:
                _add(texts, name, part)
        case bytes() | bytearray() | memoryview():
            texts.append((_field_name(name), f"<{len(value)} bytes>"))
        case _:
            texts.append((_field_name(name), str(value)))


_OTHER: Final = re.compile(r"[^A-Z0-9]+")


@lru_cache(maxsize=64)
def _field_name(text: str) -> str:
    """Return a field name that the journal accepts; it drops fields with other names."""
    return _OTHER.sub("_", text.upper()).lstrip("_0123456789")[:64] or "OTHER"


def _bytes(text: str) -> bytes:
    """Return the text as UTF-8; bytes of a label that are no UTF-8 stay as they were."""
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")

"""No output shows a key: no exception, repr, log line, copy or traceback with locals."""

from __future__ import annotations

import base64
import copy
import ctypes
import fcntl
import json
import logging
import pickle
import struct
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug import errors
from caam_hotplug.config.rules import BUILT_IN, Plan, match_rules
from caam_hotplug.errors import BlobRejectedError, CaamError, HotplugError
from caam_hotplug.formats.crypt_table import crypt_target
from caam_hotplug.kernel import caam, keyring
from caam_hotplug.keys.backends import SealMethod
from caam_hotplug.model import KeyReference, SecretBytes
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.rule_file import RulePlan, rule_for
from caam_hotplug.volume.target import Target
from unit.volumes import stick
from unit.workshop import Workshop

KEY = bytes.fromhex("4f6174610000000001000000100000001000000099a1b7c3d5e9f1020b1d2f41536577")
"""A tagged key: a header, then a black key of 16 bytes. Some bytes of both are printable."""
BLOB = struct.pack("=5I", 0x5461674F, 0, 1, 16, 64) + bytes(range(100, 164))
WINDOW = 6
"""Bytes in a row that show a key: an accident that reads half of 16 bytes would have as many."""


def spellings(part: bytes) -> set[str]:
    """List the ways in which a part of the key might be written."""
    return {
        part.decode("latin-1"),
        repr(part)[2:-1],
        repr(list(part))[1:-1],
        part.hex(),
        part.hex().upper(),
        part.hex(" "),
        part.hex(":"),
        base64.b64encode(part).decode(),
        base64.urlsafe_b64encode(part).decode(),
    }


def shows_the_key(text: str) -> bool:
    """Whether the text has a few bytes of the black key in a row, in any spelling."""
    black = KEY[-16:]
    parts = (black[at : at + WINDOW] for at in range(len(black) - WINDOW + 1))
    return any(spelled in text for part in parts for spelled in spellings(part))


def with_locals(error: BaseException) -> str:
    """Format the traceback as a crash reporter does, with the variables of every frame."""
    trace = traceback.TracebackException.from_exception(error, capture_locals=True, compact=False)
    return "".join(trace.format())


def secret() -> SecretBytes:
    return SecretBytes(bytearray(KEY))


@pytest.mark.parametrize(
    "write",
    [
        lambda: f"room = {bytearray(KEY)!r}",
        lambda: str(bytes(KEY)),
        KEY.hex,
        lambda: f"key {KEY[-10:].hex(' ')}",
        lambda: base64.b64encode(KEY[-16:]).decode(),
        lambda: json.dumps(list(KEY)),
        lambda: KEY.decode("latin-1"),
    ],
)
def test_a_key_that_is_shown_would_be_noticed(write: Callable[[], str]) -> None:
    assert shows_the_key(write())


@pytest.mark.parametrize(
    "write", [repr, str, ascii, "{}".format, "{0!r:>80}".format, "%s".__mod__, lambda s: f"{[s]}"]
)
def test_secret_bytes_are_shown_by_their_length(write: Callable[[object], str]) -> None:
    shown = write(secret())
    assert "<35 secret bytes>" in shown
    assert not shows_the_key(shown)


@dataclass(frozen=True)
class Holder:
    """An object that holds a key beside other values."""

    name: str
    key: SecretBytes


def test_a_holder_of_secret_bytes_does_not_show_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = Holder("x", secret())
    logging.getLogger("caam_hotplug").error("held: %s %r", held, {"key": held.key})
    assert "<35 secret bytes>" in caplog.text
    assert not shows_the_key(caplog.text)


@pytest.mark.parametrize(
    "take",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda s, p=protocol: pickle.dumps(s, p) for protocol in range(6)),
        lambda s: asdict(Holder("x", s)),
        bytes,
        list,
        json.dumps,
        lambda s: json.dumps(s, default=vars),
    ],
)
def test_no_copy_is_made_of_secret_bytes(take: Callable[[SecretBytes], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        take(secret())
    assert not shows_the_key(str(caught.value))
    assert not shows_the_key(with_locals(caught.value))


def test_a_plan_and_its_target_are_made_without_the_key() -> None:
    plan = match_rules(BUILT_IN, stick())
    assert isinstance(plan, Plan)
    held = Target(stick(), plan)
    target = crypt_target(stick(), plan.rule.crypt, KeyReference("logon", len(secret())))
    written = f"{held!r} {target!r} {target.to_line()} {asdict(held)} {pickle.dumps(target)!r}"
    assert ":35:logon:caam-hotplug:7-1" in written
    assert not shows_the_key(written)


def every_error() -> list[type[HotplugError]]:
    """List the whole hierarchy of errors."""
    found = [errors.HotplugError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def shown_of(kind: type[HotplugError]) -> str:
    """Show an error of this kind, with a key in its arguments and around it."""
    with pytest.raises(HotplugError) as caught, secret() as key:
        error = kind.__new__(kind)
        Exception.__init__(error, f"with {key}", key)
        error.__dict__.update(operation="add", subject=str(key), detail=repr(key))
        raise error
    return f"{caught.value} {caught.value!r} {with_locals(caught.value)}"


def test_an_error_that_is_raised_over_secret_bytes_does_not_show_them() -> None:
    for kind in every_error():
        shown = shown_of(kind)
        assert "<35 secret bytes>" in shown
        assert not shows_the_key(shown)


def replace_driver(monkeypatch: pytest.MonkeyPatch, outcome: OSError | None) -> None:
    """Replace the driver by one that writes the key as asked, and then succeeds or fails."""

    def ioctl(_file: int, _request: int, argument: bytearray) -> int:
        ctypes.memmove(struct.unpack_from("=Q", argument, 32)[0], KEY, len(KEY))
        struct.pack_into("=I", argument, 4, len(KEY))
        if outcome is not None:
            raise outcome
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@pytest.mark.parametrize(
    ("number", "kind"), [(5, CaamError), (74, BlobRejectedError), (22, BlobRejectedError)]
)
def test_an_import_that_fails_after_the_key_was_written_does_not_show_it(
    number: int, kind: type[HotplugError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caam").touch()
    replace_driver(monkeypatch, OSError(number, "x"))
    with pytest.raises(kind) as caught:
        caam.import_blob(tmp_path / "caam", BLOB)
    trace = with_locals(caught.value)
    assert "secret bytes>" in trace
    assert not shows_the_key(f"{caught.value} {caught.value!r} {trace}")


def test_a_key_that_the_keyring_refuses_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caam").touch()
    replace_driver(monkeypatch, None)
    with caam.import_blob(tmp_path / "caam", BLOB) as key:
        assert bytes(key.buffer) == KEY
        # A logon key's description must have a prefix, so that no kernel takes this one.
        with pytest.raises(OSError) as caught:
            keyring.add_key("logon", "without-prefix", key)
        trace = with_locals(caught.value)
        assert "payload = <35 secret bytes>" in trace
        assert not shows_the_key(f"{caught.value} {caught.value!r} {trace}")
    assert bytes(key.buffer) == bytes(len(KEY))


def test_options_of_a_trust_source_are_not_shown_as_one_may_be_a_password(
    workshop: Workshop,
) -> None:
    options = "keyhandle=0x81000001 blobauth=hunter2hunter2"
    rule, text = rule_for("x", backend="trusted", key_bytes=64, key_options=options)
    method = SealMethod(backend="trusted", options=options)
    plan = replace(
        workshop.plan(workshop.medium()),
        options=ProvisionOptions(
            device="/dev/sdb",
            rule=rule,
            rule_text=text,
            key_bytes=64,
            method=method,
        ),
    )
    assert "hunter2" in text + plan.options.rule.key.options + plan.options.method.options
    for shown in (plan, method, rule, RulePlan(plan.options, is_written=False, notes=())):
        assert "hunter2" not in f"{shown!r} {shown}"

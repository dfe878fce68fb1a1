"""The kernel's keyrings as the agent uses them."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caam_hotplug.errors import KeyringError
from caam_hotplug.kernel import keyring
from caam_hotplug.model import SecretBytes
from fakes.contract import until
from kernel.witness import attempt, run

pytestmark = pytest.mark.usefixtures("nothing_left")

DESCRIPTION = "caam-hotplug:1-1"
QUOTA = Path("/proc/sys/kernel/keys/root_maxbytes")


def secret(length: int = 36) -> SecretBytes:
    return SecretBytes(bytearray(range(1, length + 1)))


def in_a_thread(act: Callable[[], None]) -> None:
    """Act in a thread of its own, which has credentials of its own."""
    faults: list[BaseException] = []

    def body() -> None:
        try:
            act()
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if faults:
        raise faults[0]


@contextmanager
def added(payload: SecretBytes) -> Iterator[int]:
    serial = keyring.add_key("logon", DESCRIPTION, payload)
    try:
        yield serial
    finally:
        keyring.unlink_key(DESCRIPTION)


def session_keys() -> int:
    """Return how many keys the session keyring has."""
    read = ctypes.CDLL("libkeyutils.so.1").keyctl_read
    size = read(keyring.KEY_SPEC_SESSION_KEYRING, None, 0)
    assert size >= 0
    return int(size) // 4


def test_a_joined_session_keyring_is_empty_and_the_threads_that_follow_have_it() -> None:
    seen: list[int | None] = []

    def joined() -> None:
        keyring.join_session_keyring()
        seen.append(keyring.find_key("logon", DESCRIPTION))
        assert session_keys() == 0
        serial = keyring.add_key("logon", DESCRIPTION, secret())
        in_a_thread(lambda: seen.append(keyring.find_key("logon", DESCRIPTION)))
        seen.append(serial)

    with added(secret()) as outer:
        in_a_thread(joined)
        assert keyring.find_key("logon", DESCRIPTION) == outer
    nothing, in_thread, serial = seen
    assert nothing is None
    assert in_thread == serial != outer


def test_a_key_of_the_same_description_is_replaced_in_place() -> None:
    with added(secret(36)) as first:
        before = session_keys()
        assert keyring.add_key("logon", DESCRIPTION, secret(48)) == first
        assert session_keys() == before


def test_user_space_cannot_read_a_logon_key_back() -> None:
    with added(secret()) as serial:
        refused = attempt("keyctl", "print", str(serial))
        assert refused.returncode != 0
        assert "Operation not supported" in refused.stderr


def test_a_key_over_the_quota_is_refused_with_the_reason() -> None:
    before = QUOTA.read_text()
    QUOTA.write_text("1")
    try:
        with pytest.raises(KeyringError) as refused:
            keyring.add_key("logon", DESCRIPTION, secret())
    finally:
        QUOTA.write_text(before)
    assert refused.value.errno == errno.EDQUOT
    assert str(refused.value) == (
        "add key caam-hotplug:1-1: Disk quota exceeded (the user's key quota is used up)"
    )
    assert keyring.find_key("logon", DESCRIPTION) is None


@pytest.mark.parametrize(
    ("description", "length"), [("no-prefix", 36), (DESCRIPTION, 40_000), (DESCRIPTION, 0)]
)
def test_a_key_that_the_kernel_does_not_take_is_an_error(description: str, length: int) -> None:
    with pytest.raises(KeyringError) as refused:
        keyring.add_key("logon", description, SecretBytes(bytearray(length)))
    assert refused.value.errno == errno.EINVAL


def test_a_revoked_key_is_not_found() -> None:
    serial = keyring.add_key("logon", DESCRIPTION, secret())
    run("keyctl", "revoke", str(serial))
    assert keyring.find_key("logon", DESCRIPTION) is None
    keyring.unlink_key(DESCRIPTION)
    run("keyctl", "unlink", str(serial), "@s")


def test_an_unlinked_key_is_gone_from_the_kernel() -> None:
    with added(secret()) as serial:
        pass
    # The keyring drops it after a grace period (assoc_array_rcu_cleanup in
    # lib/assoc_array.c).
    until(lambda: attempt("keyctl", "describe", str(serial)).returncode != 0)
    keyring.unlink_key(DESCRIPTION)


def test_a_key_can_be_wiped_by_its_owner_once_it_is_added() -> None:
    with secret() as payload, added(payload):
        payload.wipe()
        payload.buffer.clear()  # nothing holds on to the buffer

"""Who asks something of the agent over the bus, and whether they may."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sdbus import SdBusBaseError

from caam_hotplug.dbus.connection import BUS, Connection, words
from caam_hotplug.errors import HotplugError

T = TypeVar("T")

_LOOK_UP_WITHIN_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a message."""

    uid: int
    user: str
    pid: int
    """0 if the bus does not tell."""
    address: str
    """The unique name on the bus, such as `:1.42`."""
    is_operator: bool
    """Root, or a member of the operators' group."""

    def __str__(self) -> str:
        return f"uid {self.uid} ({self.user}), pid {self.pid or 'unknown'}, {self.address}"


class Callers:
    """Tells who a sender is. Synchronization: loop only."""

    def __init__(self, connection: Connection, group: str) -> None:
        self._connection = connection
        self.group = group

    async def caller(self, sender: str) -> Caller:
        """Who it is, as the bus and the user database say.

        Raises: HotplugError if they do not say; nobody is let through then.
        """
        try:
            told = await self._connection.call(BUS, "GetConnectionCredentials", "s", sender)
        except SdBusBaseError as error:
            raise HotplugError(f"find out who {sender} is: {words(error)}") from error
        credentials = {name: value for name, (_, value) in told.items()}
        uid = credentials.get("UnixUserID")
        if uid is None:
            raise HotplugError(f"find out who {sender} is: the bus does not tell the user")
        pid = credentials.get("ProcessID", 0)
        if uid == 0:  # nor does root wait for a user database in the network
            return Caller(0, "root", pid, sender, is_operator=True)
        groups = credentials.get("UnixGroupIDs")
        user, is_member = await apart(
            f"look up user {uid}",
            lambda: (_user(uid), _is_member(self.group, uid, groups)),
            _LOOK_UP_WITHIN_S,
        )
        return Caller(uid, user, pid, sender, is_member)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "without a name"


def _is_member(group: str, uid: int, groups: list[int] | None) -> bool:
    """`groups`: those of the sender's process, or None if the bus did not tell them."""
    try:
        gid = grp.getgrnam(group).gr_gid
        if groups is None:
            user = pwd.getpwuid(uid)
            groups = os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:
        return False
    return gid in groups


async def apart(what: str, look: Callable[[], T], within_s: float) -> T:
    """What the look has found, in a thread of its own.

    It only looks, so unlike a lane's call it may be abandoned: nothing that it makes is left.

    Raises: HotplugError if it takes longer; what it raises itself.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not outcome.done():
            set_it(value)

    def work() -> None:
        try:
            told = (outcome.set_result, look())
        except BaseException as error:  # noqa: BLE001  handed on, whatever it is
            told = (outcome.set_exception, error)  # type: ignore[assignment]
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, *told)

    threading.Thread(target=work, name=what, daemon=True).start()
    try:
        async with asyncio.timeout(within_s):
            return await outcome
    except TimeoutError:
        if outcome.done() and not outcome.cancelled():
            raise
        raise HotplugError(f"{what}: no answer within {within_s:g} s") from None

"""Identification of a sender on the bus, and whether it may make requests."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import dataclass
from typing import Final

from sdbus import SdBusBaseError

from caam_hotplug.dbus.connection import BUS, Connection, error_message
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel.abandonable import run_in_thread

_LOOK_UP_WITHIN_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a message."""

    uid: int
    user: str
    pid: int
    """0 if the bus does not report it."""
    address: str
    """The unique name on the bus, such as `:1.42`."""
    is_operator: bool
    """Whether it is root or a member of the operators' group."""

    def __str__(self) -> str:
        return f"uid {self.uid} ({self.user}), pid {self.pid or 'unknown'}, {self.address}"


class Callers:
    """Identifies senders. Synchronization: loop only."""

    def __init__(self, connection: Connection, group: str) -> None:
        self._connection = connection
        self.group = group

    async def caller(self, sender: str) -> Caller:
        """Identify the sender by the bus and the user database.

        Raises: HotplugError if one of them does not answer. The request is refused then.
        """
        try:
            reply = await self._connection.call(BUS, "GetConnectionCredentials", "s", sender)
        except SdBusBaseError as error:
            raise HotplugError(f"identify {sender}: {error_message(error)}") from error
        credentials = {name: value for name, (_, value) in reply.items()}
        uid = credentials.get("UnixUserID")
        if uid is None:
            raise HotplugError(f"identify {sender}: the bus does not report its user")
        pid = credentials.get("ProcessID", 0)
        if uid == 0:  # root need not wait for a user database in the network
            return Caller(0, "root", pid, sender, is_operator=True)
        groups = credentials.get("UnixGroupIDs")
        user, is_member = await run_in_thread(
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
    """`groups`: those of the sender's process, or None if the bus does not report them."""
    try:
        gid = grp.getgrnam(group).gr_gid
        if groups is None:
            user = pwd.getpwuid(uid)
            groups = os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:
        return False
    return gid in groups

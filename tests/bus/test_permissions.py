"""Permission to read and to make requests, by the policy of the bus and by the service's check."""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import pwd
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from bus.agents import FakeAgent, FakeRegistry, mounted
from bus.private import LAX_POLICY, OTHER_USER, POLICY, PrivateBus, begun, until
from caam_hotplug import names
from caam_hotplug.dbus import authorization
from caam_hotplug.dbus.service import Service
from caam_hotplug.model import State
from unit.volumes import STICK

PATH = names.bus_path(STICK.id)
GROUP = "games"
"""A group that every Debian has, in place of caam-hotplug."""
READING = [
    ("introspect", names.BUS_NAME, PATH),
    ("tree", names.BUS_NAME),
    ("get-property", names.BUS_NAME, PATH, names.BUS_VOLUME, "State"),
    ("call", names.BUS_NAME, names.BUS_PATH, "org.freedesktop.DBus.ObjectManager",
     "GetManagedObjects"),
    ("call", names.BUS_NAME, PATH, "org.freedesktop.DBus.Peer", "Ping"),
]  # fmt: skip
CHANGING = [
    ("call", names.BUS_NAME, names.BUS_PATH, names.BUS_MANAGER, "Reload"),
    ("call", names.BUS_NAME, PATH, names.BUS_VOLUME, "Lock"),
    ("call", names.BUS_NAME, PATH, names.BUS_VOLUME, "Unlock"),
    ("call", names.BUS_NAME, PATH, names.BUS_VOLUME, "Retry"),
    ("call", names.BUS_NAME, PATH, names.BUS_VOLUME, "Eject", "a{sv}", "0"),
]
EXPLAINING = ("call", names.BUS_NAME, names.BUS_PATH, names.BUS_MANAGER, "Explain", "s", "/dev/x")


@pytest_asyncio.fixture
async def guarded(
    private_bus: PrivateBus, registry: FakeRegistry, agent: FakeAgent
) -> AsyncIterator[PrivateBus]:
    """The service on a bus with the agent's policy, for a group that exists."""
    private_bus.start(POLICY.read_text().replace('group="caam-hotplug"', f'group="{GROUP}"'))
    async with Service(registry, group=GROUP) as service:
        service.accept(agent, agent)
        await service.first_attempt(30)
        mounted(registry)
        yield private_bus


@pytest_asyncio.fixture
async def lax(
    private_bus: PrivateBus, registry: FakeRegistry, agent: FakeAgent
) -> AsyncIterator[PrivateBus]:
    """The service on a bus whose policy permits every call."""
    private_bus.start(LAX_POLICY)
    async with Service(registry, group=GROUP) as service:
        service.accept(agent, agent)
        await service.first_attempt(30)
        mounted(registry)
        yield private_bus


def gid() -> int:
    return grp.getgrnam(GROUP).gr_gid


@pytest.mark.parametrize("what", READING, ids=lambda what: what[-1])
async def test_everyone_may_read(guarded: PrivateBus, what: tuple[str, ...]) -> None:
    result = await guarded.busctl(*what, user=OTHER_USER)
    assert (result.returncode, result.stderr) == (0, "")


async def test_everyone_receives_changes(guarded: PrivateBus, registry: FakeRegistry) -> None:
    monitor = await begun(
        "stdbuf", "-oL", "gdbus", "monitor", "--address", guarded.address, "-d", names.BUS_NAME,
        user=OTHER_USER,
    )  # fmt: skip
    await until(monitor, "is owned by")
    heard = asyncio.create_task(until(monitor, "PropertiesChanged"))
    number = 0
    while not heard.done():  # it asks for signals only after it has said so
        number += 1
        registry.publish(STICK, State.LOCKED, f"{number}")
        await asyncio.sleep(0.05)
    assert "'StateReason': <'" in await heard
    monitor.kill()
    await monitor.communicate()


@pytest.mark.parametrize("what", [*CHANGING, EXPLAINING], ids=lambda what: what[4])
async def test_other_users_may_not_make_requests(
    guarded: PrivateBus, agent: FakeAgent, what: tuple[str, ...]
) -> None:
    result = await guarded.busctl(*what, user=OTHER_USER)
    assert result.returncode != 0
    assert "Access denied" in result.stderr or "Rejected send message" in result.stderr
    assert agent.asked == []


@pytest.mark.parametrize("what", [*CHANGING, EXPLAINING], ids=lambda what: what[4])
async def test_root_and_members_of_the_group_may_make_requests(
    guarded: PrivateBus, agent: FakeAgent, what: tuple[str, ...]
) -> None:
    assert (await guarded.busctl(*what)).returncode == 0
    result = await guarded.busctl(*what, user=OTHER_USER, groups=(gid(),))
    assert (result.returncode, result.stderr) == (0, "")
    assert len(agent.asked) == 2
    if what is not EXPLAINING:
        assert agent.asked[1][-1 if what[4] != "Eject" else 2].startswith(
            f"uid {OTHER_USER} (nobody), pid "
        )


@pytest.mark.parametrize("what", CHANGING, ids=lambda what: what[4])
async def test_a_lax_policy_does_not_permit_changes(
    lax: PrivateBus, agent: FakeAgent, caplog: pytest.LogCaptureFixture, what: tuple[str, ...]
) -> None:
    result = await lax.busctl(*what, user=OTHER_USER)
    assert result.returncode != 0
    assert "Access denied" in result.stderr
    assert agent.asked == []
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"{what[4]} {what[2]}: refused to uid {OTHER_USER} (nobody), pid " in (
        record.getMessage()
    )
    assert (await lax.busctl(*what, user=OTHER_USER, groups=(gid(),))).returncode == 0


async def test_a_group_that_does_not_exist_has_no_members(
    private_bus: PrivateBus, registry: FakeRegistry, agent: FakeAgent
) -> None:
    private_bus.start(LAX_POLICY)
    mounted(registry)
    async with Service(registry, group="no-such-group") as service:
        service.accept(agent, agent)
        await service.first_attempt(30)
        result = await private_bus.busctl(*CHANGING[1], user=OTHER_USER)
        assert "Access denied" in result.stderr
        assert (await private_bus.busctl(*CHANGING[1])).returncode == 0


async def test_without_an_answer_of_the_user_database_a_request_is_refused_and_others_go_on(
    lax: PrivateBus, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()

    def hang(_uid: int) -> pwd.struct_passwd:
        answer.wait()
        raise KeyError

    monkeypatch.setattr(authorization.pwd, "getpwuid", hang)
    monkeypatch.setattr(authorization, "_LOOK_UP_WITHIN_S", 0.5)
    result = await lax.busctl(*CHANGING[1], user=OTHER_USER, groups=(gid(),))
    assert f"look up user {OTHER_USER}: no answer within 0.5 s" in result.stderr
    assert agent.asked == []
    assert (await lax.busctl(*CHANGING[1])).returncode == 0  # root does not wait for it
    answer.set()


def test_membership_is_read_from_the_process_or_else_from_the_database() -> None:
    mail = pwd.getpwnam("mail")
    assert authorization._is_member("mail", mail.pw_uid, None)
    assert authorization._user(54321) == "without a name"
    assert authorization._is_member("mail", OTHER_USER, [mail.pw_gid])
    assert not authorization._is_member("mail", mail.pw_uid, [])
    assert not authorization._is_member("mail", OTHER_USER, None)
    assert not authorization._is_member("no-such-group", mail.pw_uid, None)
    assert os.getuid() == 0

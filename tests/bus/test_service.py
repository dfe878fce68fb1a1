"""The objects and messages of the service, and its behaviour when the bus goes."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import sdbus

from bus.agents import FakeAgent, FakeRegistry, again, mounted, raising
from bus.private import PrivateBus
from caam_hotplug import names
from caam_hotplug.dbus import connection
from caam_hotplug.dbus.connection import BUS, Connection
from caam_hotplug.dbus.relay import Limits
from caam_hotplug.dbus.service import Service
from caam_hotplug.errors import CaamError, DmError, RequestRefusedError, VolumeBusyError
from caam_hotplug.model import Sectors, State, VolumeId
from unit.volumes import STICK

PATH = names.bus_path(STICK.id)
OBJECTS = (names.BUS_NAME, names.BUS_PATH, "org.freedesktop.DBus.ObjectManager")
VOLUME = (names.BUS_NAME, PATH, names.BUS_VOLUME)
MANAGER = (names.BUS_NAME, names.BUS_PATH, names.BUS_MANAGER)
HOSTILE = [
    "\udcff\udc80",
    "a\x00b",
    "\x1b[2Jgone",
    "two\nlines",
    "\ufdd0\uffff\U0010ffff",
    "\u202egnp.exe",
    "'" * 36,
    "%s{0}$(reboot)",
]


async def properties(client: Connection, path: str = PATH) -> dict[str, Any]:
    target = (names.BUS_NAME, path, "org.freedesktop.DBus.Properties")
    result = await client.call(target, "GetAll", "s", names.BUS_VOLUME)
    return {name: value for name, (_, value) in result.items()}


async def objects(client: Connection) -> dict[str, Any]:
    result = await client.call(OBJECTS, "GetManagedObjects")
    return {
        path: what[names.BUS_VOLUME] for path, what in result.items() if names.BUS_VOLUME in what
    }


@asynccontextmanager
async def signals(client: Connection) -> AsyncIterator[list[tuple[str, Any]]]:
    """Collect the signals of the service: member, and arguments after the path."""
    heard: list[tuple[str, Any]] = []
    slots = [
        await client.bus.match_signal_async(
            names.BUS_NAME, None, None, member,
            lambda m: heard.append((m.member or "", (m.path, *m.parse_to_tuple()))),
        )
        for member in ("PropertiesChanged", "InterfacesAdded", "InterfacesRemoved")
    ]  # fmt: skip
    yield heard
    for slot in slots:
        slot.close()


async def test_a_volume_shows_its_whole_status(client: Connection, registry: FakeRegistry) -> None:
    mounted(registry, again(partuuid="6f1c", size=Sectors(2**40)), read_only=True)
    assert await properties(client) == {
        "Label": "cartridge",
        "PartUuid": "6f1c",
        "Device": "/dev/sdb1",
        "DiskSeq": 7,
        "Partition": 1,
        "Rule": "sticks",
        "State": "mounted",
        "StateReason": "at /run/media/cartridge, read-write",
        "MountPoint": "/run/media/cartridge",
        "MappingDevice": "/dev/dm-0",
        "Filesystem": "ext4",
        "Size": 2**49,
        "ReadOnly": True,
        "ObservedAt": 0,
        "Since": 1_700_000_000_250_000,
        "StepDurations": {"import the blob": 0.5, "mount": 0.25},
    }


async def test_a_read_causes_at_most_one_look_a_second(
    client: Connection, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    begun = asyncio.get_running_loop().time()
    for _ in range(20):
        await properties(client)
        await objects(client)
    took = asyncio.get_running_loop().time() - begun
    assert 1 <= len(agent.looks) <= 1 + took
    assert set(agent.looks) == {STICK.id}


async def test_the_time_of_the_last_look_is_read_and_not_signalled(
    client: Connection, registry: FakeRegistry
) -> None:
    async with signals(client) as heard:
        mounted(registry, observed_at=1)
        mounted(registry, observed_at=2)
        assert (await properties(client))["ObservedAt"] == 2_000_000
    assert [member for member, _ in heard] == ["InterfacesAdded"]


async def test_the_manager_shows_version_and_counters(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    mounted(registry)
    mounted(registry, again(id=VolumeId(2**64 - 1, 0)))
    result = await bus.busctl(
        "--json=short", "get-property", names.BUS_NAME, names.BUS_PATH, names.BUS_MANAGER,
        "Counters", "Version",
    )  # fmt: skip
    counters, version = result.stdout.splitlines()
    assert json.loads(counters) == {"type": "a{st}", "data": {"mounted": 2}}
    assert json.loads(version)["data"]
    assert (await bus.busctl("tree", "--list", names.BUS_NAME)).stdout.split()[-2:] == [
        "/org/caamhotplug1/volumes/18446744073709551615_0",
        "/org/caamhotplug1/volumes/7_1",
    ]


async def test_a_status_from_before_the_bus_is_shown(
    bus: PrivateBus, registry: FakeRegistry, nothing_left: None
) -> None:
    mounted(registry)
    async with Service(registry) as service:
        await service.first_attempt(30)
        client = Connection()
        assert list(await objects(client)) == [PATH]
        client.close()


async def test_additions_changes_and_removals_are_signalled_in_order_without_unchanged_properties(
    client: Connection, registry: FakeRegistry
) -> None:
    async with signals(client) as heard:
        registry.publish(STICK, State.UNLOCKING, "with a blob")
        registry.publish(STICK, State.UNLOCKING, "with a blob")
        registry.publish(STICK, State.MOUNTING, "with a blob")
        mounted(registry)
        registry.publish(STICK, State.GONE)
        assert await objects(client) == {}  # and all that it sent before has come
    assert [member for member, _ in heard] == [
        "InterfacesAdded", "PropertiesChanged", "PropertiesChanged", "InterfacesRemoved",
    ]  # fmt: skip
    assert heard[0][1][1] == PATH
    assert heard[0][1][2][names.BUS_VOLUME]["State"] == ("s", "unlocking")
    assert heard[1][1] == (PATH, names.BUS_VOLUME, {"State": ("s", "mounting")}, [])
    assert set(heard[2][1][2]) == {
        "State", "StateReason", "MountPoint", "MappingDevice", "Filesystem", "Since", "Rule",
        "StepDurations",
    }  # fmt: skip
    assert heard[3][1][1] == PATH
    assert names.BUS_VOLUME in heard[3][1][2]


async def test_a_property_read_after_its_signal_has_at_least_that_value(
    client: Connection, registry: FakeRegistry
) -> None:
    registry.publish(STICK, State.UNLOCKING)
    async with signals(client) as heard:
        for n in range(50):
            registry.publish(STICK, State.UNLOCKING, f"{n}")
            reply = await properties(client)
            assert reply["StateReason"] == f"{n}"
            assert heard[-1][1][2]["StateReason"] == ("s", f"{n}")


async def test_a_volume_that_the_registry_forgot_is_removed_at_the_next_change(
    client: Connection, registry: FakeRegistry
) -> None:
    registry.publish(STICK, State.REMOVED_UNSAFELY)
    registry.forget(STICK)
    registry.publish(again(id=VolumeId(8, 1)), State.UNLOCKING)
    assert list(await objects(client)) == [names.bus_path(VolumeId(8, 1))]


async def test_the_same_insertion_may_come_again(
    client: Connection, registry: FakeRegistry
) -> None:
    for _ in range(3):
        mounted(registry)
        registry.publish(STICK, State.GONE)
    mounted(registry)
    assert (await properties(client))["State"] == "mounted"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
async def test_texts_of_a_medium_are_escaped(
    bus: PrivateBus, service: Service, registry: FakeRegistry, text: str
) -> None:
    hostile = again(partlabel=text, partuuid=text, name=text)
    registry.publish(
        hostile, State.FAILED, text, rule=text, mount_point=text, mapping_node=text,
        filesystem=text, steps={text: 1.0},
    )  # fmt: skip
    result = await bus.busctl("--json=short", "call", *OBJECTS, "GetManagedObjects")
    assert result.returncode == 0, result.stderr
    label = json.loads(result.stdout)["data"][0][PATH][names.BUS_VOLUME]["Label"]["data"]
    assert label.isprintable()
    assert label == (text if text.isprintable() else ascii(text))
    with_gdbus = await bus.gdbus(
        "call", "-d", names.BUS_NAME, "-o", names.BUS_PATH, "-m", f"{OBJECTS[2]}.GetManagedObjects"
    )
    assert with_gdbus.returncode == 0, with_gdbus.stderr
    assert (await bus.cli("status", "--all")).returncode == 0


@pytest.mark.parametrize(
    ("method", "asked"), [("Lock", "lock"), ("Unlock", "unlock"), ("Retry", "retry")]
)
async def test_a_request_is_passed_on_with_its_sender_and_signals_come_before_the_reply(
    client: Connection, registry: FakeRegistry, agent: FakeAgent, method: str, asked: str
) -> None:
    registry.publish(STICK, State.FAILED)
    async with signals(client) as heard:
        assert await client.call(VOLUME, method) is None
        assert [member for member, _ in heard] == ["PropertiesChanged"]
    [(name, volume, by)] = agent.asked
    assert (name, volume) == (asked, STICK.id)
    assert by.startswith("uid 0 (root), pid ")
    assert ", :1." in by


async def test_eject_takes_options_and_returns_the_outcome(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    eject = ("call", *VOLUME, "Eject", "a{sv}")
    result = await bus.busctl(*eject, "0")
    assert result.stdout == 's "cartridge: safe to remove"\n'
    result = await bus.busctl(*eject, "1", "power-off", "b", "false")
    assert result.returncode == 0
    assert [asked[3] for asked in agent.asked] == [True, False]
    for options, why in (
        (("1", "force", "b", "true"), "force is no option; there is 'power-off'"),
        (("1", "power-off", "s", "yes"), "option 'power-off' is a boolean (b), not s"),
    ):
        result = await bus.busctl(*eject, *options)
        assert result.returncode == 1
        assert why in result.stderr
    assert len(agent.asked) == 2


async def test_reload_and_explain_are_passed_on(
    bus: PrivateBus, service: Service, agent: FakeAgent
) -> None:
    agent.notices = ["blob_directory: at the next start", "a\x1b"]
    result = await bus.gdbus(
        "call", "-d", names.BUS_NAME, "-o", names.BUS_PATH, "-m", f"{names.BUS_MANAGER}.Reload"
    )
    assert result.stdout == "(['blob_directory: at the next start', \"'a\\\\x1b'\"],)\n"
    assert agent.asked[0][1].startswith("uid 0 (root), pid ")
    result = await bus.busctl("--json=short", "call", *MANAGER, "Explain", "s", "/dev/sdb1")
    assert json.loads(result.stdout)["data"] == ["/dev/sdb1: a device\n  rule 'a': no"]
    assert agent.thread is not threading.main_thread()


@pytest.mark.parametrize(
    ("error", "name", "message"),
    [
        (RequestRefusedError("lock x: no"), "RequestRefused", "lock x: no"),
        (CaamError("import", "x.bb", 5), "Caam", "import x.bb: Input/output error"),
        (
            DmError("load", "x", 22, "key size"),
            "DeviceMapper",
            "load x: Invalid argument (key size)",
        ),
        (VolumeBusyError("it", ("pid 4", "pid 5")), "VolumeBusy", "it is in use:\npid 4\npid 5"),
        (OSError(5, "Input/output error"), "Failed", "[Errno 5] Input/output error"),
        (ZeroDivisionError("x"), "Failed", "a defect of the agent; the journal has the details"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_failure_has_its_error_name_and_the_service_goes_on(
    client: Connection,
    registry: FakeRegistry,
    agent: FakeAgent,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    name: str,
    message: str,
) -> None:
    mounted(registry)
    agent.instead = raising(error)
    with pytest.raises(sdbus.SdBusBaseError) as result:
        await client.call(VOLUME, "Lock")
    assert result.value.args == (f"org.caamhotplug1.Error.{name}", message)
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert bool(logged) == isinstance(error, ZeroDivisionError)
    assert await client.call(VOLUME, "Lock") is None


async def test_requests_are_refused_until_the_agent_accepts_them(
    bus: PrivateBus, registry: FakeRegistry, nothing_left: None
) -> None:
    mounted(registry)
    async with Service(registry) as service:
        await service.first_attempt(30)
        result = await bus.busctl("call", *VOLUME, "Lock")
        assert "the agent is starting or stopping" in result.stderr
        result = await bus.busctl("call", *MANAGER, "Explain", "s", "/dev/sdb1")
        assert "the agent is starting or stopping" in result.stderr


async def test_a_request_is_answered_although_its_volume_goes_meanwhile(
    client: Connection, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def refuse() -> None:
        asked.set()
        await go_on.wait()
        raise RequestRefusedError("lock 'cartridge': its medium has gone")

    agent.instead = refuse
    call = client.begin(VOLUME, "Lock")
    await asked.wait()
    registry.publish(STICK, State.GONE)
    assert await objects(client) == {}
    go_on.set()
    with pytest.raises(sdbus.SdBusBaseError, match="its medium has gone"):
        await call


async def test_a_waiting_request_delays_neither_reads_nor_other_requests(
    client: Connection, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    go_on = asyncio.Event()
    agent.instead = go_on.wait  # type: ignore[assignment]
    call = client.begin(VOLUME, "Eject", "a{sv}", {})
    while not agent.asked:
        await client.ping()
    assert (await properties(client))["State"] == "mounted"
    assert await client.call(MANAGER, "Reload") == []
    go_on.set()
    await call


async def test_a_stop_does_not_wait_for_a_request_under_way(
    bus: PrivateBus, registry: FakeRegistry, agent: FakeAgent, nothing_left: None
) -> None:
    mounted(registry)
    agent.instead = asyncio.Event().wait  # type: ignore[assignment]
    client = Connection()
    async with Service(registry) as service:
        service.accept(agent, agent)
        await service.first_attempt(30)
        call = client.begin(VOLUME, "Lock")
        while not agent.asked:
            await client.ping()
    with pytest.raises(sdbus.SdBusBaseError):
        await asyncio.wait_for(call, 30)
    client.close()


@pytest.fixture
def tried_again(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when the service tries to connect for the third time."""
    event = asyncio.Event()
    made = 0

    class Counted(Connection):
        def __init__(self, limits: Limits, is_at_work: Callable[[], bool]) -> None:
            nonlocal made
            made += 1
            if made == 3:
                event.set()
            super().__init__(limits, is_at_work)

    monkeypatch.setattr(connection, "Connection", Counted)
    return event


async def test_without_a_bus_one_message_is_logged_and_the_registry_works(
    private_bus: PrivateBus,
    registry: FakeRegistry,
    caplog: pytest.LogCaptureFixture,
    nothing_left: None,
    tried_again: asyncio.Event,
) -> None:
    caplog.set_level(logging.INFO, "caam_hotplug")
    async with Service(registry, retry_after_s=0.001) as service:
        await service.first_attempt(30)
        mounted(registry)
        await asyncio.wait_for(tried_again.wait(), 30)
    assert caplog.record_tuples == [
        (
            "caam_hotplug.dbus.service",
            logging.INFO,
            "no system bus, media are served without it: connect to the system bus: "
            "No such file or directory",
        )
    ]


async def test_at_the_limit_of_open_files_one_message_is_logged(
    bus: PrivateBus,
    registry: FakeRegistry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    nothing_left: None,
    tried_again: asyncio.Event,
) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    caplog.set_level(logging.INFO, "caam_hotplug")
    monkeypatch.setattr(socket, "socketpair", none_left)
    async with Service(registry, retry_after_s=0.001):
        await asyncio.wait_for(tried_again.wait(), 30)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert caplog.messages[0].endswith("connect to the system bus: Too many open files")


async def test_without_sdbus_one_message_is_logged(
    registry: FakeRegistry,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    nothing_left: None,
) -> None:
    caplog.set_level(logging.INFO, "caam_hotplug")
    for module in [m for m in sys.modules if m.startswith("caam_hotplug.dbus.objects")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("caam_hotplug.dbus.objects", raising=False)
    monkeypatch.setitem(sys.modules, "sdbus", None)
    async with Service(registry) as service:
        await service.first_attempt(30)
        mounted(registry)
    [message] = caplog.messages
    assert message.startswith("no system bus, media are served without it: ")
    assert "sdbus" in message
    assert message.endswith("install sdbus (the extra `dbus`)")


async def test_a_name_of_another_process_is_logged_and_taken_once_it_is_free(
    bus: PrivateBus,
    registry: FakeRegistry,
    caplog: pytest.LogCaptureFixture,
    nothing_left: None,
) -> None:
    caplog.set_level(logging.INFO, "caam_hotplug")
    mounted(registry)
    other = Connection()
    await other.own(names.BUS_NAME)
    async with Service(registry, retry_after_s=0.001) as service:
        await service.first_attempt(30)
        assert caplog.messages[0].endswith(
            "own org.caamhotplug1 on the system bus: another process has it"
        )
        other.close()
        await on_bus(caplog)
    assert len(caplog.messages) == 2


async def test_a_policy_that_is_not_installed_is_logged_once(
    private_bus: PrivateBus,
    registry: FakeRegistry,
    caplog: pytest.LogCaptureFixture,
    nothing_left: None,
    tried_again: asyncio.Event,
) -> None:
    caplog.set_level(logging.INFO, "caam_hotplug")
    private_bus.start(policy="<busconfig/>")
    async with Service(registry, retry_after_s=0.001) as service:
        await service.first_attempt(30)
        await asyncio.wait_for(tried_again.wait(), 30)
    [message] = caplog.messages
    assert "own org.caamhotplug1 on the system bus: " in message
    assert "not allowed to own" in message


async def on_bus(caplog: pytest.LogCaptureFixture, times: int = 1) -> None:
    """Wait until the service has logged that often that it is on the bus."""
    async with asyncio.timeout(30):
        while caplog.text.count("on the system bus as") < times:
            await asyncio.sleep(0.01)


async def test_a_bus_that_comes_back_shows_the_current_status(
    bus: PrivateBus,
    service: Service,
    registry: FakeRegistry,
    agent: FakeAgent,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "caam_hotplug")
    mounted(registry)
    for times in (1, 2, 3):
        bus.stop()
        async with asyncio.timeout(30):
            while caplog.text.count("the system bus has gone") < times:
                await asyncio.sleep(0.01)
        registry.publish(STICK, State.LOCKED, f"{times}")
        bus.start()
        await on_bus(caplog, times)
        client = Connection()
        assert (await properties(client))["StateReason"] == f"{times}"
        await client.call(VOLUME, "Unlock")
        assert (await properties(client))["State"] == "mounted"
        client.close()
    assert len(agent.asked) == 3


async def test_changes_while_the_bus_ends_reach_the_registry(
    bus: PrivateBus, service: Service, registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish(STICK, State.UNLOCKING)
    bus.stop()
    for n in range(1000):  # the loop has not noticed yet
        registry.publish(again(id=VolumeId(n, 1)), State.UNLOCKING, f"{n}")
    assert len(registry.entries()) == 1000
    assert "a defect" not in caplog.text


async def test_a_bus_that_does_not_answer_delays_nothing(
    private_bus: PrivateBus,
    registry: FakeRegistry,
    caplog: pytest.LogCaptureFixture,
    nothing_left: None,
) -> None:
    private_bus.start()
    private_bus.hold()
    async with Service(registry) as service:
        async with asyncio.timeout(10):
            await service.first_attempt(0.2)
        mounted(registry)
    assert "a defect" not in caplog.text
    private_bus.resume()


async def test_a_bus_that_stops_reading_causes_no_defect(
    bus: PrivateBus, service: Service, registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish(STICK, State.UNLOCKING)
    bus.hold()
    for n in range(20_000):
        registry.publish(STICK, State.UNLOCKING, f"{n:1000}")
    bus.resume()
    assert "a defect" not in caplog.text


async def test_a_defect_in_showing_a_volume_does_not_affect_others(
    bus: PrivateBus, service: Service, registry: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish(STICK, State.UNLOCKING, steps=None)
    assert "a defect of the agent's D-Bus service" in caplog.text
    mounted(registry, again(id=VolumeId(8, 1)))
    result = await bus.busctl("tree", "--list", names.BUS_NAME)
    assert names.bus_path(VolumeId(8, 1)) in result.stdout


async def test_the_name_is_free_and_the_objects_are_gone_after_the_stop(
    bus: PrivateBus, registry: FakeRegistry, nothing_left: None
) -> None:
    mounted(registry)
    client = Connection()
    async with signals(client) as heard:
        async with Service(registry) as service:
            await service.first_attempt(30)
        while await client.call(BUS, "NameHasOwner", "s", names.BUS_NAME):
            pass
    assert [member for member, _ in heard][-1:] == ["InterfacesRemoved"]
    client.close()


async def test_added_and_removed_volumes_leave_no_object_in_memory(
    service: Service, registry: FakeRegistry
) -> None:
    def come_and_go() -> None:
        for state in (State.UNLOCKING, State.MOUNTED, State.GONE):
            registry.publish(STICK, state)

    for _ in range(3):
        come_and_go()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(100):
        come_and_go()
    gc.collect()
    assert len(gc.get_objects()) - before < 100

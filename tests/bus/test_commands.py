"""The commands that ask the agent, against the service on a real bus."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bus.agents import FakeAgent, FakeRegistry, again, mounted, raising
from bus.private import Done, PrivateBus, begun, program, until
from caam_hotplug import names
from caam_hotplug.cli import listing
from caam_hotplug.dbus import client
from caam_hotplug.dbus.service import Service
from caam_hotplug.dbus.volume_view import ShownVolume
from caam_hotplug.errors import ConfigError, ConfigFault, RequestRefusedError, VolumeBusyError
from caam_hotplug.model import Sectors, State, VolumeId
from unit.volumes import STICK

OTHER = again(id=VolumeId(8, 1), name="sdc1", partlabel="other")
IGNORED = again(id=VolumeId(3, 0), name="sda", partlabel=None)


def refused(result: Done) -> str:
    """Return standard error of a refused command, and check that standard output is empty."""
    assert (result.returncode, result.stdout) == (1, "")
    return result.stderr


async def test_status_is_a_table_of_the_volumes_that_rules_match(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    registry.publish(IGNORED, State.IGNORED, "no rule")
    mounted(registry, again(size=Sectors(30310400)), read_only=True)
    registry.publish(OTHER, State.WAITING, "no blob /data/caam/other.bb", rule="sticks")
    result = await bus.cli("status")
    head, first, second, hidden = result.stdout.splitlines()
    assert head.split("  ")[0] == "LABEL"
    assert first.startswith("cartridge  /dev/sdb1  14.5 GiB  mounted  ")
    assert first.endswith(" d   /run/media/cartridge (ext4, read-only)")
    assert second.startswith("other      /dev/sdc1  100 MiB   waiting  ")
    assert second.endswith("  no blob /data/caam/other.bb")
    assert hidden == "(1 that no rule matches: --all)"
    assert "\x1b" not in result.stdout
    everything = await bus.cli("status", "--all")
    assert everything.stdout.splitlines()[1].startswith("-          /dev/sda   100 MiB   ignored")


async def test_status_without_media_says_so(bus: PrivateBus, service: Service) -> None:
    assert await bus.cli("status") == Done(0, "no media\n", "")


async def test_status_for_programs_has_the_documented_keys(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    mounted(registry, observed_at=1_700_000_060)
    result = await bus.cli("status", "--json")
    status = json.loads(result.stdout)
    assert status.keys() == {"version", "counters", "volumes"}
    assert status["counters"] == {"mounted": 1}
    assert status["volumes"] == [
        {
            "label": "cartridge",
            "part_uuid": "",
            "device": "/dev/sdb1",
            "diskseq": 7,
            "partition": 1,
            "rule": "sticks",
            "state": "mounted",
            "reason": "at /run/media/cartridge, read-write",
            "mount_point": "/run/media/cartridge",
            "mapping_device": "/dev/dm-0",
            "filesystem": "ext4",
            "size_bytes": 104857600,
            "read_only": False,
            "since_us": 1_700_000_000_250_000,
            "observed_us": 1_700_000_060_000_000,
            "steps_s": {"import the blob": 0.5, "mount": 0.25},
        }
    ]
    help_text = (await bus.cli("status", "--help")).stdout.replace(",", " ").split()
    assert status["volumes"][0].keys() | status.keys() <= set(help_text) | {
        '"volumes"', "version", "counters", "volumes",
    }  # fmt: skip


async def on_terminal(*arguments: str, **env: str) -> str:
    """Return the output of the command on a terminal."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *program(*arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=theirs,
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": "xterm", **env},
    )
    assert await process.wait() == 0
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    return shown


async def test_colours_are_for_a_terminal_unless_turned_off(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    mounted(registry)
    assert "\x1b[32mmounted\x1b[0m" in await on_terminal("status")
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in await on_terminal("status", **env)
    assert "\x1b[32m" in await on_terminal("status", NO_COLOR="")  # no-color.org: not empty


@pytest.mark.parametrize("which", ["cartridge", "/dev/sdb1", "/run/media/cartridge", "/dev/dm-0"])
async def test_a_volume_is_selected_by_label_device_or_mount_point(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent, which: str
) -> None:
    mounted(registry)
    registry.publish(OTHER, State.UNLOCKING)
    result = await bus.cli("lock", which)
    assert result == Done(0, "cartridge: locked: asked for\n", "")
    assert agent.asked[0][:2] == ("lock", STICK.id)


async def test_a_volume_is_selected_by_a_link_to_its_device(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent, tmp_path: Path
) -> None:
    mounted(registry)
    (tmp_path / "usb-Ultra-part1").symlink_to("/dev/sdb1")
    result = await bus.cli("eject", str(tmp_path / "usb-Ultra-part1"))
    assert result == Done(0, "cartridge: safe to remove\n", "")
    result = await bus.cli("unlock", str(tmp_path / ".." / tmp_path.name / "usb-Ultra-part1"))
    assert result == Done(0, "cartridge: mounted: /run/media/cartridge (ext4)\n", "")
    assert [asked[0] for asked in agent.asked] == ["eject", "unlock"]


async def test_a_volume_is_unlocked_without_a_mount(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    registry.publish(STICK, State.LOCKED)
    result = await bus.cli("unlock", "--no-mount", "cartridge")
    assert result.stdout == "cartridge: unlocked: as caam-x (/dev/dm-0)\n"
    assert agent.asked[0][:2] == ("unlock without a mount", STICK.id)


async def test_status_shows_what_the_look_that_it_causes_has_found(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry, observed_at=1)
    assert agent.looks == []  # the signal about it reads all its properties
    found = "at /run/media/cartridge, read-write; it is suspended"

    def publish() -> None:
        registry.publish(STICK, State.MOUNTED, found, observed_at=time.time())

    agent.look_finds = lambda: asyncio.get_running_loop().call_soon(publish)
    (volume,) = json.loads((await bus.cli("status", "--json")).stdout)["volumes"]
    assert volume["reason"] == found


async def test_a_label_of_two_volumes_is_refused_with_both_devices(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    registry.publish(again(id=VolumeId(8, 1), name="sdc1"), State.CONFLICT)
    assert refused(await bus.cli("eject", "cartridge")) == (
        "caam-hotplug: eject cartridge: 2 volumes have this label; "
        "name the device: /dev/sdb1, /dev/sdc1\n"
    )
    assert agent.asked == []
    assert (await bus.cli("eject", "/dev/sdc1")).returncode == 0


async def test_a_removed_volume_is_not_selected_if_another_is_present(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    registry.publish(STICK, State.REMOVED_UNSAFELY)
    mounted(registry, again(id=VolumeId(8, 1)))
    assert (await bus.cli("eject", "cartridge")).returncode == 0
    assert (await bus.cli("eject", "/dev/sdb1")).returncode == 0
    assert {asked[1] for asked in agent.asked} == {VolumeId(8, 1)}


@pytest.mark.parametrize(
    ("which", "why"),
    [
        ("Cartridge", "no such volume; there are: cartridge"),
        ("/dev/sdz1", "no such volume; there are: cartridge"),
        ("/dev/sdb", "it is not a volume; name the partition: /dev/sdb1"),
        ("", "no such volume; there are: cartridge"),
    ],
)
async def test_a_text_that_names_no_volume_is_refused_with_the_present_volumes(
    bus: PrivateBus, service: Service, registry: FakeRegistry, which: str, why: str
) -> None:
    mounted(registry)
    registry.publish(IGNORED, State.IGNORED)
    assert refused(await bus.cli("lock", which)) == f"caam-hotplug: lock {which}: {why}\n"


async def test_without_media_no_volume_is_selected(bus: PrivateBus, service: Service) -> None:
    assert refused(await bus.cli("lock", "\x1b[2J")) == (
        "caam-hotplug: lock '\\x1b[2J': no such volume; there are no media\n"
    )


async def test_a_refusal_is_one_line_with_the_agents_message(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    why = "unlock 'cartridge' (sdb1, 7-1): it is mounted already"
    agent.instead = raising(RequestRefusedError(why))
    assert refused(await bus.cli("unlock", "cartridge")) == f"caam-hotplug: {why}\n"


async def test_each_holder_of_a_busy_volume_has_a_line(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    holders = ("pid 412 (cp) has /run/media/x/file open", "pid 9 (\x1bsh) runs in /run/media/x")
    agent.instead = raising(VolumeBusyError("/run/media/cartridge", holders))
    assert refused(await bus.cli("eject", "cartridge")) == (
        "caam-hotplug: eject cartridge: /run/media/cartridge is in use:\n"
        "  pid 412 (cp) has /run/media/x/file open\n"
        "  'pid 9 (\\x1bsh) runs in /run/media/x'\n"
    )


async def test_eject_may_leave_the_power_on(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    assert (await bus.cli("eject", "--no-power-off", "cartridge")).returncode == 0
    assert agent.asked[0][3] is False


async def test_reload_prints_notices_or_every_mistake(
    bus: PrivateBus, service: Service, agent: FakeAgent
) -> None:
    agent.notices = ["blob_directory: at the next start"]
    assert await bus.cli("reload") == Done(
        0, "note: blob_directory: at the next start\nthe configuration is in force\n", ""
    )
    file = Path("/etc/caam-hotplug/agent.toml")
    faults = [ConfigFault(file, "rule", "is wrong"), ConfigFault(file, "", "is bad")]
    agent.instead = raising(ConfigError(faults))
    assert refused(await bus.cli("reload")) == (
        f"caam-hotplug: reload: {file}: rule: is wrong\n  {file}: is bad\n"
    )


async def test_a_request_may_take_longer_than_a_bus_call_usually_may(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    go_on = asyncio.Event()
    agent.instead = go_on.wait  # type: ignore[assignment]
    # In place of sd-bus's own 25 s.
    waiting = await begun(*program("eject", "cartridge"), env={"SYSTEMD_BUS_TIMEOUT": "0.5"})
    while not agent.asked:
        await asyncio.sleep(0.01)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waiting.wait(), 1.5)
    go_on.set()
    assert (await waiting.communicate())[0] == b"cartridge: safe to remove\n"


async def test_a_reload_without_answer_ends_at_its_time_limit(
    bus: PrivateBus, service: Service, agent: FakeAgent
) -> None:
    go_on = asyncio.Event()
    agent.instead = go_on.wait  # type: ignore[assignment]

    async def reload(asked: client.Remote) -> None:
        await asked.reload(0.5)

    with pytest.raises(client.NotRunningError, match="read the rule: the agent ended or did"):
        await asyncio.to_thread(client.run, "read the rule", reload)
    assert [asked[0] for asked in agent.asked] == ["reload"]
    go_on.set()


@pytest.mark.parametrize("command", [["status"], ["eject", "x"], ["reload"]], ids=lambda c: c[0])
async def test_without_a_bus_or_an_agent_the_exit_status_is_3(
    private_bus: PrivateBus, command: list[str]
) -> None:
    result = await private_bus.cli(*command)
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr == (
        f"caam-hotplug: {command[0]}: connect to the system bus: No such file or directory; "
        "the agent may run all the same: systemctl status caam-hotplug\n"
    )
    private_bus.start()
    result = await private_bus.cli(*command)
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr == (
        f"caam-hotplug: {command[0]}: the agent does not run, or is not on the bus; "
        "systemctl status caam-hotplug\n"
    )


async def test_without_sdbus_the_exit_status_is_3(private_bus: PrivateBus, tmp_path: Path) -> None:
    (tmp_path / "sdbus.py").write_text("raise ModuleNotFoundError(\"No module named 'sdbus'\")\n")
    path = f"{tmp_path}:{Path(names.__file__).parents[1]}"
    result = await private_bus.cli("status", env={"PYTHONPATH": path})
    assert result.returncode == 3
    assert result.stderr == (
        "caam-hotplug: status: No module named 'sdbus'; the command needs D-Bus: "
        "install python3-sdbus, or the extra `dbus`\n"
    )


async def test_a_request_fails_when_the_agent_ends(
    bus: PrivateBus, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    agent.instead = asyncio.Event().wait  # type: ignore[assignment]
    async with Service(registry) as service:
        service.accept(agent, agent)
        await service.first_attempt(30)
        waiting = await begun(*program("eject", "cartridge"))
        while not agent.asked:
            await asyncio.sleep(0.01)
    stdout, stderr = await waiting.communicate()
    assert (waiting.returncode, stdout) == (3, b"")
    assert stderr.decode() == (
        "caam-hotplug: eject cartridge: the agent ended or did not answer; "
        "journalctl -u caam-hotplug\n"
    )


async def test_a_request_fails_when_the_bus_ends(
    bus: PrivateBus, service: Service, registry: FakeRegistry, agent: FakeAgent
) -> None:
    mounted(registry)
    agent.instead = asyncio.Event().wait  # type: ignore[assignment]
    waiting = await begun(*program("eject", "cartridge"))
    while not agent.asked:
        await asyncio.sleep(0.01)
    bus.stop()
    _, stderr = await waiting.communicate()
    assert waiting.returncode == 3
    assert stderr.decode().startswith("caam-hotplug: eject cartridge: the ")


@asynccontextmanager
async def watching(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `watch` until it is interrupted as by Ctrl-C."""
    process = await begun(*program("watch", *arguments))
    yield process
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(60):
        _, stderr = await process.communicate()
    assert (process.returncode, stderr) == (0, b"")


async def test_watch_prints_a_line_for_each_volume_and_each_change(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    registry.publish(STICK, State.UNLOCKING, "with a blob")
    async with watching() as watch:
        first = await until(watch, "cartridge")
        assert first[8:] == " cartridge (/dev/sdb1): unlocking: with a blob\n"
        registry.publish(STICK, State.UNLOCKING, "with a blob", steps={"x": 1.0})
        registry.publish(STICK, State.MOUNTING)
        mounted(registry)
        registry.publish(STICK, State.GONE)
        registry.publish(OTHER, State.UNLOCKING)
        lines = [(await until(watch, "/dev/"))[9:] for _ in range(4)]
    assert lines == [
        "cartridge (/dev/sdb1): mounting\n",
        "cartridge (/dev/sdb1): mounted: /run/media/cartridge (ext4)\n",
        "cartridge (/dev/sdb1): gone\n",
        "other (/dev/sdc1): unlocking\n",
    ]


async def events(watch: asyncio.subprocess.Process, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        event = json.loads(await until(watch, "{"))
        assert event.pop("time_us") > 0
        found.append(event)
    return found


async def test_watch_for_programs_prints_every_change_as_an_object(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    mounted(registry)
    async with watching("--json") as watch:
        [present] = await events(watch, 1)
        assert present["event"] == "present"
        assert present["volume"].keys() == listing.as_json(ShownVolume()).keys()
        registry.publish(OTHER, State.UNLOCKING)
        registry.publish(OTHER, State.UNLOCKING, steps={"x": 1.0})
        registry.publish(OTHER, State.GONE)
        result = await events(watch, 3)
        assert [event["event"] for event in result] == ["added", "changed", "removed"]
        assert {event["volume"]["label"] for event in result} == {"other"}


async def test_watch_goes_on_over_restarts_of_the_agent(
    bus: PrivateBus, registry: FakeRegistry, agent: FakeAgent
) -> None:
    async with watching() as watch:
        assert (await until(watch, "agent"))[9:] == "the agent does not run; waiting for it\n"
        for _ in range(3):
            mounted(registry)
            async with Service(registry) as service:
                await service.first_attempt(30)
                assert (await until(watch, "agent"))[9:] == "the agent runs\n"
                await until(watch, "cartridge (/dev/sdb1): mounted")
            await until(watch, "the agent has stopped; waiting for it")


async def test_watch_ends_with_the_bus(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    mounted(registry)
    watch = await begun(*program("watch"))
    await until(watch, "cartridge")
    bus.stop()
    _, stderr = await watch.communicate()
    assert watch.returncode == 3
    assert stderr == b"caam-hotplug: watch: the bus has gone\n"


async def test_a_reader_that_closes_the_pipe_is_no_error(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    mounted(registry)
    watch = await begun(*program("watch"))
    await until(watch, "cartridge")
    assert watch.stdout is not None
    watch._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
    for n in range(3):
        registry.publish(STICK, State.UNLOCKING, f"{n}")
        await asyncio.sleep(0.05)
    assert await asyncio.wait_for(watch.wait(), 30) == 0
    assert watch.stderr is not None
    assert await watch.stderr.read() == b""


async def test_no_change_is_lost_or_printed_twice_whenever_watch_begins(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    registry.publish(STICK, State.UNLOCKING, "0")
    counting = True

    async def count() -> None:
        number = 0
        while counting:
            number += 1
            registry.publish(STICK, State.UNLOCKING, f"{number}")
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    async with watching("--json") as watch:
        result = [int(event["volume"]["reason"]) for event in await events(watch, 300)]
    counting = False
    await counter
    assert result == list(range(result[0], result[0] + 300))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-5, "0 s"), (0, "0 s"), (59, "59 s"), (60, "1 min"), (7199, "1 h"), (90000, "1 d")],
)
def test_the_duration_of_a_state_has_one_unit(seconds: int, shown: str) -> None:
    volume = ShownVolume(device="/dev/x", state="mounted", since_us=10**15)
    now = 10**15 + seconds * 10**6
    row = list(listing.table([volume], include_ignored=True, coloured=False, now_us=now))[1]
    assert row == f"-      /dev/x  0 B   mounted  {shown}"


def test_a_state_of_a_newer_agent_is_shown_and_an_unknown_key_ignored() -> None:
    volume = ShownVolume.from_properties({"State": "resting", "Later": 1, "Label": "a"})
    assert volume == ShownVolume(label="a", state="resting")
    assert listing.in_colour("resting", "resting") == "resting"


async def test_explain_says_what_the_agent_says(
    bus: PrivateBus, service: Service, agent: FakeAgent
) -> None:
    result = await bus.cli("explain", "/dev/../dev/sdb1")
    assert result == Done(0, "/dev/../dev/sdb1: a device\n  rule 'a': no\n", "")


async def test_explain_that_the_agent_refuses_is_answered_without_it(
    bus: PrivateBus, service: Service, agent: FakeAgent
) -> None:
    agent.instead = raising(RequestRefusedError("not now"))
    result = await bus.cli("explain", "/dev/null")
    assert agent.asked == [("explain", "/dev/null")]
    assert "look at /dev/null: it is no block device" in refused(result)

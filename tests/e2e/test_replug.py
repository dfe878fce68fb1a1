"""`measure replug`, which pulls and plugs a medium, copied to a board whose agent serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from e2e.support import ANY_BUS, POINT
from vm.guest import Guest
from vm.installed import AWAIT_UDEV, InstalledAgent

COMMAND: Final = "cd /root; exec python3 measure replug"
IN_ORDER: Final = (
    "kernel add -> mounted, ms",
    "removed -> mapping gone, ms",
    "removed -> nothing left, ms",
    "agent's CPU, ms",
    "agent's PSS, MB",
)
"""Some of what takes longer than nothing."""
PARTS: Final = ("unmounted", "mapping gone", "key gone", "mount point gone")


async def is_served(guest: Guest, agent: InstalledAgent) -> None:
    """The program is there, and the agent runs and has mounted the medium."""
    await guest.run("cp", "-r", "/src/tools/measure", "/root")
    await agent.start()
    await guest.until_mounted(POINT)


async def report_of(guest: Guest, which: str, *options: str, cycles: int = 2) -> dict[str, Any]:
    """What it has measured; the medium, with what was just written to it, is back."""
    await guest.sh(f"head -c 1000000 /dev/urandom | tee {POINT}/written >/root/written")
    command = f"{COMMAND} {which} --cycles {cycles} --json board.json {' '.join(options)}"
    done = await guest.sh(command, timeout_s=180)
    print(done.stdout)
    report: dict[str, Any] = json.loads(await guest.read("/root/board.json"))
    assert report["cycles"] == len(report["samples"]) == cycles
    for name, figure in report["figures"].items():
        assert figure["min"] <= figure["median"] <= figure["p95"] <= figure["max"], name
    for sample in report["samples"]:
        assert_is_in_order(sample)
    await guest.until_mounted(POINT)
    await guest.sh(f"cmp {POINT}/written /root/written; rm {POINT}/written /root/written")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await guest.sh("rm -r /root/measure /root/board.json")
    return report


def assert_is_in_order(sample: dict[str, float]) -> None:
    assert all(sample[name] > 0 for name in IN_ORDER), sample
    told = sample["kernel add -> udev add, ms"] + sample["udev add -> mounted, ms"]
    assert abs(told - sample["kernel add -> mounted, ms"]) < 0.01
    parts = [sample[f"removed -> {part}, ms"] for part in PARTS]
    assert max(parts) == sample["removed -> nothing left, ms"]
    assert sample["agent's RSS, MB"] > sample["agent's PSS, MB"]
    assert sample["  mount, ms"] < sample["kernel add -> mounted, ms"]


async def test_a_stick_goes_and_comes_and_its_figures_tell_nothing_of_whose_it_is(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.plug_usb(medium, serial="a-serial-number")
    await is_served(guest, agent)
    report = await report_of(guest, "/dev/sda1")
    assert (report["bus"], report["filesystem"]) == ("usb", "ext4")
    assert report["await_udev"] is (AWAIT_UDEV == "yes")
    assert report["caam_hotplug"] and report["systemd"] and report["kernel"]
    said = json.dumps(report)
    assert "cartridge" not in said
    assert "a-serial-number" not in said


async def test_a_scsi_disk_is_looked_for_where_it_was_and_waits_for_udev_if_it_shall(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure(f"await_udev = true\n{ANY_BUS}")
    await guest.plug_scsi(medium)
    await is_served(guest, agent)
    report = await report_of(guest, "cartridge-01", cycles=1)
    assert (report["bus"], report["await_udev"]) == ("scsi", True)
    (sample,) = report["samples"]
    assert 0 < sample["udev's share of kernel add -> mounted"] < 1


async def test_what_is_used_is_not_pulled_nor_what_nobody_serves(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.plug_usb(medium)
    await is_served(guest, agent)
    await guest.sh(f"cd {POINT}; sleep 1000 >/dev/null 2>&1 & echo $! >/run/user-of-it")
    refused = await guest.sh(f"{COMMAND} /dev/sda1", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    *_, line = refused.stderr.splitlines()
    assert line.startswith("measure replug: /dev/sda1 cannot be pulled, because it is in use: pid ")
    assert line.endswith(f"(sleep) works in {POINT}; end that first")
    await guest.sh("kill $(cat /run/user-of-it); rm /run/user-of-it")
    refused = await guest.sh(f"{COMMAND} cartridge-01 --json {POINT}/board.json", check=False)
    assert "board.json is on the medium itself" in refused.stderr
    await guest.run("caam-hotplug", "lock", "cartridge-01")
    refused = await guest.sh(f"{COMMAND} /dev/sda1", check=False)
    assert "measure replug: cartridge-01 is not mounted, but locked" in refused.stderr
    await agent.stop()
    refused = await guest.sh(f"{COMMAND} /dev/sda1", check=False)
    assert refused.stderr.startswith("measure replug: pull: the agent does not run")
    await guest.run("rm", "-r", "/root/measure")


async def test_an_interrupted_stick_is_back(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.plug_usb(medium)
    await is_served(guest, agent)
    done = await guest.sh(
        f"set -m; ({COMMAND} /dev/sda1 2>/root/said) & program=$!\n"
        "while test -e /dev/sda1; do :; done; kill -INT $program; wait $program || echo $?\n"
        "cat /root/said; rm -r /root/said /root/measure"
    )
    assert done.stdout.splitlines() == ["130", "cycle 1 of 12", "measure replug: interrupted"]
    await guest.until_mounted(POINT)


async def test_by_hand_it_says_when_to_pull_and_when_to_plug(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    stick = await guest.plug_usb(medium)
    await is_served(guest, agent)
    await guest.sh(
        f"({COMMAND} /dev/sda1 --by-hand --cycles 1 --json board.json) >/root/said 2>&1 &"
    )
    await guest.until("grep -q 'pull the medium' /root/said")
    await stick.pull()
    await guest.until("grep -q 'plug the medium' /root/said")
    await stick.plug()
    await guest.until("test -e /root/board.json")
    report = json.loads(await guest.read("/root/board.json"))
    assert "plugged -> kernel add, ms" not in report["figures"]
    assert report["figures"]["kernel add -> mounted, ms"]["min"] > 0
    await guest.sh("rm -r /root/said /root/measure /root/board.json")


async def test_a_card_goes_with_its_slots_controller_and_comes_back(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.insert_sd(medium)
    await is_served(guest, agent)
    report = await report_of(guest, "cartridge-01", cycles=1)
    assert report["bus"] == "mmc"

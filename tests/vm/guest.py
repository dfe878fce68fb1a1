"""The guest as its tests see it: commands inside, media plugged and pulled from outside."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from vm.qmp import Qmp

ANSWER_GRACE_S: Final = 30
"""How much longer than it should take an answer is waited for, before the guest counts as dead."""
SLOW: Final = 16 << 10
"""Bytes a second at which a medium is slow, and no request of the guest's lasts as long as 30 s.

The guest's kernel cancels a request then, and QEMU waits for its end with the whole machine.
"""
USB_PORTS: Final = [f"xhci{n}.0" for n in range(3) for _ in range(15)]


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command in the guest gave back."""

    returncode: int
    stdout: str
    stderr: str


class CommandFailedError(AssertionError):
    """A command in the guest ended with another exit status than 0, or not in time."""


class GuestDiedError(Exception):
    """The guest or its agent does not answer any more; the console's last words are in it."""


class Guest:
    """A running guest."""

    def __init__(
        self, run: Path, qmp: Qmp, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.qmp = qmp
        self._run = run
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._nodes = itertools.count(1)
        self._ports = list(USB_PORTS)
        self.plugged: list[Plug | SdCard | CardReader] = []
        """The media in their sockets, in the order in which they were plugged."""
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pump = asyncio.create_task(self._read())
        self._sd_found = False
        self._dead = False

    @classmethod
    async def connected(cls, run: Path, qmp: Qmp) -> Guest:
        """Connected to the bed's agent; requests are answered once the guest runs it."""
        reader, writer = await asyncio.open_unix_connection(run / "agent", limit=1 << 26)
        return cls(run, qmp, reader, writer)

    async def close(self) -> None:
        """Nothing of the connection is left."""
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                reply = json.loads(line)
                answer = self._answers.pop(reply.pop("id"), None)
                if answer is not None and not answer.done():
                    answer.set_result(reply)
        self._dead = True
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._death("died"))

    def _death(self, how: str) -> GuestDiedError:
        said = (self._run / "qemu.log").read_text(errors="replace")
        return GuestDiedError(f"the guest {how}: {said}\n{self.console()[-4000:]}")

    async def _ask(self, do: str, *, within_s: float = 30, **request: Any) -> dict[str, Any]:
        if self._dead:
            raise self._death("died")
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps({"id": number, "do": do, **request}).encode() + b"\n")
        await self._writer.drain()
        try:
            async with asyncio.timeout(within_s + ANSWER_GRACE_S):
                reply: dict[str, Any] = await answer
        except TimeoutError as error:
            raise self._death(f"does not answer to {do} {request}") from error
        finally:
            self._answers.pop(number, None)
        if "error" in reply:
            raise CommandFailedError(f"{do} {request}: {reply['error']}")
        return reply

    async def run(
        self,
        *argv: str,
        check: bool = True,
        timeout_s: float = 240,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
    ) -> Completed:
        """The command has ended. Raises: CommandFailedError unless it ended with 0 (`check`)."""
        reply = await self._ask(
            "run",
            within_s=timeout_s,
            argv=list(argv),
            stdin=base64.b64encode(stdin).decode(),
            timeout_s=timeout_s,
            env=env or {},
        )
        out, err = (base64.b64decode(reply[k]).decode(errors="replace") for k in ("out", "err"))
        if reply["code"] is None or (check and reply["code"] != 0):
            what = f"timed out after {timeout_s} s" if reply["code"] is None else reply["code"]
            raise CommandFailedError(f"{' '.join(argv)}: {what}\n{out}\n{err}")
        return Completed(reply["code"], out, err)

    async def sh(self, script: str, *, check: bool = True, timeout_s: float = 240) -> Completed:
        """A shell script has run, stopping at its first failing command."""
        return await self.run("/bin/bash", "-ec", script, check=check, timeout_s=timeout_s)

    async def read(self, path: str) -> bytes:
        """The bytes of a file in the guest. Raises: CommandFailedError."""
        return base64.b64decode((await self._ask("read", path=path))["data"])

    async def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """The file in the guest has these bytes; missing folders are made."""
        await self._ask("write", path=path, data=base64.b64encode(data).decode(), mode=mode)

    async def until(self, script: str, *, deadline_s: float = 120) -> None:
        """The shell condition holds. Raises: AssertionError when the deadline has passed."""
        reply = await self._ask("until", within_s=deadline_s, script=script, deadline_s=deadline_s)
        assert reply["held"], f"still not so after {deadline_s} s: {script}"

    async def until_mounted(self, point: str, *, deadline_s: float = 120) -> None:
        """Something is mounted there. Raises: AssertionError when the deadline has passed."""
        await self._until_mount(point, present=True, deadline_s=deadline_s)

    async def until_unmounted(self, point: str, *, deadline_s: float = 120) -> None:
        """Nothing is mounted there. Raises: AssertionError when the deadline has passed."""
        await self._until_mount(point, present=False, deadline_s=deadline_s)

    async def _until_mount(self, point: str, *, present: bool, deadline_s: float) -> None:
        reply = await self._ask(
            "until_mount", within_s=deadline_s, point=point, present=present, deadline_s=deadline_s
        )
        state = "mounted" if present else "unmounted"
        assert reply["held"], f"{point} not {state} after {deadline_s} s"

    async def resume(self) -> None:
        """A restored guest has the host's time, and the repository at /src, read only."""
        options = "trans=virtio,version=9p2000.L,msize=512000,cache=loose"
        await self._ask("resume", now=time.time(), source="src", target="/src", options=options)

    async def cold_boot_caam(self, otpmk: str, *, secure: bool = True) -> None:
        """The CAAM is that of a board with this master key, and has forgotten its black keys."""
        await self.sh(
            f"in_use=/opt/mainline/in-use\n"
            f"if [ -e $in_use ]; then board-kernel $(cat $in_use) {otpmk}; exit; fi\n"
            f"rmmod caam_sim; modprobe caam_sim otpmk={otpmk} secure={int(secure)}"
        )

    def console(self) -> str:
        """What the guest's kernel said so far."""
        return (self._run / "console").read_text(errors="replace")

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """The guest stands still, and no request of its disks is on its way.

        QEMU has ended once when a medium was taken out while it was written.
        """
        await self.qmp("stop")
        try:
            yield
        finally:
            await self.qmp("cont")

    @property
    def shell_socket(self) -> Path:
        """The guest's own console, for a person."""
        return self._run / "shell"

    async def plug_usb(
        self,
        medium: Path,
        *,
        serial: str = "",
        read_only: bool = False,
        slow: bool = False,
        bad_sector: int | None = None,
    ) -> Plug:
        """A USB stick has been plugged; the guest learns of it in its own time.

        With `slow`, its I/O goes through a throttle of QEMU's named `slow-NODE`. No read that
        touches the `bad_sector` succeeds.
        """
        node = await self._open(medium, read_only=read_only, slow=slow)
        if bad_sector is not None:
            node = await self._damaged(node, bad_sector)
        plug = Plug(self, f"usb-{node}", "usb-storage", node, serial or node, bus=None)
        await plug.plug()
        return plug

    async def plug_scsi(
        self, medium: Path, *, serial: str = "", read_only: bool = False, slow: bool = False
    ) -> Plug:
        """A SCSI disk has been plugged."""
        node = await self._open(medium, read_only=read_only, slow=slow)
        plug = Plug(self, f"scsi-{node}", "scsi-hd", node, serial or node, bus="scsi.0")
        await plug.plug()
        return plug

    async def replace(self, plug: Plug, medium: Path) -> Plug:
        """Another USB stick of the same serial number is in the port of the first."""
        bus = plug.bus
        assert bus is not None
        await plug.pull()
        self._ports.remove(bus)
        self._ports.insert(0, bus)
        return await self.plug_usb(medium, serial=plug.serial)

    async def insert_sd(self, medium: Path) -> SdCard:
        """An SD card sits in the slot; its image's size is a power of two, 64 MiB and up."""
        await self.find_slot()
        card = SdCard(self, await self.open_card(medium))
        await card.plug()
        return card

    async def find_slot(self) -> None:
        """The SD slot is there, which saving the guest has taken away."""
        if not self._sd_found:
            await self.sh("echo 1 > /sys/bus/pci/rescan; modprobe -a sdhci-pci mmc_block")
            self._sd_found = True

    async def plug_reader(self, medium: Path) -> CardReader:
        """A USB card reader has been plugged, with this card in it."""
        node = await self.open_card(medium)
        reader = CardReader(self, Plug(self, f"usb-{node}", "usb-storage", node, node, bus=None))
        await reader.plug()
        return reader

    async def open_card(self, medium: Path) -> str:
        """The name by which QEMU knows the image of a card, to be inserted anywhere."""
        return await self._open(medium, read_only=False, slow=False)

    async def _open(self, medium: Path, *, read_only: bool, slow: bool) -> str:
        node = f"n{next(self._nodes)}"
        file = {"driver": "file", "filename": str(medium), "read-only": read_only}
        await self.qmp("blockdev-add", driver="raw", node_name=node, file=file, read_only=read_only)
        if not slow:
            return node
        group = f"group-{node}"
        await self.qmp("object-add", qom_type="throttle-group", id=group)
        await self.qmp(
            "blockdev-add",
            driver="throttle",
            node_name=f"slow-{node}",
            throttle_group=group,
            file=node,
        )
        return f"slow-{node}"

    async def _damaged(self, node: str, bad_sector: int) -> str:
        error = {"event": "none", "iotype": "read", "errno": errno.EIO, "sector": bad_sector}
        damaged = f"bad-{node}"
        await self.qmp(
            "blockdev-add",
            driver="blkdebug",
            node_name=damaged,
            image=node,
            inject_error=[{**error, "once": False}],
        )
        return damaged

    async def throttle(self, plug: Plug, bytes_per_s: int) -> None:
        """The I/O of a medium plugged `slow` is held to this rate; 0 lifts it."""
        group = f"group-{plug.node.removeprefix('slow-')}"
        limits = {"bps-total": bytes_per_s}
        await self.qmp("qom-set", path=f"/objects/{group}", property="limits", value=limits)

    async def pull_all(self) -> None:
        """No medium is in any socket."""
        for medium in list(self.plugged):
            await medium.pull()

    def take_port(self) -> str:
        """A free USB port's bus."""
        return self._ports.pop(0)

    def return_port(self, bus: str) -> None:
        """The port is free again."""
        self._ports.append(bus)


@dataclass(slots=True, eq=False)
class Plug:
    """A medium on a bus that takes devices; it can be pulled and put back."""

    guest: Guest
    device: str
    driver: Literal["usb-storage", "scsi-hd"]
    node: str
    serial: str
    bus: str | None
    times: int = 0

    async def plug(self) -> None:
        """The medium is in its socket."""
        self.times += 1
        more: dict[str, Any] = {}
        if self.driver == "usb-storage":
            self.bus = self.guest.take_port()
            more = {"removable": True}
        await self.guest.qmp(
            "device_add",
            driver=self.driver,
            id=f"{self.device}-{self.times}",
            bus=self.bus,
            drive=self.node,
            serial=self.serial,
            **more,
        )
        self.guest.plugged.append(self)

    async def pull(self) -> None:
        """The medium is out, without a word to the guest beforehand."""
        device = f"{self.device}-{self.times}"
        self.guest.plugged.remove(self)
        await self.guest.qmp("device_del", id=device)
        async with asyncio.timeout(ANSWER_GRACE_S):
            await self.guest.qmp.device_deleted(device)
        if self.driver == "usb-storage" and self.bus is not None:
            self.guest.return_port(self.bus)


@dataclass(slots=True, eq=False)
class SdCard:
    """A card for the one SD slot."""

    guest: Guest
    node: str

    async def plug(self) -> None:
        """The card sits in the slot."""
        await self.guest.qmp("blockdev-insert-medium", id="sd0", node_name=self.node)
        self.guest.plugged.append(self)

    async def pull(self) -> None:
        """The slot is empty."""
        self.guest.plugged.remove(self)
        async with self.guest.paused():
            await self.guest.qmp("blockdev-remove-medium", id="sd0")


@dataclass(slots=True, eq=False)
class CardReader:
    """A USB reader whose card is changed while the reader stays in its port.

    The reader's disk keeps its name. The kernel asks for another card every two seconds, or when
    somebody opens the disk.
    """

    guest: Guest
    socket: Plug

    async def plug(self) -> None:
        """The reader is in its port, with the card that it had."""
        await self.socket.plug()
        self.guest.plugged[-1] = self

    async def pull(self) -> None:
        """The reader is out."""
        self.guest.plugged[self.guest.plugged.index(self)] = self.socket
        await self.socket.pull()

    async def remove(self) -> None:
        """The card is out, though the guest has locked it in."""
        async with self.guest.paused():
            await self.guest.qmp("blockdev-open-tray", id=self._disk, force=True)
            await self.guest.qmp("blockdev-remove-medium", id=self._disk)

    async def insert(self, node: str) -> None:
        """A card sits in the empty reader, by the name that `Guest.open_card` gave."""
        await self.guest.qmp("blockdev-insert-medium", id=self._disk, node_name=node)
        await self.guest.qmp("blockdev-close-tray", id=self._disk)

    @property
    def _disk(self) -> str:
        device = f"{self.socket.device}-{self.socket.times}"
        return f"{device}/{device}.0/legacy[0]"

"""An agent that tests can ask without a bus: what it publishes, to look anew, and for requests."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

from caam_hotplug.daemon import agent, observer
from caam_hotplug.daemon import main as daemon
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import udev
from caam_hotplug.model import VolumeId
from fakes.oracle import Claim
from kernel.forked import DEADLINE_S
from kernel.forked import Agent as Process

UDEV_PATIENCE_S: Final = 1.0
_MESSAGE_BYTES: Final = 1 << 17


class Asked:
    """Asks the agent's process, which answers from its loop."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._end: socket.socket | None = None

    def start(self) -> None:
        """Start the agent and wait until it is ready."""
        self.close()
        self._end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.settimeout(DEADLINE_S)
        _Answering.end = other
        with (
            mock.patch.object(daemon, "Agent", _Answering),
            mock.patch.object(observer, "LOOKS_AFTER_S", 0.0),
            mock.patch.object(udev, "UDEV_PATIENCE_S", UDEV_PATIENCE_S),
        ):
            self._process.start()
        other.close()

    def close(self) -> None:
        """Ask no more."""
        if self._end is not None:
            self._end.close()
            self._end = None

    def claims(self, *, look: bool) -> list[Claim]:
        """Return what is published of disks, and have all of them looked at for the next time."""
        return [Claim(*values) for values in self._asked("look" if look else "claims")]

    def request(self, verb: str, volume: str) -> str:
        """Have a request carried out; return why it is refused, or nothing."""
        return str(self._asked(verb, volume))

    def requests(self, wanted: list[tuple[str, str]]) -> None:
        """Have requests of these verbs for these volumes carried out at once; await the answers."""
        for words in wanted:
            self._send(*words)
        for _ in wanted:
            self._answer()

    def _asked(self, *words: str) -> Any:
        self._send(*words)
        return self._answer()

    def _send(self, *words: str) -> None:
        assert self._end is not None
        self._end.send(json.dumps(words).encode())

    def _answer(self) -> Any:
        assert self._end is not None
        text = self._end.recv(_MESSAGE_BYTES)
        assert text, self._process.everything()
        answer = json.loads(text)
        assert not isinstance(answer, dict), f"{answer}\n{self._process.everything()}"
        return answer


class _Answering(agent.Agent):
    """The agent, in its process. Synchronization: loop only."""

    end: socket.socket

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._answers: set[asyncio.Task[None]] = set()
        self._loop.add_reader(self.end, self._read)

    def _read(self) -> None:
        text = self.end.recv(_MESSAGE_BYTES)
        if not text:
            self._loop.remove_reader(self.end)
            return
        task = self._loop.create_task(self._answer(*json.loads(text)))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, verb: str, volume: str = "") -> None:
        answer: Any = ""
        if verb in ("look", "claims"):
            answer = self._claims()
            for entry in self._registry.entries() if verb == "look" else []:
                self.look(entry.volume.id)
        elif (which := VolumeId.from_text(volume)) is not None:
            try:
                await getattr(self._supervisor, verb)(which, "a test")
            except HotplugError as error:
                answer = str(error)
            except Exception as error:  # else it would not be answered
                answer = {"defect": repr(error)}
        self.end.send(json.dumps(answer).encode())

    def _claims(self) -> list[tuple[str, str, str, str, str, bool]]:
        return [
            (
                str(entry.volume.id), entry.state.value, entry.reason, entry.mapping_name,
                entry.mount_point, entry.read_only,
            )
            for entry in self._registry.entries()
            if entry.volume.name.startswith("sd")
        ]  # fmt: skip


@contextmanager
def asked(process: Process) -> Iterator[Asked]:
    """Ask this agent, until the context ends."""
    made = Asked(process)
    try:
        yield made
    finally:
        made.close()

"""A room with an agent, its blobs, its mount root and media to plug; empty after each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from caam_hotplug.config import loader
from caam_hotplug.kernel import agent_lock, config_files, devmapper
from fakes.contract import until
from kernel.cartridges import HELLO, TEXT, Cartridge
from kernel.forked import Agent
from kernel.gadgets import Card
from kernel.real import BLOBS

ARRIVAL: Final = (
    "ioctl", "add_key", "dm create", "dm load", "keyctl_unlink", "dm resume", "mkdir", "fsopen",
    "fsconfig", "fsconfig", "fsconfig", "fsmount", "move_mount",
)  # fmt: skip
"""Calls that change something, from the medium's event until it is mounted."""
ROOM: Final = Path("/run/room")
AWAIT_UDEV: Final = "true" if os.environ.get("AWAIT_UDEV") == "yes" else "false"
RULES: Final = """
await_udev = {await_udev}
blob_directory = "{room}/blobs"
mount_root = "{room}/media"
stuck_after_s = 2
stop_within_s = {stop_within_s}

[[rule]]
name = "cartridges"
match.partlabel = "cartridge-*"
"""


class Room:
    """An agent and its media, with the actions and checks of a test."""

    def __init__(self, media: list[Cartridge], folder: Path) -> None:
        self.media = media
        self.medium, self.neighbour = media[:2]
        self.mount_root = folder / "media"
        blobs = folder / "blobs"
        for made in (folder, self.mount_root, blobs):
            made.mkdir(mode=0o755)
        for label in {"cartridge-03", *(cartridge.label for cartridge in media)}:
            (blobs / f"{label}.bb").write_bytes((BLOBS / "cartridge-01.bb").read_bytes())
        self._folder = folder
        self.blobs = blobs
        self.configuration = folder / "agent.toml"
        self.configure()
        load = partial(loader.load, self.configuration, config_files.RootsFiles())
        self.agent = Agent(load, folder / "notify")

    def configure(self, more: str = "", *, stop_within_s: int = 120) -> None:
        """Add these keys to the agent's rule, from its next read of the configuration on."""
        rules = RULES.format(room=self._folder, stop_within_s=stop_within_s, await_udev=AWAIT_UDEV)
        self.configuration.write_text(rules + more)

    def point(self, medium: Cartridge | Card | None = None) -> Path:
        """Return the path where the medium is to be mounted."""
        return self.mount_root / (medium or self.medium).label

    def check_served(self, medium: Cartridge | Card | None = None) -> None:
        """Check that the medium is mounted and readable, its key gone, its mapping the only one."""
        medium = medium or self.medium
        self.agent.until_said(f"{medium.label}.*: mounted: at ")
        assert (self.point(medium) / HELLO).read_bytes() == TEXT
        assert len([line for line in tables(medium.label) if " crypt " in line]) == 1
        until(lambda: keys() == [])

    def check_still_mounted(self) -> None:
        """Check that the medium is mounted, whatever the agent has logged."""
        assert self.point().is_mount()
        assert (self.point() / HELLO).read_bytes() == TEXT

    def plug_and_check(self, medium: Cartridge | None = None) -> None:
        """Plug the medium and wait until it is served; ignore earlier log lines."""
        self.agent.forget()
        (medium or self.medium).plug()
        self.check_served(medium)

    def pull_and_check(self) -> None:
        """Pull the medium, and check that nothing of it is left."""
        self.medium.pull()
        self.wait_until_released()

    def wait_until_released(self) -> None:
        """Wait until no mapping, key, mount or mount point of the medium is left."""
        until(lambda: self.leftovers() == [] and keys() == [])

    def check_released(self) -> None:
        """Check at once that nothing of the medium is left; wait only for the key's grace period.

        The keyring that held the key releases it by RCU (assoc_array_apply_edit in
        lib/assoc_array.c), and until then the kernel lists it.
        """
        assert self.leftovers() == []
        until(lambda: keys() == [])

    def leftovers(self) -> list[str]:
        """List what is left of the medium, except keys."""
        label = self.medium.label
        return [
            *(m for m in mappings() if f"caam-{label}-" in m),
            *(line for line in mounts() if f" {self.point()} " in line),
            *(str(path) for path in self.mount_root.glob(label)),
        ]


def mappings() -> list[str]:
    """Return the names of all mappings of the agent."""
    return [mapping.name for mapping in devmapper.ours()]


def tables(label: str = "") -> list[str]:
    """Return the target lines of the agent's mappings, or of those for media with a label."""
    ours = [mapping for mapping in devmapper.ours() if f"caam-{label}" in mapping.name]
    return [line for mapping in ours for line in mapping.table]


def keys() -> list[str]:
    """Return all keys of the agent, in every keyring.

    A key whose usage count is 0 does not count: the kernel's collector has yet to free it
    (security/keys/gc.c).
    """
    lines = Path("/proc/keys").read_text().splitlines()
    return [line for line in lines if "caam-hotplug" in line and line.split()[2] != "0"]


def mounts() -> list[str]:
    """Return all lines of mountinfo."""
    return Path("/proc/self/mountinfo").read_text().splitlines()


@contextmanager
def room_of(media: list[Cartridge]) -> Iterator[Room]:
    """Make a room with these media; stop its agent afterwards, if it still runs."""
    made = Room(media, ROOM)
    agent_lock.LOCK.parent.mkdir(mode=0o700, exist_ok=True)  # or its first start would
    try:
        yield made
        for medium in media:
            if medium.is_plugged:
                medium.pull()
        if made.agent.pid:
            made.agent.stop()
        until(lambda: not mappings() and not keys())
        assert list(made.mount_root.iterdir()) == []
    finally:
        made.agent.close()
        shutil.rmtree(ROOM)

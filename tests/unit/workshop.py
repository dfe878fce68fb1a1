"""Media made of images, with a CAAM that wraps nothing: what `provision` decides, without a kernel.

A mapping is a file for each key, so a filesystem is found under the key that it was made with only.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from caam_hotplug.cli import provision as command
from caam_hotplug.config import loader
from caam_hotplug.kernel import (
    blob_files,
    caam,
    config_files,
    device_users,
    disks,
    gpt,
    keyring,
    memory,
    udev,
)
from caam_hotplug.keys.sealing import SealMethod
from caam_hotplug.model import (
    Bus,
    DeviceNumber,
    DevType,
    SecretBytes,
    Sectors,
    Volume,
    VolumeId,
)
from caam_hotplug.provisioning import options, provision, temporary_mapping

LABEL: Final = "cartridge-01"
_MAGIC: Final = 0x5461674F
_BYTES: Final = 24 << 20


class Workshop:
    """Where media are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "caam"
        self.blob = self.blobs / f"{LABEL}.bb"
        self.recovery = folder / "recovery"
        self.config_file = folder / "agent.toml"
        self.config_file.write_text(f'blob_directory = "{self.blobs}"\n')
        self.steps: list[str] = []
        """The steps that were told of."""

    def medium(self, name: str = "blank.img") -> Path:
        """An image that was never written to."""
        with (self.folder / name).open("xb") as file:
            file.truncate(_BYTES)
        return self.folder / name

    def make(self, medium: Path, **more: Any) -> provision.Made:
        """`provision` of the medium. `more`: fields of the wish, and options of the rule."""
        choices = {k: more.pop(k) for k in ("cipher", "sector_size") if k in more}
        label = more.pop("label", LABEL)
        rule, text = command.rule_for(label, **choices)
        wished = options.Wish(
            device=str(medium),
            rule=rule,
            rule_text=text,
            config_file=self.config_file,
            **{"key_bytes": 16, "method": SealMethod(backend="tagged"), **more},
        )
        loaded = loader.load(self.config_file, config_files.RootsFiles())
        return provision.provision(wished, loaded, self.steps.append, self.announce)

    def drop_in(self, name: str, text: str = "") -> Path:
        """A file of that name among the rules, which is there if it has a text."""
        file = self.folder / "rules.d" / name
        if text:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return file

    def announce(self) -> list[str]:
        """What is done when a rule was written."""
        return ["announced"]

    def identity(self, medium: Path) -> gpt.Identity:
        """What the medium's one partition says of itself."""
        with medium.open("rb") as file:
            entries = gpt.read(file.fileno(), str(medium))
        assert entries is not None
        (entry,) = entries
        return entry.identity

    def key(self) -> bytes:
        """The key in the label's blob, which this CAAM has not wrapped."""
        return self.blob.read_bytes()[20:36]


def disk_of(medium: Path) -> Volume:
    """The image as a disk."""
    return Volume(
        id=VolumeId(7, 0),
        name=f"..{medium}",
        number=DeviceNumber(7, 77),
        devtype=DevType.DISK,
        size=Sectors(medium.stat().st_size // 512),
        bus=Bus.USB,
        removable=True,
        read_only=False,
    )


class _Held(disks.Held):
    """An image, which has neither device number nor medium."""

    def require_same(self, opened: int) -> None:
        assert opened >= 0


@contextmanager
def _held(disk: Volume) -> Iterator[disks.Held]:
    hold = _Held(disk, os.open(disk.node, os.O_RDONLY))
    try:
        yield hold
    finally:
        hold.close()


def _blob(_device: Path, seal: str, key: int | SecretBytes) -> bytes:
    wrapped = os.urandom(key) if isinstance(key, int) else bytes(key.buffer)
    content = wrapped + bytes(48)
    kind = 9 if seal == "ccm" else 1
    return struct.pack("=5I", _MAGIC, 0, kind, len(wrapped), len(content)) + content


@contextmanager
def _mapped(self: Any, entry: gpt.Entry) -> Iterator[str]:
    file: Path = self._folder.file(self._wish.label)
    key = hashlib.sha256(blob_files.read(file.parent, file.name).content).hexdigest()[:8]
    plain = Path(f"{self._disk.node}.{key}")
    if not plain.exists():
        with plain.open("xb") as made:
            made.truncate(entry.length * 512)
    yield str(plain)


def nothing(*_arguments: object, **_more: object) -> None:
    """What only a kernel could do is taken as done."""


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop in the folder of root's; nothing outside of it is touched."""
    monkeypatch.setattr(caam, "create_blob", _blob)
    monkeypatch.setattr(disks, "whole_disk", lambda device: disk_of(Path(device)))
    monkeypatch.setattr(disks, "held", _held)
    monkeypatch.setattr(options, "_as_udev_has_it", lambda disk, _config: disk)
    monkeypatch.setattr(provision._Making, "_mapped", _mapped)
    for module, name in (
        (disks, "require_not_the_systems"), (disks, "read_partitions"),
        (device_users, "require_unused"), (udev, "require_diskseq"), (memory, "refuse_core_dumps"),
        (keyring, "join_session_keyring"), (temporary_mapping, "remove_leftovers"),
        (provision, "_try_table"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, nothing)
    return Workshop(folder)

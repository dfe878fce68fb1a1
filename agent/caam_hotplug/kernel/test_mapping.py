"""Test mappings: over memory, with keys that nobody keeps, for doctor and for measurements.

A name has the process that made the mapping, so that the next one finds a killed one's leftovers.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from caam_hotplug.errors import DmError
from caam_hotplug.formats.blobs import Trusted
from caam_hotplug.formats.crypt_table import CryptTarget
from caam_hotplug.kernel import devmapper, keyring, trusted
from caam_hotplug.kernel.loop import Memory
from caam_hotplug.model import KeyReference, SecretBytes
from caam_hotplug.names import TestNames

AddKey = Callable[[str], KeyReference]
"""Add the key to the session keyring under this description."""


@dataclass(frozen=True, slots=True)
class Encryption:
    """How a test volume is encrypted: the parts of a table that do not follow from the volume."""

    cipher: str
    add_key: AddKey
    options: frozenset[str] = frozenset()


def logon_key(payload: SecretBytes) -> AddKey:
    """Return what adds a key whose bytes are here, such as a tagged one."""

    def add(description: str) -> KeyReference:
        keyring.add_key("logon", description, payload)
        return KeyReference("logon", len(payload))

    return add


def trusted_key(blob: Trusted, length: int, options: str = "") -> AddKey:
    """Return what loads a key of so many bytes from its blob, with the trust source's options."""

    def add(description: str) -> KeyReference:
        trusted.load_trusted(description, blob, options)
        return KeyReference("trusted", length)

    return add


@contextmanager
def mapped(whose: TestNames, memory: Memory, how: Encryption, count: int = 0) -> Iterator[str]:
    """Map the memory, unlink its key, and yield the mapping's node.

    `count` distinguishes the mappings of one process: one that somebody holds open goes later.
    Raises: HotplugError. Worker: dm.
    """
    mine = f"{os.getpid()}-{count}" if count else str(os.getpid())
    uuid, name, description = whose.uuid + mine, whose.dm_name + mine, whose.key + mine
    with ExitStack() as held:
        held.callback(_remove, uuid, name)
        devmapper.create(name, uuid)
        held.callback(keyring.unlink_key, description)
        key = how.add_key(description)
        target = CryptTarget(
            length=memory.size,
            cipher=how.cipher,
            key_bytes=key.length,
            key_description=f"{key.type}:{description}",
            iv_offset=0,
            device=memory.number,
            offset=0,
            options=how.options,
        )
        devmapper.load(name, target.to_line(), read_only=False)
        keyring.unlink_key(description)
        devmapper.resume(name)
        mapping = devmapper.find(uuid)
        if mapping is None:
            raise DmError("find mapping", name, errno.ENXIO)
        yield mapping.node


def _remove(uuid: str, name: str) -> None:
    if devmapper.find(uuid) is not None:  # else the name belongs to another mapping
        devmapper.remove(name)


def remove_leftovers(whose: TestNames, processes: Path = Path("/proc")) -> list[str]:
    """Remove the mappings of this process and of those that have ended; return their names.

    Worker: dm.
    """
    removed = []
    with contextlib.suppress(DmError):  # without device-mapper there are none
        for mapping in devmapper.ours(whose.uuid):
            pid, _, _ = mapping.uuid.removeprefix(whose.uuid).partition("-")
            if pid == str(os.getpid()) or not (processes / pid).exists():
                devmapper.remove(mapping.name)
                removed.append(mapping.name)
    return removed

"""Mappings with keys that nobody keeps, over memory: for doctor's trial and for measurements.

Each is named for the process that made it, so that the next one knows what a killed one has left.
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
from caam_hotplug.names import Throwaway

AddKey = Callable[[str], KeyReference]
"""The key is in the session keyring under this description."""


@dataclass(frozen=True, slots=True)
class Encryption:
    """How a throwaway volume is encrypted: what of a table does not follow from the volume."""

    cipher: str
    add_key: AddKey
    options: frozenset[str] = frozenset()


def logon_key(payload: SecretBytes) -> AddKey:
    """For a key whose bytes are here, such as a tagged one."""

    def add(description: str) -> KeyReference:
        keyring.add_key("logon", description, payload)
        return KeyReference("logon", len(payload))

    return add


def trusted_key(blob: Trusted, length: int, options: str = "") -> AddKey:
    """For a key of so many bytes that only the kernel has; `options` are for its trust source."""

    def add(description: str) -> KeyReference:
        trusted.load_trusted(description, blob, options)
        return KeyReference("trusted", length)

    return add


@contextmanager
def mapped(whose: Throwaway, memory: Memory, how: Encryption, count: int = 0) -> Iterator[str]:
    """The memory is mapped, and its key in no keyring any more; yields the mapping's node.

    `count` tells apart the mappings of one process: one that somebody holds open goes later.
    Raises: HotplugError. Lane: dm.
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
    if devmapper.find(uuid) is not None:  # else the name is that of another
        devmapper.remove(name)


def sweep(whose: Throwaway, processes: Path = Path("/proc")) -> list[str]:
    """No mapping of a process that runs no more is left, nor one of this process.

    Returns the names of those there were. Lane: dm.
    """
    swept = []
    with contextlib.suppress(DmError):  # where there is no device-mapper, none was left
        for mapping in devmapper.ours(whose.uuid):
            pid, _, _ = mapping.uuid.removeprefix(whose.uuid).partition("-")
            if pid == str(os.getpid()) or not (processes / pid).exists():
                devmapper.remove(mapping.name)
                swept.append(mapping.name)
    return swept

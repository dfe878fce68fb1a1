"""The commands of caam-hotplug-sleep.service: lock volumes before hibernation, unlock them after.

A tagged key is of one session of the CAAM, which hibernation ends. A mapping that survived it would
write noise. The kernel says which mappings there are; the agent, over D-Bus, locks their volumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from caam_hotplug import names
from caam_hotplug.errors import HotplugError, shown

if TYPE_CHECKING:
    from caam_hotplug.cli.options import Commands
    from caam_hotplug.dbus.client import Remote
    from caam_hotplug.model import Mapping, VolumeId

LOCKED: Final = Path("/run/caam-hotplug/locked-for-sleep")
"""Volumes to unlock afterwards, one a line."""


def add_to(commands: Commands) -> None:
    """Add the commands to the parser, without help: only the unit uses them."""
    commands.add_parser("before-sleep").set_defaults(command=_before)
    commands.add_parser("after-sleep").set_defaults(command=_after)


def _before(_parsed: argparse.Namespace) -> int:
    """Lock every volume with a tagged key. If one stays, unlock the others and fail."""
    live = [names.volume_of_dm_uuid(mapping.uuid) for mapping in _with_tagged_keys()]
    locked = _ask_each("Lock", [volume for volume in live if volume is not None])
    LOCKED.write_text("".join(f"{volume}\n" for volume in locked))
    left = _with_tagged_keys()
    if not left:
        return 0
    for mapping in left:
        _complain(
            f"no sleep now: mapping {shown(mapping.name)} has a key of the CAAM's session, which "
            "ends; noise would be written to the medium afterwards"
        )
    _after(_parsed)
    return 1


def _after(_parsed: argparse.Namespace) -> int:
    """Unlock the volumes that were locked before, as far as their media are still there."""
    from caam_hotplug.model import VolumeId  # noqa: PLC0415

    try:
        lines = LOCKED.read_text().splitlines()
    except FileNotFoundError:
        return 0
    LOCKED.unlink()
    _ask_each("Unlock", [volume for line in lines if (volume := VolumeId.from_text(line))])
    return 0


def _with_tagged_keys() -> list[Mapping]:
    """Return the mappings under keys of the CAAM's session, those of our commands included."""
    from caam_hotplug.kernel import devmapper  # noqa: PLC0415

    prefixes = (names.DM_UUID_PREFIX, names.COMMAND_DM_UUID_PREFIX)
    ours = [mapping for prefix in prefixes for mapping in devmapper.ours(prefix)]
    return [mapping for mapping in ours if any(map(_has_tagged_key, mapping.table))]


def _has_tagged_key(line: str) -> bool:
    from caam_hotplug.formats.crypt_table import CryptTarget  # noqa: PLC0415

    target = CryptTarget.from_line(line)
    return target is not None and target.key_description.startswith("logon:")


def _ask_each(method: str, volumes: Iterable[VolumeId]) -> list[VolumeId]:
    """Ask the agent for this of each volume; return those for which it was done."""
    asked = list(volumes)
    done: list[VolumeId] = []
    if not asked:
        return done

    async def work(agent: Remote) -> None:
        for volume in asked:
            try:
                await agent.change(RemoteVolume(names.bus_path(volume), str(volume)), method)
                done.append(volume)
            except HotplugError as error:
                _complain(str(error))

    try:
        from caam_hotplug.dbus.client import RemoteVolume, run  # noqa: PLC0415  sdbus is an extra

        run(method.lower(), work)
    except (ImportError, HotplugError) as error:
        _complain(str(error))
    return done


def _complain(text: str) -> None:
    print(f"{names.PROGRAM}: {text}", file=sys.stderr)

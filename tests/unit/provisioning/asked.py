"""Options as a user asks for them, and a disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from caam_hotplug.keys.backends import SealMethod
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.rule_file import rule_for

DISK: Final = Volume(
    VolumeId(9, 0), "sdb", DeviceNumber(8, 16), DevType.DISK, Sectors(1 << 24), Bus.USB, True, False
)


def options_for(**more: Any) -> ProvisionOptions:
    """Options of `provision`. `more`: fields, and options of the rule."""
    choices = {k: more.pop(k) for k in ("filesystem", "cipher", "sector_size") if k in more}
    rule, text = rule_for("cartridge-01", **choices)
    asked = ProvisionOptions(
        device="/dev/sdb",
        rule=rule,
        rule_text=text,
        key_bytes=16,
        method=SealMethod(backend="tagged"),
    )
    return replace(asked, **more)

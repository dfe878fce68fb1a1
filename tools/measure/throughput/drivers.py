"""Who encrypts: the implementations that /proc/crypto lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

HARDWARE: Final = ("caam", "dcp")
"""What stands in the names of the drivers of NXP's crypto blocks."""
SOFTWARE_ANYWAY: Final = "cbc(aes-generic)"
"""Software by its driver's name, if a slow one."""


@dataclass(frozen=True, slots=True)
class Driver:
    """An implementation that the kernel has of an algorithm, as /proc/crypto has it."""

    name: str
    algorithm: str
    priority: int
    users: int
    is_internal: bool


def listed() -> list[Driver]:
    """Read those that the kernel has now."""
    return parsed(Path("/proc/crypto").read_text())


def parsed(text: str) -> list[Driver]:
    """Read the text of /proc/crypto: blocks of `name : value`."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = (line.partition(":") for line in block.splitlines())
        of = {name.strip(): value.strip() for name, _, value in lines}
        found.append(
            Driver(of["driver"], of["name"], int(of["priority"]), int(of["refcnt"]),
                   of.get("internal") == "yes")
        )  # fmt: skip
    return found


def used(before: list[Driver], after: list[Driver], algorithm: str) -> str:
    """Find which driver has more users than before; by priority if several have, or none has.

    Priority alone would mislead: dm-crypt passes over drivers that allocate memory for a request,
    which /proc/crypto does not show (CRYPTO_ALG_ALLOCATES_MEMORY in dm-crypt.c).
    """
    users = {driver.name: driver.users for driver in before}
    able = [d for d in after if algorithm in (d.algorithm, d.name) and not d.is_internal]
    taken = [driver for driver in able if driver.users > users.get(driver.name, 1)]
    return max(taken or able, key=lambda driver: driver.priority).name if able else "unknown"


def is_hardware(name: str) -> bool:
    """Is the driver of this name one of NXP's crypto blocks?"""
    return any(word in name for word in HARDWARE)


def software(drivers: list[Driver], algorithm: str) -> str:
    """Find the software that the kernel prefers for the algorithm."""
    able = [
        driver
        for driver in drivers
        if driver.algorithm == algorithm and not driver.is_internal and not is_hardware(driver.name)
    ]
    return max(able, key=lambda driver: driver.priority).name if able else SOFTWARE_ANYWAY

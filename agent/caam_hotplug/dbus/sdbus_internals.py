"""The names of sdbus that its documentation does not promise.

sdbus documents decorators and the opening of a bus. The agent exports objects without decorators,
so it uses the classes of the C module below them. These may change in any minor version: the
version is bounded in pyproject.toml, and tests/bus/test_sdbus_internals.py lists what is used.
"""

from __future__ import annotations

from sdbus.sd_bus_internals import (
    SdBus,
    SdBusInterface,
    SdBusMessage,
    SdBusRequestNameExistsError,
    SdBusSlot,
)

__all__ = [
    "SdBus",
    "SdBusInterface",
    "SdBusMessage",
    "SdBusRequestNameExistsError",
    "SdBusSlot",
    "stop_export",
]


def stop_export(interface: SdBusInterface) -> None:
    """Take the interface off the bus. sdbus has no public method for that."""
    interface._stop_export()

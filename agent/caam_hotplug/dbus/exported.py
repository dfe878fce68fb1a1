"""One object on the bus, with one interface of the agent's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from caam_hotplug.dbus.connection import Connection
from caam_hotplug.dbus.properties import Property
from caam_hotplug.dbus.sdbus_internals import SdBusInterface, SdBusMessage, stop_export


@dataclass(frozen=True, slots=True)
class Method:
    act: Callable[..., Awaitable[Any]]
    """Takes who asks, and the arguments."""
    takes: str = ""
    argument_names: tuple[str, ...] = ()
    returns: str = ""
    result_names: tuple[str, ...] = ()
    checked: bool = True
    """Whether only root and the operators may ask, whatever the bus's own policy lets through."""


class ExportedObject:
    """One object with one interface of ours, and the values that it shows."""

    def __init__(
        self,
        connection: Connection,
        path: str,
        name: str,
        properties: Mapping[str, Property],
        values: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.path = path
        self.interface = SdBusInterface()
        self._connection = connection
        self._name = name
        self._properties = properties
        self._values = values
        for property_name, of in properties.items():
            self.interface.add_property(
                property_name, of.signature, partial(self._get, property_name), None, of.flags
            )

    def become(self, values: Mapping[str, Any]) -> SdBusMessage | None:
        """It shows these values from now on. Returns the signal that says what has changed."""
        before, self._values = self._values(), lambda: values
        changed = {
            name: (self._properties[name].signature, value)
            for name, value in values.items()
            if value != before[name]
        }
        if not changed:
            return None
        signal = self._connection.bus.new_signal_message(
            self.path, "org.freedesktop.DBus.Properties", "PropertiesChanged"
        )
        signal.append_data("sa{sv}as", self._name, changed, [])
        return signal

    def remove(self) -> None:
        """It is not there any more.

        What sdbus calls is held by its interface, which Python's collector cannot look into: as
        long as that and we hold each other, neither is freed.
        """
        stop_export(self.interface)
        del self.interface

    def _get(self, name: str, message: SdBusMessage) -> None:
        message.append_data(self._properties[name].signature, self._values()[name])

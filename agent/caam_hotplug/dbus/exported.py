"""An object on the bus with one interface."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from caam_hotplug.dbus.connection import Connection
from caam_hotplug.dbus.properties import Property, values_of
from caam_hotplug.dbus.sdbus_internals import SdBusInterface, SdBusMessage, stop_export


@dataclass(frozen=True, slots=True)
class Method:
    """A method of an object: its signatures, and the function that it calls."""

    act: Callable[..., Awaitable[Any]]
    """Takes the caller and the arguments."""
    takes: str = ""
    argument_names: tuple[str, ...] = ()
    returns: str = ""
    result_names: tuple[str, ...] = ()
    is_restricted: bool = True
    """Whether only root and the operators may call it, even if the policy of the bus is laxer."""


class ExportedObject:
    """An object with one interface, and the values of its properties."""

    def __init__(
        self,
        connection: Connection,
        path: str,
        name: str,
        properties: Mapping[str, Property],
        *,
        subject: Callable[[], object],
    ) -> None:
        """`subject`: returns what the properties are read from.

        Values whose changes are signalled are those of the last `update`.
        """
        self.reading: Callable[[], None] = lambda: None
        """Called before a property is read."""
        self.path = path
        self.interface = SdBusInterface()
        self._connection = connection
        self._name = name
        self._properties = properties
        self._subject = subject
        self._values = values_of(properties, subject())
        for property_name, shape in properties.items():
            self.interface.add_property(
                property_name, shape.signature, partial(self._get, property_name), None, shape.flags
            )

    def update(self, values: dict[str, Any]) -> SdBusMessage | None:
        """Set the values. Returns the signal about those that changed, or None."""
        before, self._values = self._values, values
        changed = {
            name: (self._properties[name].signature, value)
            for name, value in values.items()
            if value != before[name] and self._properties[name].flags
        }
        if not changed:
            return None
        signal = self._connection.bus.new_signal_message(
            self.path, "org.freedesktop.DBus.Properties", "PropertiesChanged"
        )
        signal.append_data("sa{sv}as", self._name, changed, [])
        return signal

    def remove(self) -> None:
        """Take the object off the bus.

        The interface of sdbus holds its callbacks, but Python's garbage collector cannot see that.
        The interface and this object hold each other, so one reference must be deleted here.
        """
        stop_export(self.interface)
        del self.interface

    def _get(self, name: str, message: SdBusMessage) -> None:
        self.reading()
        shape = self._properties[name]
        value = self._values[name] if shape.flags else shape.value(self._subject())
        message.append_data(shape.signature, value)

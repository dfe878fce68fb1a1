"""The service exports what config/org.caamhotplug1.xml says and documents."""

from __future__ import annotations

import inspect
import runpy
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from bus.agents import FakeRegistry, StrangeError, mounted
from bus.private import REPOSITORY, PrivateBus
from caam_hotplug import errors, names
from caam_hotplug.dbus import error_names
from caam_hotplug.dbus.error_names import ERROR_NAMES, error_name, error_text
from caam_hotplug.dbus.service import Service
from unit.volumes import STICK

CONTRACT = REPOSITORY / "config" / "org.caamhotplug1.xml"
EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"

Described = dict[str, dict[str, Any]]


def described(xml: str) -> Described:
    """Return the agent's interfaces by name, and their members."""
    found: Described = {}
    for interface in ET.fromstring(xml).iter("interface"):
        if not interface.get("name", "").startswith(names.BUS_NAME):
            continue
        members = found.setdefault(interface.get("name", ""), {})
        for member in interface:
            assert member.tag in {"method", "property"}
            notes = {
                note.get("name"): note.get("value")
                for note in member.iter("annotation")
                if (note.get("name"), note.get("value")) != (EMITS, "true")
            }
            arguments = [
                (a.get("name"), a.get("type"), a.get("direction")) for a in member.iter("arg")
            ]
            members[member.get("name", "")] = (
                member.tag, member.get("type"), member.get("access"), arguments, notes,
            )  # fmt: skip
    return found


async def test_the_service_exports_what_the_contract_says(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    mounted(registry)
    exported: Described = {}
    for path in (names.BUS_PATH, names.bus_path(STICK.id)):
        result = await bus.gdbus("introspect", "-d", names.BUS_NAME, "-o", path, "--xml")
        exported |= described(result.stdout)
    assert exported == described(CONTRACT.read_text())


async def test_both_clients_introspect_a_volume_alike(
    bus: PrivateBus, service: Service, registry: FakeRegistry
) -> None:
    mounted(registry)
    path = names.bus_path(STICK.id)
    with_gdbus = await bus.gdbus("introspect", "-d", names.BUS_NAME, "-o", path, "--xml")
    with_busctl = await bus.busctl("introspect", "--xml-interface", names.BUS_NAME, path)
    assert described(with_gdbus.stdout) == described(with_busctl.stdout) != {}


def test_every_member_of_the_contract_is_documented() -> None:
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    root = ET.fromstring(CONTRACT.read_text(), parser)
    bare: list[str] = []
    for parent in root.iter():
        before: ET.Element | None = None
        for child in parent:
            if child.tag in {"interface", "method", "property", "arg"} and (
                before is None or before.tag is not ET.Comment
            ):
                bare.append(child.get("name", ""))
            before = child
    assert bare == []


def test_the_reference_in_the_documentation_is_that_of_the_contract() -> None:
    generate = runpy.run_path(str(REPOSITORY / "docs" / "generate_dbus.py"))
    assert (REPOSITORY / "docs" / "dbus.md").read_text() == generate["reference"](CONTRACT)


def test_every_name_of_an_error_is_in_the_reference() -> None:
    page = (REPOSITORY / "docs" / "dbus.md").read_text()
    for name in ERROR_NAMES.values():
        assert f"`{name.removeprefix(names.BUS_ERROR_PREFIX)}`" in page


def errors_of(module: Any) -> list[type[Exception]]:
    return [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, errors.HotplugError) and kind.__module__ == module.__name__
    ]


@pytest.mark.parametrize(
    "kind", errors_of(errors) + errors_of(error_names), ids=lambda k: k.__name__
)
def test_every_error_has_its_own_name(kind: type[Exception]) -> None:
    assert kind in ERROR_NAMES
    sharing = {other for other, name in ERROR_NAMES.items() if name == ERROR_NAMES[kind]}
    assert sharing in ({kind}, {errors.HotplugError, OSError})


def test_an_error_without_a_name_has_the_name_of_its_base_class() -> None:
    assert error_name(StrangeError("x")) == "org.caamhotplug1.Error.Failed"
    assert error_name(PermissionError(1, "x")) == "org.caamhotplug1.Error.Failed"
    assert error_name(errors.MountBusyError("a", "b", 16)) == "org.caamhotplug1.Error.MountBusy"


def test_the_message_of_an_error_is_printable_lines() -> None:
    assert error_text(errors.DmError("load table of", "x", 22)) == (
        "load table of x: Invalid argument"
    )
    assert error_text(errors.HotplugError("a\x1b[2J\udcff\x00")) == r"'a\x1b[2J\udcff\x00'"
    busy = errors.VolumeBusyError("eject x: it", ("pid 1 (a) has f open", "pid 2 (\n) runs in g"))
    assert error_text(busy) == (
        "eject x: it is in use:\npid 1 (a) has f open\n'pid 2 (\\n) runs in g'"
    )
    assert error_text(errors.VolumeBusyError("eject x: it", ())) == str(
        errors.VolumeBusyError("eject x: it", ())
    )

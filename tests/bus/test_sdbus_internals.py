"""What the agent uses of sdbus beyond its documentation is there, in the shape in which it is used.

If a test here fails after an update of sdbus: adapt agent/caam_hotplug/dbus/sdbus_internals.py and
its users, run tests/bus, then change USED and the bound in pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from bus.private import REPOSITORY
from caam_hotplug.dbus import sdbus_internals
from caam_hotplug.dbus.sdbus_internals import SdBus, SdBusInterface, SdBusMessage, SdBusSlot

AGENT: Final = REPOSITORY / "agent" / "caam_hotplug"
ADAPT: Final = "sdbus has changed: see the first lines of tests/bus/test_sdbus_internals.py"

USED: Final[dict[type, dict[str, int | None]]] = {
    SdBus: {
        "add_interface": 3,
        "add_object_manager": 1,
        "call_async": 1,
        "close": 0,
        "emit_object_added": 1,
        "emit_object_removed": 1,
        "get_fd": 0,
        "match_signal_async": 5,
        "method_call_timeout_usec": None,
        "new_method_call_message": 4,
        "new_signal_message": 3,
        "process": 0,
        "request_name_async": 2,
    },
    SdBusInterface: {"_stop_export": 0, "add_method": 7, "add_property": 5},
    SdBusMessage: {
        "append_data": 2,
        "create_error_reply": 2,
        "create_reply": 0,
        "expect_reply": None,
        "get_contents": 0,
        "parse_to_tuple": 0,
        "path": None,
        "send": 0,
        "sender": None,
    },
    SdBusSlot: {"close": 0},
}
"""Members by class, each with its number of arguments, or None for an attribute."""
UNCHECKED: Final = {"append_data", "get_fd"}
"""Methods that do not count their arguments."""
NAMESAKES: Final = {"address", "call", "interface", "start"}
"""Members of classes of the agent that sdbus has too."""

MEMBERS: Final = [
    (kind, name, count) for kind, members in USED.items() for name, count in members.items()
]


@pytest.mark.parametrize(
    ("kind", "name", "count"), MEMBERS, ids=[f"{kind.__name__}.{name}" for kind, name, _ in MEMBERS]
)
def test_a_member_has_the_shape_in_which_it_is_used(
    kind: type, name: str, count: int | None
) -> None:
    member = getattr(kind, name, None)
    assert member is not None, f"{kind.__name__} has no {name}. {ADAPT}"
    assert callable(member) == (count is not None), f"{kind.__name__}.{name}: {ADAPT}"
    if count is None or name in UNCHECKED:
        return
    with pytest.raises(TypeError) as refused:
        member(kind(), *range(20))
    assert expected_arguments(str(refused.value)) == count, f"{refused.value}. {ADAPT}"


def expected_arguments(refusal: str) -> int:
    """Return the number of arguments that a method in C names when it gets another."""
    words = {"no": 0, "one": 1}
    found = re.search(r"takes (?:exactly )?(\w+) arguments?\b", refusal)
    assert found, f"{refusal}. {ADAPT}"
    return words[found[1]] if found[1] in words else int(found[1])


def test_every_member_that_the_agent_uses_is_listed() -> None:
    theirs = {name for kind in USED for name in dir(kind) if not name.startswith("__")}
    attributes = {
        node.attr
        for source in (*(AGENT / "dbus").glob("*.py"), AGENT / "cli" / "watch.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert attributes & theirs - NAMESAKES == {name for _, name, _ in MEMBERS}


def imports(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_one_module_imports_what_sdbus_does_not_document() -> None:
    importers = {
        source for source in AGENT.rglob("*.py") if "sdbus.sd_bus_internals" in imports(source)
    }
    assert importers == {Path(sdbus_internals.__file__)}


def test_the_versions_that_are_installed_with_the_agent_are_within_the_bound() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (bound,) = {one for extra in extras.values() for one in extra if one.startswith("sdbus")}
    assert bound == "sdbus>=0.14,<0.15"
    bundled = (REPOSITORY / "config/debian/bundled.txt").read_text()
    assert re.findall(r"^sdbus==(\d+\.\d+)\.", bundled, re.MULTILINE) == ["0.14"]
    (recipe,) = (REPOSITORY / "config/yocto").rglob("python3-sdbus_*.bb")
    assert recipe.name.startswith("python3-sdbus_0.14.")

"""Modules and functions are short enough to be read at once, and tests lie where one looks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
AGENT: Final = REPOSITORY / "agent" / "caam_hotplug"
UNIT: Final = REPOSITORY / "tests" / "unit"
MODULE_LINES: Final = 300
FUNCTION_LINES: Final = 40

ELSEWHERE: Final = {"dbus": "tests/bus", "volume": "tests/life"}
"""Packages that need a bus or a simulated kernel to be tested."""
BY_OTHERS: Final = {"keys"}
"""Packages that the tests of their users reach."""


def sources() -> list[Path]:
    return sorted(AGENT.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield the name of each function and its number of lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_module_is_too_long() -> None:
    counts = {named(path): len(path.read_text().splitlines()) for path in sources()}
    assert {name: count for name, count in counts.items() if count > MODULE_LINES} == {}


def test_no_function_is_too_long() -> None:
    too_long = [
        f"{named(path)}: {function} has {count} lines"
        for path in sources()
        for function, count in functions(path.read_text())
        if count > FUNCTION_LINES
    ]
    assert too_long == []


def packages() -> set[str]:
    return {path.parent.name for path in AGENT.glob("*/__init__.py")}


def test_every_package_has_its_tests_in_a_directory_of_its_name() -> None:
    for package in packages() - BY_OTHERS:
        directory = REPOSITORY / ELSEWHERE.get(package, f"tests/unit/{package}")
        assert list(directory.glob("test_*.py")), f"no tests in {directory}"


def test_every_directory_of_unit_tests_names_a_package() -> None:
    assert {path.parent.name for path in UNIT.glob("*/test_*.py")} <= packages()


def test_every_module_of_unit_tests_begins_with_the_name_of_what_it_tests() -> None:
    strays = []
    for test in sorted(UNIT.glob("*/test_*.py")):
        package = AGENT / test.parent.name
        tested = {package.name, *(path.stem for path in package.glob("*.py"))}
        subject = test.stem.removeprefix("test_")
        if not any(subject == one or subject.startswith(f"{one}_") for one in tested):
            strays.append(named(test))
    assert strays == []

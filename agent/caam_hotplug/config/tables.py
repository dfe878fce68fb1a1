"""TOML tables to dataclasses, key by key, so that one mistake does not hide the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from caam_hotplug.config import checks, messages
from caam_hotplug.config.convert import OtherKindError, converted
from caam_hotplug.config.match import Bytes
from caam_hotplug.config.templates import PathTemplate, Template, UnitTemplate
from caam_hotplug.errors import ConfigFault

T = TypeVar("T")


class Reader:
    """Reads the tables of one file and adds its faults to a list."""

    def __init__(self, file: Path, faults: list[ConfigFault]) -> None:
        self._file = file
        self._faults = faults

    def table(self, table: dict[str, Any], wanted: type[T], at: str) -> T | None:
        """Read the table as a dataclass; None if that added a fault."""
        before = len(self._faults)
        hints = _hints(wanted)
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key in hints:
                values[key] = self._value(value, hints[key], messages.key_path(at, key))
            else:
                self._fault(messages.key_path(at, key), messages.unknown_key(key, hints))
        for f in fields(wanted):  # type: ignore[arg-type]
            required = f.default is MISSING and f.default_factory is MISSING
            if required and f.name not in table:
                self._fault(at or f.name, f"needs the key {f.name!r}")
        if len(self._faults) > before:
            return None
        result = wanted(**values)
        for key, problem in checks.contradictions(result):
            self._fault(f"{at}.{key}".removeprefix("."), problem)
        return result if len(self._faults) == before else None

    def _value(self, value: Any, wanted: Any, at: str) -> Any:
        """Read the value at this key; None if that added a fault."""
        if is_dataclass(wanted) and isinstance(wanted, type):
            if isinstance(value, dict):
                return self.table(value, wanted, at)
            return self._fault(at, f"expected a table, found {messages.found(value)}")
        items = get_args(wanted)
        if get_origin(wanted) is tuple and is_dataclass(items[0]):
            if isinstance(value, list):
                return tuple(self._value(v, items[0], f"{at}[{i}]") for i, v in enumerate(value, 1))
            return self._fault(at, f"expected tables [[{at}]], found {messages.found(value)}")
        try:
            result = converted(value, wanted, _from_toml)
            checks.check(at, result)
        except OtherKindError:
            problem = messages.mismatch(value, wanted)
        except ValueError as error:
            problem = str(error)
        else:
            return result
        return self._fault(at, problem)

    def _fault(self, at: str, problem: str) -> None:
        """Add a fault of the value at this key."""
        self._faults.append(ConfigFault(self._file, at, messages.one_line(problem)))


_hints: Final[Callable[[Any], dict[str, Any]]] = cache(get_type_hints)
"""The types of a dataclass's fields; Python would evaluate them anew for every table."""


def _from_toml(wanted: type, value: Any) -> Any:
    """Build a value of a type that TOML lacks. Raises: ValueError with what was expected."""
    if wanted in (Template, UnitTemplate, PathTemplate) and isinstance(value, str):
        return wanted(value)
    if wanted is Bytes and isinstance(value, str):
        return Bytes.from_text(value)
    if wanted is Bytes and isinstance(value, int) and not isinstance(value, bool):
        return Bytes(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    kind = "a size such as 512MiB" if wanted is Bytes else "a text"
    raise ValueError(f"expected {kind}, found {messages.found(value)}")

"""Values that TOML and JSON files can hold, to the types that a dataclass asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Final, Literal, get_args, get_origin

_PLAIN: Final = (bool, int, float, str, NoneType)

Build = Callable[[Any, Any], Any]
"""Builds a value of a type that files do not have, from that type and the file's value.

Raises: ValueError.
"""


class OtherKindError(ValueError):
    """The value is of no kind that is wanted."""


def converted(value: Any, wanted: Any, build: Build) -> Any:
    """Convert the value to the type. Raises: OtherKindError; ValueError of `build`."""
    kind, parts = get_origin(wanted), get_args(wanted)
    choices = list(choices_of(wanted))
    if kind is UnionType:
        return _as_one_of(value, parts, build)
    if kind is tuple and isinstance(value, list):
        return tuple(converted(item, parts[0], build) for item in value)
    if kind is dict and isinstance(value, dict):
        return {
            converted(key, parts[0], build): converted(item, parts[1], build)
            for key, item in value.items()
        }
    if kind is None and wanted not in _PLAIN and not choices:
        return build(wanted, value)
    if kind in (tuple, dict) or not _fits(value, wanted, choices):
        raise OtherKindError(f"expected {wanted}, found a {type(value).__name__}")
    return value if kind is Literal or value is None else wanted(value)


def choices_of(wanted: Any) -> Iterator[Any]:
    """Yield the values of the type, or of its parts; none if there is no end of them."""
    if get_origin(wanted) is Literal:
        yield from get_args(wanted)
    elif isinstance(wanted, type) and issubclass(wanted, Enum):
        yield from (member.value for member in wanted)
    else:
        seen: dict[Any, None] = {}
        for part in get_args(wanted):
            seen |= dict.fromkeys(choices_of(part))
        yield from seen


def _as_one_of(value: Any, types: tuple[Any, ...], build: Build) -> Any:
    """Convert the value to the first of the types that it fits. Raises: OtherKindError."""
    for wanted in types:
        with suppress(OtherKindError):
            return converted(value, wanted, build)
    raise OtherKindError(f"expected one of {types}, found a {type(value).__name__}")


def _fits(value: Any, wanted: Any, choices: list[Any]) -> bool:
    """Whether the value is one of the choices, or of the plain type if there are none."""
    if choices:
        return any(type(choice) is type(value) and choice == value for choice in choices)
    if wanted is float and type(value) is int:
        return not abs(value) >> 64  # an integer has no limit, a float has
    return type(value) is wanted

"""Write config/*.schema.json from the types and checks that read the configuration: `make man`.

An editor completes keys and marks mistakes with them. They refuse nothing that the agent takes; the
agent also refuses what no schema can express, such as two rules of the same name.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from caam_hotplug import names
from caam_hotplug.config import checks
from caam_hotplug.config.convert import choices_of
from caam_hotplug.config.loader import Config, DropIn
from caam_hotplug.config.match import Bytes
from caam_hotplug.config.templates import PathTemplate, Template, UnitTemplate

REPOSITORY: Final = Path(__file__).resolve().parents[1]

Schema = dict[str, Any]


class NoSchemaError(Exception):
    """A type, check, default or key that no rule here describes."""


def main() -> None:
    """Write every schema into the repository."""
    for name, text in generated().items():
        (REPOSITORY / name).write_text(text)


def generated() -> dict[str, str]:
    """Make the text of every schema, by its path in the repository."""
    drop_in = f"A file in {names.CONFIG_FILE.parent / names.RULES_DIRECTORY}"
    return {
        f"config/{name}.schema.json": json.dumps(
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "title": title,
                "description": inspect.getdoc(kind),
                **table(kind, ""),
            },
            indent=2,
        )
        + "\n"
        for name, kind, title in (
            ("agent", Config, str(names.CONFIG_FILE)),
            ("drop-in", DropIn, drop_in),
        )
    }


def table(kind: type, at: str) -> Schema:
    """Describe a table that is read as the dataclass. Raises: NoSchemaError."""
    types, descriptions = get_type_hints(kind), docstrings(kind)
    properties: Schema = {}
    for field in fields(kind):
        if field.name not in descriptions:
            raise NoSchemaError(f"{kind.__name__}.{field.name} has no docstring below it")
        key = f"{at}.{field.name}".removeprefix(".")
        properties[field.name] = {
            "description": descriptions[field.name],
            **_value(types[field.name], key),
            **_default(field),
        }
    required = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def docstrings(kind: type) -> dict[str, str]:
    """Read the texts below a dataclass's fields, which Python does not keep."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    definition = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    found: dict[str, str] = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                found[name] = " ".join(words.split())
    return found


def _value(kind: Any, key: str) -> Schema:
    """Describe a value of the type, with the check of its key. Raises: NoSchemaError."""
    check = checks.CHECKS.get(key)
    if check is None:
        return of_type(kind, key)
    return of_check(check, of_type(kind, key))


# -- types ---------------------------------------------------------------------------------------


def _whole(pattern: str) -> str:
    """Anchor a pattern, which JSON Schema would find anywhere in a text."""
    return f"^(?:{pattern})$"


def _template(kind: type[Template]) -> Schema:
    """Describe the texts that a template takes."""
    endings = "|".join(suffix.replace(".", r"\.") for suffix in kind.SUFFIXES)
    anything = rf"(?:[{kind.CHARACTERS}]|{_placeholder(kind.FIELDS)})+"
    if issubclass(kind, UnitTemplate):
        before = kind.CHARACTERS.replace("@", "")
        unit = rf"(?:[{before}]|{_placeholder(kind.OF_THE_KERNEL)})+"
        anything = f"{unit}(?:@{anything})?"
    return {"type": "string", "pattern": _whole(rf"(?![.-]){anything}(?:{endings})")}


def _path() -> Schema:
    """Describe the texts that a PathTemplate takes."""
    name = rf"(?![.-])(?:[{Template.CHARACTERS}]|{_placeholder(Template.FIELDS)})+"
    return {"type": "string", "pattern": _whole(rf"(?:/{name})+")}


def _placeholder(fields: Iterable[str]) -> str:
    # str.format also takes a placeholder with an empty format, as in {uuid:}.
    return rf"\{{(?:{'|'.join(fields)}):?\}}"


_SINGLE: Final[dict[Any, Schema]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string"},
    Bytes: {
        "anyOf": [
            {"type": "integer"},
            {"type": "string", "pattern": _whole(Bytes.FORM.pattern)},
        ]
    },
    Template: _template(Template),
    UnitTemplate: _template(UnitTemplate),
    PathTemplate: _path(),
}


def of_type(kind: Any, key: str) -> Schema:
    """Describe the values of a type at this key. Raises: NoSchemaError."""
    parts = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return table(kind, key)
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return {"enum": list(choices_of(kind))}
    match get_origin(kind):
        case None if kind in _SINGLE:
            return _SINGLE[kind]
        case origin if origin is UnionType:
            either = [of_type(part, key) for part in parts if part is not NoneType]
            return either[0] if len(either) == 1 else {"anyOf": either}
        case origin if origin is tuple and parts[1:] == (...,):
            least = {} if key in checks.MAY_BE_EMPTY else {"minItems": 1}
            return {"type": "array", "items": of_type(parts[0], key), **least}
        case origin if origin is dict and get_origin(parts[0]) is Literal:
            entries = {name: of_type(parts[1], key) for name in get_args(parts[0])}
            return {"type": "object", "properties": entries, "additionalProperties": False}
    raise NoSchemaError(f"{key}: no rule in docs/generate_schema.py for the type {kind}")


# -- checks --------------------------------------------------------------------------------------


def of_check(check: checks.Check, schema: Schema) -> Schema:
    """Narrow the schema of a type by a check. Raises: NoSchemaError."""
    match check:
        case checks.Form(pattern=pattern):
            return schema | {"pattern": _whole(pattern.pattern)}
        case checks.Limits(least=least, greatest=greatest, or_zero=False):
            return schema | {"minimum": least, "maximum": greatest}
        case checks.Limits(least=least, greatest=greatest):
            return schema | {"anyOf": [{"const": 0}, {"minimum": least, "maximum": greatest}]}
        case checks.AboveZero():
            return schema | {"exclusiveMinimum": 0}
        case checks.AbsolutePath():
            return schema | {"pattern": r"^/(?!(?:.*/)?\.\.(?:/|$))"}
        case checks.FilesystemOptions(option=option):
            items = {"type": "string", "pattern": _whole(option.pattern)}
            entries = {name: {"type": "array", "items": items} for name in schema["properties"]}
            return schema | {"properties": entries}
    raise NoSchemaError(f"no rule in docs/generate_schema.py for the check {check}")


# -- defaults ------------------------------------------------------------------------------------


def _default(field: Field[Any]) -> Schema:
    """Give the default of a field, unless that is None, absent or a table of its own."""
    value = field.default
    if field.default_factory is not MISSING:
        value = field.default_factory()
    if value is MISSING or value is None or is_dataclass(value):
        return {}
    if isinstance(value, tuple) and any(map(is_dataclass, value)):
        return {}
    return {"default": as_written(value)}


def as_written(value: Any) -> Any:
    """Return a value as TOML gives it. Raises: NoSchemaError."""
    match value:
        case Enum():
            return value.value
        case Path():
            return str(value)
        case Template():
            return value.text
        case tuple():
            return [as_written(item) for item in value]
        case dict():
            return {key: as_written(item) for key, item in value.items()}
        case bool() | int() | float() | str():
            return value
    raise NoSchemaError(f"no rule in docs/generate_schema.py for the default {value!r}")


if __name__ == "__main__":
    main()

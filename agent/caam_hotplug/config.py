"""TOML files to a Config. A file with one mistake in it is refused whole, naming every mistake."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from caam_hotplug import names
from caam_hotplug.errors import ConfigError, ConfigFault
from caam_hotplug.rules import BUILT_IN, Bytes, Rule, Template

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that can be configured."""

    source: Literal["auto", "udev", "kernel"] = "auto"
    """Who tells of devices; `auto` is udev where udevd runs, else the kernel."""
    blob_directory: Path = names.BLOB_DIRECTORY
    mount_root: Path = names.MOUNT_ROOT
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    stuck_after_s: float = 10.0
    """How long a kernel call may take before its volume is called stuck, in seconds."""
    stop_within_s: float = 240.0
    """How long a stop waits for media to be written out and let go, in seconds."""
    rule: tuple[Rule, ...] = BUILT_IN
    """In the order in which they are asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _DropIn:
    rule: tuple[Rule, ...] = ()


def load(file: Path, *, required: bool = True) -> Config:
    """The configuration of a file and of the drop-ins beside it, whose rules are asked first.

    A file that is not `required` may be missing; then the defaults stand, and the built-in rule
    if there are no drop-ins either. Raises: ConfigError naming every mistake in every file.
    """
    faults: list[ConfigFault] = []
    config = _read(file, Config, faults) if required or os.path.lexists(file) else Config()
    drop_ins: list[Rule] = []
    for path in sorted((file.parent / names.RULES_DIRECTORY).glob("*.toml")):
        drop_in = _read(path, _DropIn, faults)
        drop_ins += drop_in.rule if drop_in is not None else ()
    if config is None or faults:
        raise ConfigError(faults)
    if drop_ins:
        rules = () if config.rule is BUILT_IN else config.rule
        config = replace(config, rule=(*drop_ins, *rules))
    faults += _same_names(file, config.rule)
    if faults:
        raise ConfigError(faults)
    return config


def load_installed() -> Config:
    """The installed configuration, or the built-in rule where no file is installed.

    Raises: ConfigError naming every mistake in every file.
    """
    return load(names.CONFIG_FILE, required=False)


def _same_names(file: Path, rules: tuple[Rule, ...]) -> Iterator[ConfigFault]:
    for name, times in Counter(rule.name for rule in rules).items():
        if times > 1:
            problem = f"{times} rules are called {name!r}; the name tells them apart in messages"
            yield ConfigFault(file, "rule", problem)


def _read(file: Path, wanted: type[T], faults: list[ConfigFault]) -> T | None:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        faults.append(ConfigFault(file, "", f"cannot be read: {error.strerror}"))
    except (ValueError, RecursionError) as error:  # of the decoders, and of nested or huge values
        faults.append(ConfigFault(file, "", f"is not TOML: {error}"))
    else:
        reader = _Reader(file, faults)
        before = len(faults)
        value = reader.table(table, wanted, "")
        return value if len(faults) == before else None
    return None


class _Reader:
    """Turns TOML into dataclasses key by key, so that one mistake does not hide the next."""

    def __init__(self, file: Path, faults: list[ConfigFault]) -> None:
        self._file = file
        self._faults = faults

    def table(self, table: dict[str, Any], wanted: type[T], at: str) -> T | None:
        """The dataclass that the table describes; None after a fault was noted."""
        before = len(self._faults)
        hints = get_type_hints(wanted)
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key in hints:
                values[key] = self._value(value, hints[key], _join(at, key))
            else:
                self._fault(_join(at, key), _unknown(key, hints))
        for f in fields(wanted):  # type: ignore[arg-type]
            required = f.default is MISSING and f.default_factory is MISSING
            if required and f.name not in table:
                self._fault(at or f.name, f"needs the key {f.name!r}")
        return wanted(**values) if len(self._faults) == before else None

    def _value(self, value: Any, wanted: Any, at: str) -> Any:
        if is_dataclass(wanted) and isinstance(wanted, type):
            if isinstance(value, dict):
                return self.table(value, wanted, at)
            return self._fault(at, f"expected a table, found {_found(value)}")
        items = get_args(wanted)
        if get_origin(wanted) is tuple and is_dataclass(items[0]):
            if isinstance(value, list):
                return tuple(self._value(v, items[0], f"{at}[{i}]") for i, v in enumerate(value, 1))
            return self._fault(at, f"expected tables [[{at}]], found {_found(value)}")
        try:
            result = msgspec.convert(value, wanted, dec_hook=_from_toml)
            _check(at, result)
        except (msgspec.ValidationError, ValueError) as error:
            of_type = isinstance(error, msgspec.ValidationError)
            return self._fault(at, _words(error, value, wanted) if of_type else str(error))
        return result

    def _fault(self, at: str, problem: str) -> None:
        self._faults.append(ConfigFault(self._file, at, problem))


def _from_toml(wanted: type, value: Any) -> Any:
    """msgspec's hook for the types it does not know."""
    if wanted is Template and isinstance(value, str):
        return Template(value)
    if wanted is Bytes and isinstance(value, str):
        return Bytes.from_text(value)
    if wanted is Bytes and isinstance(value, int) and not isinstance(value, bool):
        return Bytes(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    kind = "a size such as 512MiB" if wanted is Bytes else "a text"
    raise ValueError(f"expected {kind}, found {_found(value)}")


_CIPHER: Final = re.compile(r"(capi:)?[a-z0-9()_,-]+-[a-z0-9]+(:[a-z0-9]+)?")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._-]*")


def _check(at: str, value: Any) -> None:
    """What a type cannot say. Raises: ValueError with what was expected."""
    match at.rsplit(".", 1)[-1]:
        case "blob_directory" | "mount_root" if not _is_plain(value):
            raise ValueError(f"expected an absolute path without .., found {str(value)!r}")
        case "cipher" if not _CIPHER.fullmatch(value):
            raise ValueError(f"expected a cipher such as capi:tk(cbc(aes))-plain, found {value!r}")
        case "offset" | "iv_offset" if not 0 <= value < 1 << 63:
            raise ValueError(f"expected sectors from 0 on, found {value}")
        case "min_size" | "max_size" if value < 0:
            raise ValueError(f"expected bytes from 0 on, found {value}")
        case _ if value == () and at.rsplit(".", 1)[-1] not in {"options", "flags"}:
            raise ValueError("expected at least one entry in the list")
        case "stuck_after_s" | "stop_within_s" if not value > 0:
            raise ValueError(f"expected seconds above 0, found {value}")
        case "name" if isinstance(value, str) and not _NAME.fullmatch(value):
            raise ValueError(f"expected a name of A-Z a-z 0-9 . _ - and spaces, found {value!r}")


def _is_plain(path: Path) -> bool:
    plain = path.is_absolute() and not str(path).startswith("//")  # which pathlib keeps
    return plain and ".." not in path.parts and str(path).isprintable()


def _words(error: Exception, value: Any, wanted: Any) -> str:
    choices = list(_choices(wanted))
    if not choices:
        if str(error).startswith("Expected `"):  # in Python's words
            return f"expected {' or '.join(dict.fromkeys(_kinds(wanted)))}, found {_found(value)}"
        return f"{str(error)[:1].lower()}{str(error)[1:]}"
    wants_list = get_origin(wanted) is tuple
    expected = f"expected {'a list of ' if wants_list else ''}{', '.join(map(str, choices))}"
    if wants_list and not isinstance(value, list):
        return f"{expected}; found {_found(value)}"
    wrong = [
        item
        for item in (value if isinstance(value, list) else [value])
        if item not in choices or isinstance(item, float)
    ]
    hint = _nearest(wrong[0], choices) if wrong and isinstance(wrong[0], str) else ""
    return f"{expected}; found {', '.join(map(_found, wrong))}{hint}"


_KINDS: Final[dict[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a table",
    tuple: "a list of texts",
}


def _kinds(wanted: Any) -> Iterator[str]:
    kind = _KINDS.get(get_origin(wanted) or wanted)
    if kind is not None:
        yield kind
    else:
        for part in get_args(wanted):
            yield from _kinds(part)


def _choices(wanted: Any) -> Iterator[Any]:
    if get_origin(wanted) is Literal:
        yield from get_args(wanted)
    elif isinstance(wanted, type) and issubclass(wanted, Enum):
        yield from (member.value for member in wanted)
    else:
        seen: dict[Any, None] = {}
        for part in get_args(wanted):
            seen |= dict.fromkeys(_choices(part))
        yield from seen


def _unknown(key: str, known: Iterable[str]) -> str:
    return "is not a key here" + (_nearest(key, known) or f"; known are {', '.join(known)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    texts = [choice for choice in known if isinstance(choice, str)]
    near = difflib.get_close_matches(word.lower(), texts, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _found(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return "a table"
        case list():
            return "a list"
    return repr(value)


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key

"""TOML files to a Config. A file with one mistake in it is refused whole, naming every mistake."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from caam_hotplug import names
from caam_hotplug.config.convert import OtherKindError, choices_of, converted
from caam_hotplug.config.match import Bytes, Match
from caam_hotplug.config.rules import BUILT_IN, MountSettings, Rule
from caam_hotplug.config.templates import Template, UnitTemplate
from caam_hotplug.errors import (
    ConfigError,
    ConfigFault,
    HotplugError,
    UnfitFileError,
    UnsafePathError,
    shown,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that can be configured."""

    source: Literal["auto", "udev", "kernel"] = "auto"
    """Who tells of devices; `auto` is udev where udevd runs, else the kernel."""
    await_udev: bool = False
    """Whether every medium waits until udev has told of it, even if its rule asks for nothing that
    only udev knows."""
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


class Files(Protocol):
    """How configuration files are read; `kernel.files` has a way to look, and one to act."""

    def read(self, file: Path) -> bytes:
        """The file's bytes. Raises: FileNotFoundError; OSError; HotplugError."""
        ...

    def names(self, folder: Path) -> list[str]:
        """What the directory holds, nothing if there is none. Raises: OSError; HotplugError."""
        ...


def load(file: Path, files: Files, *, required: bool = True) -> Config:
    """The configuration of a file and of the drop-ins beside it, whose rules are asked first.

    A file that is not `required` may be missing; then the defaults stand, and the built-in rule
    if there are no drop-ins either. Raises: ConfigError naming every mistake in every file.
    """
    faults: list[ConfigFault] = []
    if file.absolute().parent.name == names.RULES_DIRECTORY:
        belongs_to = file.absolute().parents[1] / names.CONFIG_FILE.name
        problem = (
            f"is a drop-in, which is read with the configuration beside {names.RULES_DIRECTORY}; "
            f"expected that one, such as {shown(belongs_to)}"
        )
        raise ConfigError([ConfigFault(file, "", problem)])
    folder = file.parent / names.RULES_DIRECTORY
    config = _read(file, files, Config, faults, required=required)
    found: list[str] = []
    with _noting(folder, faults):
        found = sorted(name for name in files.names(folder) if name.endswith(".toml"))
    drop_ins = [_read(folder / name, files, _DropIn, faults, required=True) for name in found]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))  # one directory is above many files
    rules = [rule for drop_in in drop_ins for rule in drop_in.rule]
    if rules:
        config = replace(
            config, rule=(*rules, *(config.rule if config.rule is not BUILT_IN else ()))
        )
    faults += _same_names(file, config.rule)
    if faults:
        raise ConfigError(faults)
    return config


def _same_names(file: Path, rules: tuple[Rule, ...]) -> Iterator[ConfigFault]:
    for name, times in Counter(rule.name for rule in rules).items():
        if times > 1:
            problem = f"{times} rules are called {name!r}; the name tells them apart in messages"
            yield ConfigFault(file, "rule", problem)


@contextmanager
def _noting(file: Path, faults: list[ConfigFault]) -> Iterator[None]:
    """Why the file is not read becomes a fault."""
    try:
        yield
    except UnsafePathError as error:
        problem = f"{error.cause}, and who rules the configuration rules the agent: {error.remedy}"
        faults.append(ConfigFault(error.component, "", problem))
    except HotplugError as error:
        faults.append(ConfigFault(file, "", f"cannot be read: {error}"))
    except OSError as error:
        faults.append(ConfigFault(file, "", f"cannot be read: {error.strerror}"))


def _read(
    file: Path, files: Files, wanted: type[T], faults: list[ConfigFault], *, required: bool
) -> T:
    """What the file describes; the defaults if it is missing, or after a fault was noted."""
    with _noting(file, faults):
        try:
            content = files.read(file)
        except FileNotFoundError:
            if required:
                raise
            return wanted()
        _require_short_keys(content)
        try:
            table = tomllib.loads(content.decode())
        except RecursionError:
            faults.append(ConfigFault(file, "", "is not TOML that can be read: nested too deeply"))
        except ValueError as error:
            faults.append(ConfigFault(file, "", f"is not TOML: {_line(error)}"))
        else:
            return _Reader(file, faults).table(table, wanted, "") or wanted()
    return wanted()


_COMMENT: Final = re.compile(rb"^[ \t]*#.*", re.MULTILINE)
_BESIDE_KEYS: Final = re.compile(rb"[\n=,#\[\]{}]")
_MAX_KEY_PARTS: Final = 100


def _require_short_keys(content: bytes) -> None:
    """Raises: UnfitFileError for a key of so many parts that tomllib would be busy for hours.

    Its time grows faster than the square of their number. No key here has more than four.
    """
    for piece in _BESIDE_KEYS.split(_COMMENT.sub(b"", content)):
        if piece.count(b".") > _MAX_KEY_PARTS:
            raise UnfitFileError(f"has a key of more than {_MAX_KEY_PARTS} parts")


class _Reader:
    """Turns TOML into dataclasses key by key, so that one mistake does not hide the next."""

    def __init__(self, file: Path, faults: list[ConfigFault]) -> None:
        self._file = file
        self._faults = faults

    def table(self, table: dict[str, Any], wanted: type[T], at: str) -> T | None:
        """The dataclass that the table describes; None after a fault was noted."""
        before = len(self._faults)
        hints = _hints(wanted)
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
        if len(self._faults) > before:
            return None
        described = wanted(**values)
        for key, problem in _contradictions(described):
            self._fault(_join(at, key), problem)
        return described if len(self._faults) == before else None

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
            result = converted(value, wanted, _from_toml)
            _check(at, result)
        except OtherKindError:
            problem = _words(value, wanted)
        except ValueError as error:
            problem = str(error)
        else:
            return result
        return self._fault(at, problem)

    def _fault(self, at: str, problem: str) -> None:
        self._faults.append(ConfigFault(self._file, at, _line(problem)))


_hints: Final[Callable[[Any], dict[str, Any]]] = cache(get_type_hints)
"""The types of a dataclass's fields, which Python would evaluate anew for every table."""


def _from_toml(wanted: type, value: Any) -> Any:
    """A value of a type that TOML does not have. Raises: ValueError with what was expected."""
    if wanted in (Template, UnitTemplate) and isinstance(value, str):
        return wanted(value)
    if wanted is Bytes and isinstance(value, str):
        return Bytes.from_text(value)
    if wanted is Bytes and isinstance(value, int) and not isinstance(value, bool):
        return Bytes(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    kind = "a size such as 512MiB" if wanted is Bytes else "a text"
    raise ValueError(f"expected {kind}, found {_found(value)}")


_CIPHER: Final = re.compile(r"(capi:)?[a-z0-9()_,-]+-[a-z0-9]+(:[a-z0-9]+)?")
_KEY_OPTIONS: Final = re.compile(r"([a-z0-9]+=[A-Za-z0-9:_-]+( [a-z0-9]+=[A-Za-z0-9:_-]+)*)?")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._-]*")


def require_key_options(text: str) -> None:
    """Raises: ValueError, with what was expected, for what no trust source could take."""
    if not _KEY_OPTIONS.fullmatch(text):
        # Not repeated: one of them may be a password.
        raise ValueError(
            "expected options such as keyhandle=0x81000001, with values of A-Z a-z 0-9 : _ - and "
            "one space between two of them"
        )


def _check(at: str, value: Any) -> None:
    """What a type cannot say. Raises: ValueError with what was expected."""
    match at.rsplit(".", 1)[-1]:
        case "blob_directory" | "mount_root" if not _is_plain(value):
            raise ValueError(f"expected an absolute path without .., found {_found(str(value))}")
        case "cipher" if value != "auto" and not _CIPHER.fullmatch(value):
            raise ValueError(
                f"expected a cipher such as capi:tk(cbc(aes))-plain, found {_found(value)}"
            )
        case "offset" | "iv_offset" if not 0 <= value < 1 << 63:
            raise ValueError(f"expected sectors from 0 on, found {_found(value)}")
        case "min_size" | "max_size" if value is not None and not 0 <= value < 1 << 64:
            raise ValueError(f"expected bytes from 0 on, found {_found(value)}")
        case "length" if not (value == 0 or 16 <= value <= 128):
            raise ValueError(f"expected bytes from 16 to 128, or 0, found {_found(value)}")
        case "options" if isinstance(value, str):
            require_key_options(value)
        case "filesystem_options":
            _check_options(value)
        case _ if value == () and at.rsplit(".", 1)[-1] not in {"options", "flags"}:
            raise ValueError("expected at least one entry in the list")
        case "stuck_after_s" | "stop_within_s" | "unit_within_s" if not value > 0:
            raise ValueError(f"expected seconds above 0, found {value}")
        case "name" if isinstance(value, str) and not _NAME.fullmatch(value):
            raise ValueError(
                f"expected a name of A-Z a-z 0-9 . _ - and spaces, found {_found(value)}"
            )


_OPTION: Final = re.compile(r"[A-Za-z0-9_.-]+(=[!-~]+)?")


def _check_options(by_filesystem: dict[str, tuple[str, ...]]) -> None:
    """Raises: ValueError for what fsconfig(2) could not take, or two that contradict each other."""
    for filesystem, options in by_filesystem.items():
        said: dict[str, str] = {}
        for option in options:
            if not _OPTION.fullmatch(option):
                expected = "expected an option such as errors=continue or noquota"
                raise ValueError(f"{expected} for {filesystem}, found {_found(option)}")
            key = option.partition("=")[0]
            subject = "ro" if key == "rw" else key.removeprefix("no")
            if said.setdefault(subject, option) != option:
                contradicting = f"{_found(said[subject])} and {_found(option)}"
                raise ValueError(f"expected one of {contradicting} for {filesystem}, found both")


_TIMES: Final = ("noatime", "relatime", "strictatime")


def _contradictions(described: object) -> Iterator[tuple[str, str]]:
    """Pairs of a key and a problem, for keys that are valid each but not together."""
    match described:
        case Match(min_size=Bytes() as least, max_size=Bytes() as most) if least > most:
            yield "min_size", f"expected at most max_size, which is {most}, found {least}"
        case MountSettings(options=options, read_only=read_only, filesystem_options=of):
            times = [option for option in _TIMES if option in options]
            if len(times) > 1:
                yield "options", f"expected one of {', '.join(_TIMES)}; found {', '.join(times)}"
            if read_only and any("rw" in asked for asked in of.values()):
                yield "read_only", "expected false, as filesystem_options ask for 'rw', found true"


def _is_plain(path: Path) -> bool:
    plain = path.is_absolute() and not str(path).startswith("//")  # which pathlib keeps
    return plain and ".." not in path.parts and str(path).isprintable()


def _words(value: Any, wanted: Any) -> str:
    choices = list(choices_of(wanted))
    if not choices:
        return f"expected {' or '.join(dict.fromkeys(_kinds(wanted)))}, found {_found(value)}"
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


def _unknown(key: str, known: Iterable[str]) -> str:
    return "is not a key here" + (_nearest(key, known) or f"; known are {', '.join(known)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib  # noqa: PLC0415  200 kB, and only a mistake needs it

    texts = [choice for choice in known if isinstance(choice, str)]
    near = difflib.get_close_matches(word[:_SHOWN_LENGTH].lower(), texts, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _found(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return "a table"
        case list():
            return "a list"
        case int() if abs(value) >> 64:  # of which Python may refuse to print the digits
            return "a number of more than 64 bits"
        case str() if len(value) > _SHOWN_LENGTH:
            return f"{value[:_SHOWN_LENGTH]!r} and {len(value) - _SHOWN_LENGTH} characters more"
    return repr(value)


_SHOWN_LENGTH: Final = 60


def _line(problem: object) -> str:
    """The problem as one line that people read to its end."""
    line = shown(problem)
    return line if len(line) <= 400 else f"{line[:300]} … {line[-60:]}"


_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def _join(at: str, key: str) -> str:
    shortened = key if len(key) <= _SHOWN_LENGTH else f"{key[:_SHOWN_LENGTH]}…"
    spelled = key if _BARE_KEY.fullmatch(shortened) else repr(shortened)
    return f"{at}.{spelled}" if at else spelled

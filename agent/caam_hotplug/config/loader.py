"""TOML files to a Config. A file with one mistake in it is refused whole, naming every mistake."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar

from caam_hotplug import names
from caam_hotplug.config.messages import one_line
from caam_hotplug.config.rules import BUILT_IN, Rule
from caam_hotplug.config.tables import Reader
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
class DropIn:
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
    drop_ins = [_read(folder / name, files, DropIn, faults, required=True) for name in found]
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
            faults.append(ConfigFault(file, "", f"is not TOML: {one_line(error)}"))
        else:
            return Reader(file, faults).table(table, wanted, "") or wanted()
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

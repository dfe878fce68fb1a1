"""Configuration files to a Config. One mistake refuses all of them; every mistake is named."""

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
from caam_hotplug.config.mount_checks import overlaps
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
    """The configuration of the agent, as agent.toml and the drop-ins describe it."""

    source: Literal["auto", "udev", "kernel"] = "auto"
    """Source of device events; `auto` is udev where udevd runs, else the kernel."""
    await_udev: bool = False
    """Whether every medium waits until udev has reported it, even if its rule asks for nothing that
    only udev knows."""
    blob_directory: Path = names.BLOB_DIRECTORY
    """Directory of the blobs; only root may be able to write to it and to those above it."""
    mount_root: Path = names.MOUNT_ROOT
    """Directory in which the mount points are made and removed."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that goes to the journal."""
    stuck_after_s: float = 10.0
    """Seconds that a kernel call may take before its volume is called stuck."""
    stop_within_s: float = 240.0
    """Seconds that a stop waits for media to be written out and released."""
    rule: tuple[Rule, ...] = BUILT_IN
    """Rules in the order in which they are asked; the first that matches a volume applies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropIn:
    """The content of a file in rules.d."""

    rule: tuple[Rule, ...] = ()
    """Rules that are asked before those of agent.toml."""


class Files(Protocol):
    """Access to configuration files; `kernel.config_files` has one for reading and one for root."""

    def read(self, file: Path) -> bytes:
        """Read the file. Raises: FileNotFoundError; OSError; HotplugError."""
        ...

    def names(self, folder: Path) -> list[str]:
        """List the directory, empty if it is missing. Raises: OSError; HotplugError."""
        ...


def load(file: Path, files: Files, *, required: bool = True) -> Config:
    """Read a configuration file and the drop-ins beside it, whose rules are asked first.

    A file that is not `required` may be missing. The defaults apply then, and the built-in rule
    if there are no drop-ins either. Raises: ConfigError with every mistake in every file.
    """
    _require_no_drop_in(file)
    faults: list[ConfigFault] = []
    folder = file.parent / names.RULES_DIRECTORY
    config = _read(file, files, Config, faults, required=required)
    found: list[str] = []
    with _collecting(folder, faults):
        found = sorted(name for name in files.names(folder) if name.endswith(".toml"))
    by_file = {
        folder / name: _read(folder / name, files, DropIn, faults, required=True) for name in found
    }
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))  # one directory is above many files
    rules = [rule for drop_in in by_file.values() for rule in drop_in.rule]
    if rules:
        config = replace(
            config, rule=(*rules, *(config.rule if config.rule is not BUILT_IN else ()))
        )
    faults += _duplicates(file, config.rule)
    places = (config.mount_root, config.blob_directory, file.absolute())
    origin = {rule.name: each for each, drop_in in by_file.items() for rule in drop_in.rule}
    for rule, problem in overlaps(config.rule, *places):
        faults.append(ConfigFault(origin.get(rule.name, file), "rule", problem))
    if faults:
        raise ConfigError(faults)
    return config


def _require_no_drop_in(file: Path) -> None:
    """Raises: ConfigError for a drop-in, which is no configuration of its own."""
    if file.absolute().parent.name == names.RULES_DIRECTORY:
        belongs_to = file.absolute().parents[1] / names.CONFIG_FILE.name
        problem = (
            f"is a drop-in, which is read with the configuration beside {names.RULES_DIRECTORY}; "
            f"expected that one, such as {shown(belongs_to)}"
        )
        raise ConfigError([ConfigFault(file, "", problem)])


def _duplicates(file: Path, rules: tuple[Rule, ...]) -> Iterator[ConfigFault]:
    """Yield a fault for each name that several rules have."""
    for name, times in Counter(rule.name for rule in rules).items():
        if times > 1:
            problem = f"{times} rules are called {name!r}; the name tells them apart in messages"
            yield ConfigFault(file, "rule", problem)


@contextmanager
def _collecting(file: Path, faults: list[ConfigFault]) -> Iterator[None]:
    """Turn the error that kept the file from being read into a fault."""
    try:
        yield
    except UnsafePathError as error:
        why = "who can change the configuration controls the agent"
        problem = f"{error.cause}, and {why}: {error.remedy}"
        faults.append(ConfigFault(error.component, "", problem))
    except HotplugError as error:
        faults.append(ConfigFault(file, "", f"cannot be read: {error}"))
    except OSError as error:
        faults.append(ConfigFault(file, "", f"cannot be read: {error.strerror}"))


def _read(
    file: Path, files: Files, wanted: type[T], faults: list[ConfigFault], *, required: bool
) -> T:
    """Read one file; the defaults if it is missing, or if that added a fault."""
    with _collecting(file, faults):
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
    """Raises: UnfitFileError for a key of so many parts that tomllib would need hours for it.

    The time that it needs grows faster than the square of their number. A valid key has four at
    most.
    """
    for piece in _BESIDE_KEYS.split(_COMMENT.sub(b"", content)):
        if piece.count(b".") > _MAX_KEY_PARTS:
            raise UnfitFileError(f"has a key of more than {_MAX_KEY_PARTS} parts")

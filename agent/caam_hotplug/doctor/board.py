"""Facts of the board: its files below one root, its configuration, its processes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.config.loader import Config
from caam_hotplug.formats.blobs import Backend
from caam_hotplug.kernel import trusted

UNIT_FOLDERS: Final = (
    "/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system", "/lib/systemd/system",
)  # fmt: skip
RULE_FOLDERS: Final = (
    "/etc/udev/rules.d", "/run/udev/rules.d", "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d", "/lib/udev/rules.d",
)  # fmt: skip
"""In the order of their precedence: a file hides those of its name in later ones (udev(7))."""


@dataclass(frozen=True, slots=True)
class Process:
    """A running process."""

    pid: int
    name: str
    """As the kernel has it: 15 characters at most."""
    state: str
    """One letter, such as S for sleeping, T for stopped (proc_pid_stat(5))."""


@dataclass(frozen=True, slots=True)
class Board:
    """The board that doctor checks."""

    config: Config
    """The defaults if the file cannot be read."""
    config_file: Path = names.CONFIG_FILE
    config_required: bool = False
    config_faulty: bool = False
    """Whether the configuration cannot be read: then nobody knows where things should be."""
    root: Path = Path("/")
    release: str = field(default_factory=lambda: os.uname().release)
    """The running kernel's release."""

    def at(self, path: str | Path) -> Path:
        """Return the absolute path below the root."""
        return self.root / str(path).lstrip("/")

    def text(self, path: str | Path) -> str | None:
        """Read the file, or return None if there is none. Raises: OSError."""
        try:
            return self.at(path).read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def processes(self) -> Iterator[Process]:
        """Yield the running processes."""
        for folder in self.at("/proc").glob("[0-9]*"):
            try:
                pid, _, rest = (folder / "stat").read_text(errors="replace").partition(" (")
            except OSError:  # it has ended meanwhile
                continue
            name, _, after = rest.rpartition(") ")
            yield Process(int(pid), name, after[:1])

    def installed(self, folders: tuple[str, ...]) -> dict[str, Path]:
        """Return the files in force by their names, without those that an earlier folder hides."""
        found: dict[str, Path] = {}
        for folder in folders:
            try:
                listed = sorted(self.at(folder).iterdir())
            except OSError:
                continue
            for file in listed:
                found.setdefault(file.name, file)
        return found

    def seal_method(self) -> Backend | None:
        """Return how this board's kernel can seal keys; None if it cannot."""
        if self.at(names.CAAM_DEVICE).exists():
            return "tagged"
        return "trusted" if trusted.is_offered() else None

    def has_tpm(self) -> bool:
        """Return whether the kernel has a TPM. Source: sysfs-class-tpm in the kernel's ABI."""
        return any(self.at("/sys/class/tpm").glob("tpm[0-9]*"))

    def trust_options(self) -> str | None:
        """Return the rules' options for the trust source; None if rules have different ones."""
        found = {rule.key.options for rule in self.config.rule} - {""}
        return None if len(found) > 1 else "".join(found)

    def filesystems(self) -> set[str]:
        """Return the filesystems that the running kernel has loaded."""
        return {line.split()[-1] for line in (self.text("/proc/filesystems") or "").splitlines()}


_HARMLESS: Final = frozenset({"hash", "keyhandle", "migratable"})
NOT_HARMLESS: Final = (
    "rules have options that would change the trust source, or that serve once, or a password"
)
"""Such as pcrlock and policyhandle of a TPM. A few wrong passwords lock a TPM."""


def is_harmless(options: str) -> bool:
    """Return whether a self-test with the options changes nothing (trusted-encrypted.rst)."""
    return {option.partition("=")[0] for option in options.split()} <= _HARMLESS


def is_masked(file: Path) -> bool:
    """Return whether the file only hides one of its name: a link to /dev/null, or empty."""
    if file.is_symlink() and str(file.readlink()) == "/dev/null":
        return True
    try:
        return file.is_file() and file.stat().st_size == 0
    except OSError:
        return False


def is_open_to_service(status: os.stat_result, wanted: int) -> bool:
    """Return whether root may use a file as `wanted` (4 read, 2 write, 1 enter) by its mode alone.

    Unlike a root shell, the service lacks the right to pass over modes (CAP_DAC_OVERRIDE).
    """
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid == 0:
        granted = mode >> 6
    elif status.st_gid == 0:
        granted = mode >> 3
    else:
        granted = mode
    return granted & wanted == wanted

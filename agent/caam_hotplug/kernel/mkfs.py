"""Creating filesystems, by other programs, since no library does it.

The program is started by its absolute path, without a shell, in an environment that is
given here. It dies with this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from typing import Final

from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.model import SECTOR_BYTES, Sectors

_FOLDERS: Final = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
_PR_SET_PDEATHSIG: Final = 1
_MIB: Final = (1 << 20) // SECTOR_BYTES


@dataclass(frozen=True, slots=True)
class _Maker:
    options: tuple[str, ...]
    label_option: str
    label_max: int
    """A longer label is left out, since the partition's counts."""
    least: Sectors
    """The program refuses a smaller volume."""
    package: str
    """Debian's name."""


_MAKERS: Final = {
    "ext4": _Maker(("-q", "-F"), "-L", 16, Sectors(_MIB), "e2fsprogs"),
    "xfs": _Maker(("-q", "-f"), "-L", 12, Sectors(300 * _MIB), "xfsprogs"),
    "btrfs": _Maker(("-q", "-f"), "-L", 255, Sectors(128 * _MIB), "btrfs-progs"),
    "f2fs": _Maker(("-q", "-f"), "-l", 512, Sectors(64 * _MIB), "f2fs-tools"),
    # FAT has labels in capitals only, so ours would change.
    "vfat": _Maker((), "-n", 0, Sectors(_MIB), "dosfstools"),
    "exfat": _Maker((), "-L", 11, Sectors(_MIB), "exfatprogs"),
}


def least(kind: str) -> Sectors:
    """Return how large a volume must be for the filesystem."""
    return _MAKERS[kind].least


def program(kind: str) -> str:
    """Return the program's path. Raises: HotplugError if it is not installed."""
    name = f"mkfs.{kind}"
    for folder in _FOLDERS:
        if os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    package = _MAKERS[kind].package
    raise HotplugError(f"make {kind}: {name} is not installed; Debian's package is {package}")


def make(kind: str, label: str, node: str) -> None:
    """Create a filesystem on the device. Raises: HotplugError with the program's last line.

    Only the calling thread may exist: the program dies with it (PR_SET_PDEATHSIG of prctl(2)).
    """
    maker, path = _MAKERS[kind], program(kind)
    labelled = [maker.label_option, label] if len(label) <= maker.label_max else []
    done = subprocess.run(
        [path, *maker.options, *labelled, node],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": ":".join(_FOLDERS), "LC_ALL": "C"},
        preexec_fn=_die_with_parent,
    )
    if done.returncode != 0:
        said = done.stdout.decode(errors="replace").strip().splitlines()
        words = shown(said[-1].strip()) if said else f"exit status {done.returncode}"
        raise HotplugError(f"make {kind} on {node}: {path}: {words}")


def _die_with_parent() -> None:
    """Have the kernel kill the program with this process.

    Else a program whose parent was killed would go on writing, beside that of the next run.
    """
    Libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

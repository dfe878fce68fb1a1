"""Checks of the kernel: its release, its options, libraries, device-mapper, keys."""

from __future__ import annotations

import errno
import gzip
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from caam_hotplug import names
from caam_hotplug.doctor.board import Board
from caam_hotplug.doctor.result import Verdict, failure, ok, unknown, warning
from caam_hotplug.errors import DmError, KernelError, KeyringError
from caam_hotplug.kernel import devmapper, keyring
from caam_hotplug.kernel import trusted as keys_of
from caam_hotplug.kernel.blkid import Blkid
from caam_hotplug.kernel.ctypes_lib import Library
from caam_hotplug.kernel.keyring import Keyutils
from caam_hotplug.kernel.libdevmapper import Devmapper
from caam_hotplug.model import SecretBytes

_NEEDED_RELEASE: Final = (5, 15)


class _Udev(Library, soname="libudev.so.1", package="libudev1"):
    """pyudev opens it."""


_LIBRARIES: Final = (Devmapper, Keyutils, Blkid, _Udev)

_QUOTA_USED_UP: Final = 0.9
_OPTION: Final = re.compile(r"^(CONFIG_\w+)=", re.MULTILINE)


def kernel(board: Board) -> Iterator[Verdict]:
    """Check that the kernel numbers insertions, which distinguish one medium from the next."""
    numbered = next(iter(board.at("/sys/block").glob("*/diskseq")), None)
    release = re.match(r"(\d+)\.(\d+)", board.release)
    is_new = release is not None and (int(release[1]), int(release[2])) >= _NEEDED_RELEASE
    if numbered is not None or is_new:
        yield ok(f"Linux {board.release}, which numbers insertions (diskseq)")
    else:
        yield failure(
            f"Linux {board.release} does not number insertions; the agent does not start",
            "use a kernel of 5.15 or later",
        )


@dataclass(frozen=True, slots=True)
class _Option:
    """Options of the kernel, one of which is needed.

    `works` checks for the driver itself, since it may be built outside the kernel's tree.
    """

    names: tuple[str, ...]
    works: Callable[[Board], bool]


def _has(path: str) -> Callable[[Board], bool]:
    return lambda board: board.at(path).exists()


def _says(file: str, line: str) -> Callable[[Board], bool]:
    return lambda board: line in (board.text(file) or "")


def _options(board: Board) -> Iterator[_Option]:
    caam = _has(str(names.CAAM_DEVICE))
    trusted = board.seal_method() == "trusted"
    yield _Option(("CONFIG_BLK_DEV_DM",), _has("/dev/mapper/control"))
    yield _Option(("CONFIG_DM_CRYPT",), _has("/sys/module/dm_crypt"))
    yield _Option(("CONFIG_KEYS",), _has("/proc/keys"))
    yield _Option(("CONFIG_TMPFS",), lambda board: "tmpfs" in board.filesystems())
    yield _Option(("CONFIG_DEVTMPFS",), lambda board: "devtmpfs" in board.filesystems())
    if trusted:
        yield _Option(("CONFIG_TRUSTED_KEYS",), lambda _board: trusted)
        yield _Option(("CONFIG_ENCRYPTED_KEYS",), lambda _board: keys_of.is_offered("encrypted"))
    else:
        crypto = "/proc/crypto"
        yield _Option(("CONFIG_CRYPTO_DEV_FSL_CAAM",), caam)
        yield _Option(("CONFIG_CRYPTO_DEV_FSL_CAAM_JR",), caam)
        yield _Option(("CONFIG_CRYPTO_DEV_FSL_CAAM_CRYPTO_API",), _says(crypto, "-aes-caam\n"))
        yield _Option(("CONFIG_CRYPTO_DEV_FSL_CAAM_TK_API",), _says(crypto, ": tk(cbc(aes))\n"))
    wanted = sorted({kind for rule in board.config.rule for kind in rule.mount.filesystems})
    if wanted and not board.config_faulty:
        yield _Option(
            tuple(f"CONFIG_{kind.upper()}_FS" for kind in wanted),
            lambda board: not board.filesystems().isdisjoint(wanted),
        )


def options_set(configuration: str) -> set[str]:
    """Return the options that a kernel's configuration sets, built in or as modules."""
    return set(_OPTION.findall(configuration))


def _configuration(board: Board) -> tuple[str, str] | None:
    """Return the running kernel's configuration and its file."""
    packed = "/proc/config.gz"
    if board.at(packed).exists():
        return gzip.decompress(board.at(packed).read_bytes()).decode(errors="replace"), packed
    for file in (f"/boot/config-{board.release}", f"/lib/modules/{board.release}/config"):
        text = board.text(file)
        if text is not None:
            return text, file
    return None


def kernel_options(board: Board) -> Iterator[Verdict]:
    """Check that every needed option is set, or another driver does its work."""
    found = _configuration(board)
    if found is None:
        yield unknown(
            f"neither /proc/config.gz nor /boot/config-{board.release} is there; "
            "the lines below say what works",
            "a kernel with CONFIG_IKCONFIG_PROC shows its options",
        )
        return
    text, file = found
    has = options_set(text)
    missing = [option for option in _options(board) if has.isdisjoint(option.names)]
    otherwise = [" or ".join(option.names) for option in missing if option.works(board)]
    lacking = [" or ".join(option.names) for option in missing if not option.works(board)]
    if lacking:
        yield failure(
            f"{file} does not set {', '.join(lacking)}",
            "build the kernel with them, or install their drivers; CAAM's are in NXP's kernels",
        )
    else:
        aside = f"; not set, but done by other drivers: {', '.join(otherwise)}" if otherwise else ""
        yield ok(f"all that are needed are set ({file}){aside}")


def libraries(_board: Board) -> Iterator[Verdict]:
    """Check that every library can be loaded."""
    fine = True
    for library in _LIBRARIES:
        try:
            library.open()
        except KernelError as error:
            fine = False
            yield failure(
                f"{library.soname} cannot be loaded: {error.__cause__}",
                f"install it: package {library.package} on Debian",
            )
    if fine:
        yield ok(f"{', '.join(library.soname for library in _LIBRARIES)} can be loaded")


def device_mapper(_board: Board) -> Iterator[Verdict]:
    """Check that the kernel has device-mapper, and dm-crypt, which it loads if need be."""
    try:
        version = devmapper.target_version("crypt")
    except DmError as error:
        yield failure(
            f"device-mapper does not answer: {error}", "build the kernel with CONFIG_BLK_DEV_DM"
        )
        return
    if version is None:
        yield failure(
            "the kernel has no target `crypt`, and loading its module did not help",
            "modprobe dm-crypt says why; install the kernel's modules, or build it with "
            "CONFIG_DM_CRYPT",
        )
    else:
        yield ok(f"target `crypt` {'.'.join(map(str, version))} is there")


def keys(board: Board) -> Iterator[Verdict]:
    """Check that a logon key can be added to a session keyring, found there and unlinked."""
    description = f"{names.DOCTOR.key}{os.getpid()}"
    try:
        keyring.join_session_keyring()
        with SecretBytes(bytearray(os.urandom(16))) as payload:
            serial = keyring.add_key("logon", description, payload)
        found = keyring.find_key("logon", description)
        keyring.unlink_key(description)
        left = keyring.find_key("logon", description)
    except KeyringError as error:
        yield failure(f"a key does not come to and from a keyring: {error}", _remedy(error))
        return
    if found != serial or left is not None:
        yield failure(
            "a key that was added is not found, or is still found after it was unlinked",
            "look for what keeps keyrings from working: a seccomp filter, a container",
        )
        return
    used = quota_used(board.text("/proc/key-users") or "", os.geteuid())
    if used is not None and used >= _QUOTA_USED_UP:
        yield warning(
            f"root's quota of keys is used to {used:.0%}",
            "raise /proc/sys/kernel/keys/root_maxkeys and root_maxbytes, or see in /proc/keys "
            "who leaves keys behind",
        )
    else:
        yield ok("a logon key was added, found and unlinked")


def _remedy(error: KeyringError) -> str:
    if error.errno == errno.EDQUOT:
        return "raise /proc/sys/kernel/keys/root_maxkeys and root_maxbytes; /proc/keys lists keys"
    if error.errno == errno.ENOSYS:
        return "build the kernel with CONFIG_KEYS"
    return "look for what keeps keyrings from working: a seccomp filter, a container"


def quota_used(key_users: str, user: int) -> float | None:
    """Return how much of the user's quota is used, 1 being all; None without such a user.

        0:    80 79/79 60/1000000 1280/25000000

    The last two fields are keys and bytes, used and allowed. Source: proc_key-users(5).
    """
    for line in key_users.splitlines():
        whose, _, rest = line.strip().partition(":")
        if whose != str(user):
            continue
        parts = [field.partition("/") for field in rest.split()[2:4]]
        return max((int(used) / max(int(most), 1) for used, _, most in parts), default=None)
    return None

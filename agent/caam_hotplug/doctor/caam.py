"""Checks of the CAAM: its device, its job rings, its security state, its algorithms."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.doctor.board import Board, is_open_to_service
from caam_hotplug.doctor.result import Verdict, failure, ok, unknown, warning
from caam_hotplug.formats.blobs import KEY_TYPES
from caam_hotplug.formats.crypt_table import cipher_for

_DEVICE_TREE: Final = "/sys/firmware/devicetree/base"
_JOB_RING: Final = "-job-ring"
_RING_DRIVER: Final = "/sys/bus/platform/drivers/caam_jr"

_SEC_CONFIG: Final = {
    "fsl,imx6": (6, 1 << 1),
    "fsl,imx7d": (7, 1 << 25),
    "fsl,imx7s": (7, 1 << 25),
    "fsl,imx8mm": (7, 1 << 25),
    "fsl,imx8mn": (7, 1 << 25),
    "fsl,imx8mp": (7, 1 << 25),
    "fsl,imx8mq": (7, 1 << 25),
}
"""The fuse that closes a part: its word among the fuses, and its bit, by the start of the device
tree's `compatible`. Source: imx_sec_config_fuse and IS_HAB_ENABLED_BIT in U-Boot."""
_FUSES: Final = "imx-ocotp*/nvmem"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One entry of /proc/crypto, without the fields that no check needs."""

    name: str
    driver: str
    priority: int
    selftest: str
    """`passed`; with any other word the kernel does not use it."""


def algorithms(proc_crypto: str) -> list[Algorithm]:
    """Parse the kernel's algorithms. Source: c_show in crypto/proc.c."""
    found = []
    for entry in proc_crypto.split("\n\n"):
        fields = {
            key.strip(): value.strip()
            for key, colon, value in (line.partition(":") for line in entry.splitlines())
            if colon
        }
        if "name" not in fields:
            continue
        priority = fields.get("priority", "")
        found.append(
            Algorithm(
                name=fields["name"],
                driver=fields.get("driver", ""),
                priority=int(priority) if priority.lstrip("-").isdigit() else 0,
                selftest=fields.get("selftest", "unknown"),
            )
        )
    return found


def device(board: Board) -> Iterator[Verdict]:
    """Check that the CAAM's device is there and the service may use it."""
    path = board.at(names.CAAM_DEVICE)
    try:
        status = path.stat()
    except FileNotFoundError:
        yield _without_device(board)
        return
    if not stat.S_ISCHR(status.st_mode):
        yield failure(
            f"{names.CAAM_DEVICE} is a file, not a device",
            f"rm {names.CAAM_DEVICE}; a program has written there before the driver was loaded",
        )
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        yield failure(
            f"{names.CAAM_DEVICE} cannot be opened: {error.strerror}",
            "`dmesg | grep -i caam` may say why",
        )
        return
    if is_open_to_service(status, 6):
        yield ok(f"{names.CAAM_DEVICE} is there and opens")
    else:
        yield failure(
            f"{names.CAAM_DEVICE} belongs to user {status.st_uid} with mode "
            f"{stat.S_IMODE(status.st_mode):04o}, and the service has not the right to pass over "
            "modes",
            f"let it belong to root: chown root {names.CAAM_DEVICE}, and mend the udev rule that "
            "changed it",
        )


def _without_device(board: Board) -> Verdict:
    needed = any(rule.key.form == "tagged" for rule in board.config.rule)
    if board.seal_method() == "trusted" and not needed:
        return ok("the kernel has trusted keys; no tagged ones, which only NXP's kernels have")
    return failure(
        f"{names.CAAM_DEVICE} is not there, "
        + ("and a rule asks for it" if needed else "and there are no trusted keys either"),
        "use NXP's kernel (linux-imx) with its keygen driver, or a mainline one with "
        "CONFIG_TRUSTED_KEYS_CAAM; `dmesg | grep -i caam` says whether the CAAM was found",
    )


def job_rings(board: Board) -> Iterator[Verdict]:
    """Check that Linux has at least one of the CAAM's job rings."""
    bound = sorted(file.name for file in board.at(_RING_DRIVER).glob("*") if file.is_symlink())
    bound = [name for name in bound if name != "module"]
    described = list(_ring_nodes(board.at(_DEVICE_TREE)))
    disabled = [node.name for node in described if _property(node, "status") == "disabled"]
    kept = f"; kept from Linux: {', '.join(sorted(disabled))}" if disabled else ""
    if bound:
        yield ok(f"Linux has {len(bound)}: {', '.join(bound)}{kept}")
    elif described:
        yield failure(
            f"the device tree has {len(described)}, and Linux drives none of them{kept}",
            "leave Linux one: OP-TEE and the boot loader take rings for themselves (CFG_NXP_CAAM); "
            "check CONFIG_CRYPTO_DEV_FSL_CAAM_JR and `dmesg | grep -i caam_jr`",
        )
    else:
        yield unknown("the device tree has no CAAM; this is no i.MX board, or an emulated one")


def _ring_nodes(tree: Path) -> Iterator[Path]:
    for file in tree.glob("**/jr*/compatible"):
        if _JOB_RING in file.read_text(errors="replace"):
            yield file.parent


def _property(node: Path, name: str) -> str:
    try:
        return (node / name).read_text(errors="replace").rstrip("\0")
    except OSError:
        return ""


def security_state(board: Board) -> Iterator[Verdict]:
    """Check that the part is closed, without which the blobs protect nothing."""
    how_to_tell = "ask U-Boot: `hab_status` says closed (HAB Configuration 0xcc) or open (0xf0)"
    compatible = _property(board.at(_DEVICE_TREE), "compatible").split("\0")
    fuse = next(
        (at for soc, at in _SEC_CONFIG.items() if any(name.startswith(soc) for name in compatible)),
        None,
    )
    if fuse is None:
        yield unknown("cannot be read: no i.MX whose fuses are known here", how_to_tell)
        return
    word, bit = fuse
    try:
        file = next(board.at("/sys/bus/nvmem/devices").glob(_FUSES))
        with file.open("rb") as fuses:
            fuses.seek(4 * word)
            (value,) = struct.unpack("<I", fuses.read(4))
    except (StopIteration, OSError, struct.error):
        yield unknown("cannot be read: the kernel does not show the fuses", how_to_tell)
        return
    if value & bit:
        yield ok("the part is closed (fuse SEC_CONFIG): its blobs are bound to this chip")
    else:
        yield warning(
            "the part is open (fuse SEC_CONFIG): every open part opens its blobs",
            "close the part before it leaves the house, then make keys and media anew: blobs of an "
            "open part are void on a closed one",
        )


def of_the_caam(board: Board) -> Iterator[Verdict]:
    """Check that the CAAM's algorithms are registered and have passed their self-tests."""
    found = [a for a in algorithms(board.text("/proc/crypto") or "") if "caam" in a.driver]
    untested = [a for a in found if a.selftest != "passed"]
    if not found and board.seal_method() == "trusted":
        yield ok("the kernel has none of the CAAM; the ciphers of trusted keys need none")
    elif not found:
        yield failure(
            "the kernel has none of the CAAM",
            "see the lines of the CAAM's device and job rings; build with "
            "CONFIG_CRYPTO_DEV_FSL_CAAM_CRYPTO_API",
        )
    elif untested:
        named = ", ".join(f"{a.name} ({a.driver})" for a in untested)
        yield failure(
            f"{len(untested)} of {len(found)} have not passed their self-tests: {named}",
            "`dmesg | grep alg:` says which test failed; a kernel update may mend it",
        )
    else:
        yield ok(f"{len(found)} are registered, and all have passed their self-tests")


def ciphers(board: Board) -> Iterator[Verdict]:
    """Check that every cipher that a rule names is there and has passed its self-test."""
    here = board.seal_method() or "tagged"
    kinds = [(rule.crypt, KEY_TYPES[rule.key.form or here]) for rule in board.config.rule]
    for cipher in dict.fromkeys(cipher_for(crypt, kind) for crypt, kind in kinds):
        name = api_name(cipher)
        refused = _load(name)
        found = [a for a in algorithms(board.text("/proc/crypto") or "") if a.name == name]
        best = max(found, key=lambda a: a.priority, default=None)
        if best is None and (name.startswith("tk(") or refused == errno.ENOENT):
            yield failure(
                f"{name} is not there; rules need it for {cipher}",
                "tagged keys are CONFIG_CRYPTO_DEV_FSL_CAAM_TK_API in NXP's kernels"
                if name.startswith("tk(")
                else "load or build the kernel's module for it, or mend the rule's `cipher`",
            )
        elif best is None:
            yield unknown(f"{name} is not loaded, and whether it can be is seen at its first use")
        elif best.selftest != "passed":
            yield failure(
                f"{name} ({best.driver}) has not passed its self-test",
                "`dmesg | grep alg:` says what failed",
            )
        else:
            yield ok(f"{name} by {best.driver}, self-test passed")


_CAPI: Final = re.compile(r"capi:(?P<api>.+)-[a-z0-9]+(:[^()]*)?")


def api_name(cipher: str) -> str:
    """Return the crypto API's name of the cipher that dm-crypt spells so (dm-crypt.rst)."""
    capi = _CAPI.fullmatch(cipher)
    if capi is not None:
        return capi["api"]
    name, _, rest = cipher.partition("-")
    mode = rest.partition("-")[0] or "cbc"
    return f"{mode}({name.partition(':')[0]})"


def _load(name: str) -> int:
    """Have the kernel load what it has for the name; return 0 or the error number."""
    try:
        with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as transform:
            transform.bind(("skcipher", name))
    except OSError as error:
        return error.errno or errno.EIO
    return 0

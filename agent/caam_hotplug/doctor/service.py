"""Checks of the agent itself: configuration, blobs, service."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.config import loader
from caam_hotplug.config.rules import KeySource, mount_folders
from caam_hotplug.doctor import systemd
from caam_hotplug.doctor.board import NOT_HARMLESS, Board, is_harmless, is_open_to_service
from caam_hotplug.doctor.result import Verdict, failure, ok, unknown, warning
from caam_hotplug.errors import (
    BlobError,
    BlobRejectedError,
    CaamError,
    ConfigError,
    KeyringError,
    MasterKeyError,
    UnsafePathError,
    shown,
)
from caam_hotplug.formats.blobs import Blob, Tagged
from caam_hotplug.kernel import blob_files, config_files, keyring, paths
from caam_hotplug.kernel.linux import LinuxKernel
from caam_hotplug.keys import backends

_ANY_LENGTH: Final = 64
"""Length for a trusted key whose blob does not have it: no table needs it here."""
_BLOB: Final = ".bb"


def configuration(board: Board) -> Iterator[Verdict]:
    """Check that the configuration is valid, and that nobody but root could have written it."""
    try:
        loaded = loader.load(
            board.config_file, config_files.RootsFiles(), required=board.config_required
        )
    except ConfigError as error:
        for fault in error.faults:
            yield failure(
                f"the agent does not start with it: {fault}",
                f"mend it, then caam-hotplug check {shown(board.config_file)}",
            )
        return
    rules = ", ".join(rule.name for rule in loaded.rule) or "none, so no medium is served"
    if board.config_file.exists():
        yield ok(f"{shown(board.config_file)} is valid and root's; rules: {rules}")
    else:
        yield ok(f"{shown(board.config_file)} is not there, so the defaults hold; rules: {rules}")


def blob_directory(board: Board) -> Iterator[Verdict]:
    """Check that the directory is there, root's as all above it, and closed to others."""
    folder = board.config.blob_directory
    try:
        with paths.directory(board.at(folder)) as opened:
            status = os.fstat(opened)
    except FileNotFoundError:
        yield failure(f"{folder} is not there", f"install -d -m 0700 -o root -g root {folder}")
        return
    except UnsafePathError as error:
        yield failure(f"the agent refuses it: {error}", error.remedy)
        return
    mode = stat.S_IMODE(status.st_mode)
    if not is_open_to_service(status, 5):
        yield failure(
            f"{folder} has mode {mode:04o}, and the service cannot read it",
            f"chown root:root {folder}; chmod 0700 {folder}",
        )
    elif mode & 0o077:
        yield warning(
            f"{folder} has mode {mode:04o}; others can read the blobs, which on an open part, or "
            "with the use of this CAAM, open the media",
            f"chmod 0700 {folder}",
        )
    else:
        yield ok(f"{folder} is there, and root's alone")


def mount_root(board: Board) -> Iterator[Verdict]:
    """Check that nobody but root can lead mount points elsewhere."""
    folder = board.config.mount_root
    try:
        with paths.directory(board.at(folder)):
            yield ok(f"{folder} is there, and nobody but root can change it")
    except FileNotFoundError:
        yield ok(f"{folder} is not there yet; the agent makes it with the first mount")
    except UnsafePathError as error:
        yield failure(f"the agent refuses it: {error}", error.remedy)
    for above in mount_folders(board.config.rule):
        yield _above_path(board, above)


def _above_path(board: Board, folder: Path) -> Verdict:
    """Return whether a rule's path may have its mount point in the directory."""
    try:
        with paths.directory(board.at(folder), only_root=True):
            return ok(f"{folder}, for a rule's path, is there, and root's alone")
    except FileNotFoundError:
        why = "which no rule's path is mounted in before it is there"
        return warning(f"{folder} is not there, {why}", f"mkdir -p {folder}")
    except UnsafePathError as error:
        return failure(f"a rule's path is refused: {error}", error.remedy)


def blobs(board: Board) -> Iterator[Verdict]:
    """Check that every blob is valid, that the service may read it, and this board takes it."""
    folder = board.at(board.config.blob_directory)
    try:
        found = sorted(file.name for file in folder.iterdir() if file.name.endswith(_BLOB))
    except OSError as error:
        yield unknown(f"the directory cannot be read: {error.strerror}")
        return
    if not found:
        yield warning(
            f"{folder} has none, so every medium waits",
            "make a medium and its key: `caam-hotplug provision --help`",
        )
        return
    has_caam = board.seal_method() is not None
    keyring.join_session_keyring()
    faulty = 0
    for name in found:
        verdict = _fault(board, name, tried=has_caam)
        if verdict is not None:
            faulty += 1
            yield verdict
    if faulty < len(found):
        fine = "have the form of one and are taken by this board" if has_caam else (
            "have the form of one; whether this CAAM takes them was not tried, for want of it"
        )  # fmt: skip
        yield ok(f"{len(found) - faulty} of {len(found)} in {folder} {fine}")


def _fault(board: Board, name: str, *, tried: bool) -> Verdict | None:
    """Return what is wrong with a blob: its file, or, if `tried`, that this board refuses it."""
    folder = board.at(board.config.blob_directory)
    try:
        blob = _read(board, folder, name)
    except UnsafePathError:
        return unknown(f"{shown(name)} was not read: the directory is refused")
    except BlobError as error:
        return failure(
            f"{shown(name)}: {shown(error)}", "put a copy of the blob in its place, from a backup"
        )
    if not is_open_to_service((folder / name).lstat(), 4):
        return failure(
            f"{shown(name)} cannot be read by the service",
            f"chown root:root {folder / name}; chmod 0600 {folder / name}",
        )
    return _refusal(board, name, blob) if tried else None


def _read(board: Board, folder: Path, name: str) -> Blob:
    """Read the blob; as a raw one if a rule takes such. Raises: BlobError."""
    try:
        return blob_files.read(folder, name)
    except BlobError:
        if all(rule.key.form != "trusted" for rule in board.config.rule):
            raise
        return blob_files.read(folder, name, "trusted")


def _refusal(board: Board, name: str, blob: Blob) -> Verdict | None:
    """Load the blob's key and unlink it at once; return why this board refuses it."""
    options = "" if isinstance(blob, Tagged) else board.trust_options()
    if options is None:
        return unknown(f"{name} was not tried: rules have different options for its trust source")
    if not is_harmless(options):
        return unknown(f"{name} was not tried: {NOT_HARMLESS}")
    host = LinuxKernel(board.at(board.config.blob_directory), board.config.mount_root)
    description = f"{names.DOCTOR.key}{os.getpid()}"
    try:
        backends.load(host, blob, KeySource(length=_ANY_LENGTH, options=options), description)
        keyring.unlink_key(description)
    except (BlobRejectedError, MasterKeyError) as error:
        return failure(
            f"{shown(name)}: {error}",
            "put back a backup of it; a blob of another board, or of this one before it was "
            "closed, is void here, and only a recovery key opens such a medium",
        )
    except (CaamError, KeyringError) as error:
        return failure(f"{shown(name)}: {error}", "see the lines of the CAAM")
    return None


def service(board: Board) -> Iterator[Verdict]:
    """Check that the unit is installed, starts at boot, and runs."""
    logs = f"journalctl -u {names.PROGRAM} -e says why"
    try:
        unit = systemd.unit(names.SERVICE_UNIT, board.at(systemd.SOCKET))
    except OSError as error:
        yield unknown(f"systemd does not answer ({error.strerror}); is it another init here?")
        return
    state = f"{unit.active_state} ({unit.sub_state})"
    if unit.load_state != "loaded":
        yield failure(
            f"{names.SERVICE_UNIT} is {unit.load_state}",
            f"install the unit, or systemctl unmask {names.PROGRAM}; then systemctl daemon-reload",
        )
    elif unit.active_state == "failed" or unit.sub_state == "auto-restart":
        yield failure(f"{names.SERVICE_UNIT} has failed: {state}", logs)
    elif unit.active_state != "active":
        yield warning(
            f"{names.SERVICE_UNIT} does not run: {state}",
            f"systemctl enable --now {names.PROGRAM}; {logs}",
        )
    elif unit.file_state != "enabled":
        yield warning(
            f"{names.SERVICE_UNIT} runs, but is {unit.file_state}: not started at boot",
            f"systemctl enable {names.PROGRAM}",
        )
    else:
        yield ok(f"{names.SERVICE_UNIT} is {state}, process {unit.main_pid}, and starts at boot")


def sockets(board: Board) -> Iterator[Verdict]:
    """Check that the sockets for events and for holders are installed, and open at need."""
    try:
        unit = systemd.unit(names.SOCKET_UNIT, board.at(systemd.SOCKET))
        holders = systemd.unit(names.HOLDERS_UNIT, board.at(systemd.SOCKET))
        runs = systemd.unit(names.SERVICE_UNIT, board.at(systemd.SOCKET)).active_state == "active"
    except OSError as error:
        yield unknown(f"systemd does not answer ({error.strerror}); is it another init here?")
        return
    install = "install it beside the service's unit, then systemctl daemon-reload"
    fine = True
    if unit.load_state != "loaded":
        fine = False
        yield failure(
            f"{names.SOCKET_UNIT} is {unit.load_state}; the service cannot start without it",
            install,
        )
    elif runs and unit.active_state != "active":
        fine = False
        yield failure(
            f"{names.SOCKET_UNIT} is {unit.active_state} while the service runs: no events come in",
            f"systemctl restart {names.PROGRAM}",
        )
    unasked = "nobody says who uses a busy medium"
    if holders.load_state != "loaded":
        fine = False
        yield warning(f"{names.HOLDERS_UNIT} is {holders.load_state}; {unasked}", install)
    elif runs and holders.active_state != "active":
        fine = False
        yield warning(
            f"{names.HOLDERS_UNIT} is {holders.active_state} while the service runs; {unasked}",
            f"systemctl start {names.HOLDERS_UNIT}",
        )
    if fine:
        yield ok(
            f"{names.SOCKET_UNIT} is {unit.active_state}, {names.HOLDERS_UNIT} is "
            f"{holders.active_state}"
        )

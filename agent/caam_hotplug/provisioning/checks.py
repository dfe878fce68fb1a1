"""Checks of root, kernel, options and filesystem, for both commands. Nothing is changed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import Rule
from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.formats import blobs, crypt_table, recovery_files
from caam_hotplug.kernel import (
    blkid,
    disks,
    gpt,
    keyring,
    memory,
    mkfs,
    mount,
    mountinfo,
    paths,
    sysfs,
)
from caam_hotplug.keys import backends
from caam_hotplug.model import SECTOR_BYTES, DevType, Mapping, Volume
from caam_hotplug.names import why_unsafe
from caam_hotplug.provisioning.options import MigrateOptions, ProvisionOptions

_MIB: Final = (1 << 20) // SECTOR_BYTES


def prepare(operation: str) -> None:
    """Check root, kernel and libfdisk, and keep this process's keys from others.

    Raises: HotplugError; KernelError; KeyringError.
    """
    if os.geteuid() != 0:
        raise HotplugError(f"{operation}: it needs to be root; use sudo")
    sysfs.require_diskseq()
    gpt.require_library()
    memory.refuse_core_dumps()
    keyring.join_session_keyring()
    os.umask(0o022)


def require_not_protected(operation: str, medium: Volume) -> None:
    """Check that the disk or the partition can be written to. Raises: HotplugError."""
    if medium.read_only:
        raise HotplugError(f"{operation}: the medium is write-protected")


def require_provisionable(options: ProvisionOptions, config: Config, disk: Volume) -> None:
    """Check options and disk, or partition, without reading the medium. Raises: HotplugError."""
    operation = f"provision {disk.node}"
    if options.erase is not None and options.erase != disk.name:
        raise HotplugError(
            f"{operation}: --erase names {shown(options.erase)}, and this is {disk.name}; nothing "
            "was erased"
        )
    require_not_protected(operation, disk)
    if options.recovery_file is not None:
        _require_recoverable(options, options.recovery_file, operation)
    crypt_table.crypt_target(disk, options.rule.crypt, options.key)  # whether its IVs would repeat
    table = 2 * _MIB if disk.devtype is DevType.DISK else 0
    least = mkfs.least(options.filesystem) + table
    if disk.size < least:
        raise HotplugError(f"{operation}: {options.filesystem} needs {least // _MIB} MiB at least")
    with suppress(FileNotFoundError), paths.directory(config.blob_directory):
        pass
    mkfs.program(options.filesystem)


def _require_recoverable(options: ProvisionOptions, file: Path, operation: str) -> None:
    """Check that a recovery file can have the medium's key. Raises: HotplugError."""
    backends.BACKENDS[options.method.backend].require_given()
    _require_text(file)
    is_tagged, cipher = options.method.backend == "tagged", options.cipher
    if recovery_files.plain_cipher(cipher) is None or (
        is_tagged and not cipher.startswith("capi:tk(")
    ):
        raise HotplugError(
            f"{operation}: a recovery key opens media of tagged keys, such as "
            f"capi:tk(cbc(aes))-plain, or of Linux's own ciphers, not {cipher} "
            f"with {blobs.key_of(options.method.backend)}"
        )


def _require_text(file: Path) -> None:
    """Check that the recovery file can have its own name in it. Raises: HotplugError."""
    if not file.name.isprintable():
        raise HotplugError(
            f"write {shown(file)}: the file says its own name, and this one is no text; choose "
            "another"
        )


def require_lasting(directory: Path) -> None:
    """Check that a journal in the directory outlives a power cut. Raises: HotplugError."""
    why = mountinfo.why_volatile(directory)
    if why is not None:
        raise HotplugError(
            f"write the journal to {shown(directory)}: {why}, and a power cut would take it away; "
            "the blob directory must be on a disk: mount one there"
        )


def require_migratable(
    options: MigrateOptions, rule: Rule, disk: Volume, start_bytes: int, label: str
) -> None:
    """Check options and rule, without reading the medium's content. Raises: HotplugError.

    `start_bytes`: where the encrypted data begins on the disk.
    """
    operation = f"migrate {shown(label)}"
    require_not_protected(operation, disk)
    _require_rule_opens(options, rule, operation)
    unit = max(disks.logical_block(disk), rule.crypt.sector_size)
    if start_bytes % unit:
        raise HotplugError(
            f"{operation}: its encrypted data begins at byte {start_bytes} of the disk, which is "
            f"no multiple of {unit}: a power cut could tear what was not being written"
        )
    if options.recovery_file is not None:
        _require_recoverable_by(options, rule, options.recovery_file, label)


def _require_rule_opens(options: MigrateOptions, rule: Rule, operation: str) -> None:
    """Check that the rule opens the medium with its new key. Raises: HotplugError."""
    after = options.method.backend
    if "{" not in rule.key.blob.text:
        raise HotplugError(
            f"{operation}: rule {rule.name!r} opens all its media with {rule.key.blob.text}, and "
            "only one of them would have the new key; give each a blob of its own first"
        )
    cipher = crypt_table.cipher_for(rule.crypt, blobs.KEY_TYPES[after])
    if rule.key.form not in {None, after} or cipher.startswith("capi:tk(") != (after == "tagged"):
        raise HotplugError(
            f"{operation}: rule {rule.name!r} would not open it with {blobs.key_of(after)}; let it "
            'say backend = "auto" and cipher = "auto", so that media of both kinds are opened'
        )
    if after == "trusted" and rule.key.length not in {0, options.key_bytes}:
        raise HotplugError(
            f"{operation}: rule {rule.name!r} says that a trusted key has {rule.key.length} "
            f"bytes; say --key-bytes {rule.key.length}"
        )


def _require_recoverable_by(options: MigrateOptions, rule: Rule, file: Path, label: str) -> None:
    """Check that a recovery file can have the new key, and the rule. Raises: HotplugError."""
    backends.BACKENDS[options.method.backend].require_given()
    _require_text(file)
    why = why_unsafe(label)
    if why is not None:
        raise HotplugError(f"write {shown(file)}: its medium's label cannot be in it: {why}")
    crypt = rule.crypt
    cipher = crypt_table.cipher_for(crypt, blobs.KEY_TYPES[options.method.backend])
    is_moved = crypt.offset or crypt.iv_offset or "iv_large_sectors" in crypt.flags
    if is_moved or recovery_files.plain_cipher(cipher) is None:
        raise HotplugError(
            f"write {shown(file)}: a recovery file knows no offset, iv_offset or iv_large_sectors, "
            f"nor any cipher but Linux's own and their like, and rule {rule.name!r} does"
        )


def require_filesystem(mapping: Mapping, rule: Rule, through: str) -> str:
    """Return the mapping's filesystem. Raises: HotplugError, MountError if there is none.

    Then key or settings are not the medium's. A probe reads little, and the kernel more: so the
    kernel reads the filesystem, too.
    """
    found = blkid.probe(mapping.node, rule.mount.filesystems)
    if found is None:
        raise HotplugError(
            f"{through} it has no filesystem that rule {rule.name!r} allows, so nothing more is "
            "written to it"
        )
    mount.require_readable(mapping.node, found)
    return found

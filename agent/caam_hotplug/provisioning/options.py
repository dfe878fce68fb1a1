"""Options of the commands that provision and migrate media."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from caam_hotplug import names
from caam_hotplug.config.rules import Rule
from caam_hotplug.formats import blobs, crypt_table, recovery_files
from caam_hotplug.keys.backends import SealMethod
from caam_hotplug.model import KeyReference

Progress = Callable[[str], None]
"""Called with the name of each step that begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionOptions:
    """The medium that `provision` is to make, and the disk for it."""

    device: str
    rule: Rule
    """The rule for the medium, whether or not it is written. Its name is the medium's label."""
    rule_text: str = field(repr=False)  # the options in it may be a password
    key_bytes: int
    method: SealMethod
    recovery_file: Path | None = None
    """The recovery file to write."""
    rule_file: Path | None = None
    """The drop-in to write."""
    config_file: Path = names.CONFIG_FILE
    """The configuration that the drop-in belongs to."""
    erase: str | None = None
    """The kernel's name of the disk whose content may be lost."""

    @property
    def label(self) -> str:
        """The partition's label, and the blob's name without its ending."""
        return self.rule.name

    @property
    def blob_name(self) -> str:
        """The name of the blob's file."""
        return f"{self.label}.bb"

    @property
    def filesystem(self) -> str:
        """The filesystem to make."""
        return self.rule.mount.filesystems[0]

    @property
    def key(self) -> KeyReference:
        """The key as a table refers to it. The length is that of the plain key."""
        return KeyReference(blobs.KEY_TYPES[self.method.backend], self.key_bytes)

    @property
    def cipher(self) -> str:
        """The cipher that encrypts the medium."""
        return crypt_table.cipher_for(self.rule.crypt, self.key.type)

    @property
    def settings(self) -> str:
        """How the filesystem is made, as options."""
        size = self.rule.crypt.sector_size
        return f"--fs {self.filesystem} --cipher {self.cipher} --sector-size {size}"

    def about(self, identifier: str) -> recovery_files.About:
        """Describe the medium, as in the recovery file with this identifier."""
        crypt = self.rule.crypt
        return recovery_files.About(
            self.label, self.cipher, crypt.sector_size, self.filesystem, identifier
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateOptions:
    """The medium that `migrate` is to move to a new key, and how to seal that key."""

    volume: str
    """The partition's label, or its device node."""
    method: SealMethod
    """Without the options of a trust source, which come from the medium's rule."""
    key_bytes: int
    recovery_file: Path | None = None
    """The recovery file to write for the new key."""

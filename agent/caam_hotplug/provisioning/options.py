"""What is to be made of which medium, whether that makes sense, and the rule that opens it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

from caam_hotplug import names
from caam_hotplug.config.loader import Config, load
from caam_hotplug.config.rules import BUILT_IN, NoMatch, Plan, Rule, match_rules
from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.formats import blobs, crypt_table, recovery_files
from caam_hotplug.kernel import atomic_files, blob_files, config_files, mkfs, paths, udev
from caam_hotplug.keys import sealing
from caam_hotplug.model import SECTOR_BYTES, DevType, KeyReference, Volume, VolumeId

LINUX_DATA: Final = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
"""The partition type of a medium that is made."""

_MIB: Final = (1 << 20) // SECTOR_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be made of which medium."""

    device: str
    rule: Rule
    """The drop-in's rule, whether or not it is to be written: its name is the medium's label."""
    rule_text: str
    key_bytes: int
    method: sealing.SealMethod
    recovery_file: Path | None = None
    """Where the recovery file is to be."""
    rule_file: Path | None = None
    """Where the drop-in is to be."""
    config_file: Path = names.CONFIG_FILE
    """The configuration that the drop-in is read with."""
    erase: str | None = None
    """The kernel's name of the disk whose content may be lost."""

    @property
    def label(self) -> str:
        """The partition's label, and the blob's name without its ending."""
        return self.rule.name

    @property
    def filesystem(self) -> str:
        """The one that is made."""
        return self.rule.mount.filesystems[0]

    @property
    def key(self) -> KeyReference:
        """The key as a table refers to it, but for the length, which is that of the plain key."""
        return KeyReference(blobs.KEY_TYPES[self.method.backend], self.key_bytes)

    @property
    def cipher(self) -> str:
        """How the medium is encrypted."""
        return crypt_table.cipher_for(self.rule.crypt, self.key.type)

    def about(self, identifier: str) -> recovery_files.About:
        """What the recovery file of this identifier says of the medium."""
        crypt = self.rule.crypt
        return recovery_files.About(
            self.label, self.cipher, crypt.sector_size, self.filesystem, identifier
        )


def require_sense(wish: Wish, config: Config, disk: Volume) -> None:
    """Raises: HotplugError for what can be told without a look at what the medium holds."""
    what = f"provision {disk.node}"
    if wish.erase is not None and wish.erase != disk.name:
        raise HotplugError(
            f"{what}: --erase names {shown(wish.erase)}, and this is {disk.name}; nothing was "
            "erased"
        )
    if disk.read_only:
        raise HotplugError(f"{what}: the medium is write-protected")
    if wish.recovery_file is not None:
        sealing.require_given(wish.method)
        if not wish.recovery_file.name.isprintable():
            raise HotplugError(
                f"write {shown(wish.recovery_file)}: the file says its own name, and this one is "
                "no text; choose another"
            )
    of_the_caam = wish.cipher.startswith("capi:tk(")
    if wish.recovery_file is not None and (
        recovery_files.plain_cipher(wish.cipher) is None
        or (wish.method.backend == "tagged" and not of_the_caam)
    ):
        raise HotplugError(
            f"{what}: a recovery key opens media of tagged keys, such as "
            f"capi:tk(cbc(aes))-plain, or of Linux's own ciphers, not {wish.cipher} "
            f"with a {wish.method.backend} key"
        )
    crypt_table.crypt_target(disk, wish.rule.crypt, wish.key)  # whether its IVs would repeat
    least = mkfs.least(wish.filesystem) + 2 * _MIB
    if disk.size < least:
        raise HotplugError(f"{what}: {wish.filesystem} needs {least // _MIB} MiB at least")
    with suppress(FileNotFoundError), paths.directory(config.blob_directory):
        pass
    if wish.rule_file is not None:
        _require_rule_writable(wish, config)
    mkfs.program(wish.filesystem)


def _require_rule_writable(wish: Wish, config: Config) -> None:
    """Raises: HotplugError if the drop-in is another already, or its name is taken."""
    if _has_rule(wish) or wish.rule_file is None:
        return
    if any(rule.name == wish.label for rule in config.rule):
        raise HotplugError(
            f"write {shown(wish.rule_file)}: there is a rule {wish.label!r} already; change that "
            "one, and leave out --rule"
        )


def _has_rule(wish: Wish) -> bool:
    """Whether the very drop-in is there. Raises: HotplugError if it is another."""
    if wish.rule_file is None:
        return False
    try:
        found = config_files.RootsFiles().read(wish.rule_file)
    except FileNotFoundError:
        return False
    if found != wish.rule_text.encode():
        raise HotplugError(
            f"write {shown(wish.rule_file)}: it exists and says something else; it is not "
            "overwritten"
        )
    return True


def write_rule(wish: Wish, config: Config) -> Iterator[str]:
    """The drop-in is there if it was wished for, and what it changes is said."""
    if wish.rule_file is None:
        return
    if not _has_rule(wish):
        with atomic_files.folder(wish.rule_file.parent, mode=0o755, only_root=True) as opened:
            mode = 0o600 if wish.method.options else 0o644  # one of them may be a password
            atomic_files.write(opened, wish.rule_file, wish.rule_text.encode(), mode)
    yield f"the rule is in {shown(wish.rule_file)}"
    if config.rule is BUILT_IN:
        yield (
            "it is the first rule of this board, so the built-in one no longer applies: other "
            "media need rules of their own"
        )


def require_rule_decides(wish: Wish, config: Config, disk: Volume) -> None:
    """Raises: HotplugError if the drop-in that is wished for would not open the medium.

    Another rule may be asked before it: drop-ins are asked in the order of their names.
    """
    if wish.rule_file is None:
        return
    rules = load(wish.config_file, _WithDropIn(wish.rule_file, wish.rule_text), required=False).rule
    match match_rules(rules, _partition_of(wish, config, disk)):
        case Plan(rule=rule, blob=blob):
            differs = _differences(wish, rule, blob)
            why = f"would not open the medium, which has another {' and another '.join(differs)}"
        case NoMatch(reasons=((name, matches),)) if name:
            rule, differs, why = next(r for r in rules if r.name == name), [name], matches
        case _:  # udev keeps the agent off the disk, whatever a rule says
            return
    if differs:
        raise HotplugError(
            f"write {shown(wish.rule_file)}: rule {rule.name!r} is asked before it and {why}; "
            "narrow that rule, or put it into a drop-in whose name sorts after this one"
        )


class _WithDropIn:
    """The configuration's files as they will be with the drop-in among them."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._text = text
        self._there = config_files.RootsFiles()

    def read(self, file: Path) -> bytes:
        return self._text.encode() if file == self._file else self._there.read(file)

    def names(self, folder: Path) -> list[str]:
        found = self._there.names(folder)
        return [*{*found, self._file.name}] if folder == self._file.parent else found


def advice(wish: Wish, config: Config, disk: Volume) -> Iterator[str]:
    """What to do if the rules that are in force will not open the medium."""
    if wish.rule_file is not None:
        return
    remedy = "the same command with --rule writes one that does"
    match match_rules(config.rule, _partition_of(wish, config, disk)):
        case Plan(rule=rule, blob=blob):
            made = blob_files.read(config.blob_directory, f"{wish.label}.bb", wish.method.backend)
            differs = _differences(wish, rule, blob, made)
            if differs:
                yield (
                    f"rule {rule.name!r} will not open it: the medium has another "
                    f"{' and another '.join(differs)}; {remedy}"
                )
        case refused:
            yield f"no rule matches it ({refused}); {remedy}"


def _differences(wish: Wish, rule: Rule, blob: str, made: blobs.Blob | None = None) -> list[str]:
    """In which of its keys the rule is not one for the medium, whose blob may be made already."""
    return [
        *(["backend"] if rule.key.form not in {None, wish.method.backend} else []),
        *(["key.length"] if not _has_length(wish, rule, made) else []),
        *(["key.options"] if _needed(rule.key.options) != _needed(wish.method.options) else []),
        *(["cipher"] if crypt_table.cipher_for(rule.crypt, wish.key.type) != wish.cipher else []),
        *(["sector_size"] if rule.crypt.sector_size != wish.rule.crypt.sector_size else []),
        *(["offset"] if rule.crypt.offset else []),
        *(["iv_offset"] if rule.crypt.iv_offset else []),
        *(["filesystems"] if wish.filesystem not in rule.mount.filesystems else []),
        *(["blob"] if blob != f"{wish.label}.bb" else []),
    ]


def _has_length(wish: Wish, rule: Rule, made: blobs.Blob | None) -> bool:
    """Whether the rule says the key's length, or need not: the CAAM's blobs tell it.

    Before there is a blob, a source that needs no options passes for the CAAM.
    """
    if wish.method.backend != "trusted" or rule.key.length == wish.key_bytes:
        return True
    told = wish.key_bytes if made is None else made.key_bytes
    return not rule.key.length and not wish.method.options and told == wish.key_bytes


def _needed(options: str) -> set[str]:
    """What is needed to open a blob again; that a TPM has sealed names its key's handle itself."""
    return {option for option in options.split() if not option.startswith("keyhandle=")}


def _partition_of(wish: Wish, config: Config, disk: Volume) -> Volume:
    """The partition as the agent will see it."""
    return replace(
        _as_udev_has_it(disk, config),
        id=VolumeId(disk.id.diskseq, 1),
        devtype=DevType.PARTITION,
        partlabel=wish.label,
        parttype=str(LINUX_DATA),
    )


def _as_udev_has_it(disk: Volume, config: Config) -> Volume:
    """The disk with what udev knows of it, such as its socket."""
    source = udev.default_source() if config.source == "auto" else config.source
    with closing(udev.Devices(source)) as devices:
        return devices.volume(disk.node)

"""The drop-in with a medium's rule: its text, whether it would decide, and writing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.config import loader
from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import BUILT_IN, NeedsUdev, NoMatch, Plan, Rule, match_rules
from caam_hotplug.errors import ConfigError, HotplugError, shown
from caam_hotplug.formats import blobs, crypt_table
from caam_hotplug.kernel import atomic_files, config_files, udev
from caam_hotplug.model import DevType, Volume, VolumeId
from caam_hotplug.provisioning.marked_partition import LINUX_DATA
from caam_hotplug.provisioning.options import ProvisionOptions

_TEXT: Final = """\
# Written by `caam-hotplug provision`: how the medium {label} is encrypted.

[[rule]]
name = "{label}"
match = {{ {match} }}

{key}[rule.crypt]
cipher = "{cipher}"
sector_size = {sector_size}

[rule.mount]
{mount}filesystems = ["{filesystem}"]
"""
_FIRST_RULE: Final = (
    "it is the first rule of this board, so the built-in one no longer applies: other media need "
    "rules of their own"
)


def rule_for(
    label: str,
    *,
    backend: blobs.Backend = "tagged",
    key_bytes: int = 0,
    key_options: str = "",
    filesystem: str = "ext4",
    cipher: str = "auto",
    sector_size: int = 512,
    partuuid: str | None = None,
) -> tuple[Rule, str]:
    """Return the rule that opens such a medium, and its drop-in's text.

    `partuuid`: by which the partition is known if its table has no labels.
    Raises: HotplugError for a label or a cipher that no rule takes.
    """
    reason = names.why_unsafe(label)
    if reason is not None:
        raise HotplugError(f"use label {label!a}: {reason}")
    # A text that TOML would have to escape is no cipher either.
    if not cipher.isprintable() or '"' in cipher or "\\" in cipher or not cipher.isascii():
        raise HotplugError(f"use cipher {cipher!a}: expected one such as aes-xts-plain64")
    kind = blobs.KEY_TYPES[backend]
    text = _TEXT.format(
        label=label,
        match=f'partlabel = "{label}"' if partuuid is None else f'partuuid = "{partuuid}"',
        key=_key_table(backend, key_bytes, key_options, "" if partuuid is None else label),
        mount="" if partuuid is None else f'name = "{label}"\n',
        cipher=crypt_table.CIPHERS[kind] if cipher == "auto" else cipher,
        sector_size=sector_size,
        filesystem=filesystem,
    )
    try:
        loaded = loader.load(Path("/", label), _OneFile(text))
    except ConfigError as error:
        raise HotplugError(f"use cipher {cipher!a}: {error.faults[0].problem}") from error
    return loaded.rule[0], text


def _key_table(backend: blobs.Backend, key_bytes: int, options: str, label: str) -> str:
    """Return a rule's table of the key. Not every blob of a trusted key has the key's length.

    `label`: of which the blob has its name if it has it from no template.
    """
    lines = [] if backend == "tagged" else [f'backend = "{backend}"']
    if label:
        lines.append(f'blob = "{label}.bb"')
    if options:
        lines.append(f'options = "{options}"')
    if backend == "trusted" and key_bytes:
        lines.append(f"length = {key_bytes}")
    return "\n".join(["[rule.key]", *lines, "", ""]) if lines else ""


class _OneFile:
    """A configuration of one file with this text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read(self, _file: Path) -> bytes:
        return self._text.encode()

    def names(self, _folder: Path) -> list[str]:
        return []


class _WithDropIn:
    """The configuration's files, and the new drop-in among them."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._text = text
        self._there = config_files.RootsFiles()

    def read(self, file: Path) -> bytes:
        return self._text.encode() if file == self._file else self._there.read(file)

    def names(self, folder: Path) -> list[str]:
        found = self._there.names(folder)
        return [*{*found, self._file.name}] if folder == self._file.parent else found


@dataclass(frozen=True, slots=True)
class RulePlan:
    """How the medium's rule comes into force, or how the rules in force decide."""

    options: ProvisionOptions
    is_written: bool
    """Whether the drop-in was there when the plan was made."""
    notes: tuple[str, ...]
    """What the user is to know about the medium's rule."""

    def step(self) -> str | None:
        """Return the step that writes the drop-in, or None if it is not to be written."""
        file = self.options.rule_file
        return None if file is None or self.is_written else f"write the rule to {shown(file)}"

    def write(self) -> None:
        """Write the drop-in unless it is there now. Raises: HotplugError if another is."""
        options = self.options
        if options.rule_file is None or _is_there(options):
            return
        with atomic_files.folder(options.rule_file.parent, mode=0o755, only_root=True) as opened:
            mode = 0o600 if options.method.options else 0o644  # an option may be a password
            atomic_files.write(opened, options.rule_file, options.rule_text.encode(), mode)


def plan_rule(
    options: ProvisionOptions, config: Config, partition: Volume, blob: blobs.Blob
) -> RulePlan:
    """Read the drop-in, and check that it would decide for the medium.

    `partition`: as the agent will see it. `blob`: the medium's, or one of the same kind.
    Raises: HotplugError if another rule or drop-in is in its way.
    """
    is_written = _is_there(options)
    if options.rule_file is None:
        advice = _advice(options, match_rules(config.rule, partition), blob)
        return RulePlan(options, is_written, tuple(advice))
    _require_decides(options, options.rule_file, partition, blob)
    return RulePlan(options, is_written, (_FIRST_RULE,) if config.rule is BUILT_IN else ())


def require_writable(options: ProvisionOptions, config: Config) -> None:
    """Check that the drop-in is there, or can be. Raises: HotplugError if not."""
    taken = any(rule.name == options.label for rule in config.rule)
    if options.rule_file is not None and not _is_there(options) and taken:
        raise HotplugError(
            f"write {shown(options.rule_file)}: there is a rule {options.label!r} already; change "
            "that one, and leave out --rule"
        )


def _is_there(options: ProvisionOptions) -> bool:
    """Whether exactly this drop-in is there. Raises: HotplugError if another text is there."""
    if options.rule_file is None:
        return False
    try:
        found = config_files.RootsFiles().read(options.rule_file)
    except FileNotFoundError:
        return False
    if found != options.rule_text.encode():
        raise HotplugError(
            f"write {shown(options.rule_file)}: it exists and says something else; it is not "
            "overwritten"
        )
    return True


def _require_decides(
    options: ProvisionOptions, file: Path, partition: Volume, blob: blobs.Blob
) -> None:
    """Check that no other rule decides first and fails. Raises: HotplugError.

    The agent tries drop-ins in the order of their names.
    """
    files = _WithDropIn(file, options.rule_text)
    rules = loader.load(options.config_file, files, required=False).rule
    match match_rules(rules, partition):
        case Plan(rule=rule, blob=name):
            differs = differences(options, rule, name, blob)
            why = f"would not open the medium, which has another {' and another '.join(differs)}"
        case NoMatch(reasons=((name, matches),)) if name:
            rule, differs, why = next(r for r in rules if r.name == name), [name], matches
        case _:  # udev keeps the agent off the disk, whatever the rules
            return
    if differs:
        raise HotplugError(
            f"write {shown(file)}: rule {rule.name!r} is asked before it and {why}; narrow that "
            "rule, or put it into a drop-in whose name sorts after this one"
        )


def _advice(
    options: ProvisionOptions, decision: Plan | NoMatch | NeedsUdev, blob: blobs.Blob
) -> Iterator[str]:
    """Yield the remedy if the rules in force do not open the medium."""
    remedy = "the same command with --rule writes one that does"
    match decision:
        case Plan(rule=rule, blob=name):
            differs = differences(options, rule, name, blob)
            if differs:
                yield (
                    f"rule {rule.name!r} will not open it: the medium has another "
                    f"{' and another '.join(differs)}; {remedy}"
                )
        case no_match:
            yield f"no rule matches it ({no_match}); {remedy}"


def differences(options: ProvisionOptions, rule: Rule, name: str, blob: blobs.Blob) -> list[str]:
    """List the rule's keys that differ from the medium's, whose blob is like `blob`."""
    crypt, key = rule.crypt, rule.key
    cipher = crypt_table.cipher_for(crypt, options.key.type)
    return [
        *(["backend"] if key.form not in {None, options.method.backend} else []),
        *(["key.length"] if not _has_length(options, rule, blob) else []),
        *(["key.options"] if _needed(key.options) != _needed(options.method.options) else []),
        *(["cipher"] if cipher != options.cipher else []),
        *(["sector_size"] if crypt.sector_size != options.rule.crypt.sector_size else []),
        *(["offset"] if crypt.offset else []),
        *(["iv_offset"] if crypt.iv_offset else []),
        *(["filesystems"] if options.filesystem not in rule.mount.filesystems else []),
        *(["blob"] if name != options.blob_name else []),
    ]


def _has_length(options: ProvisionOptions, rule: Rule, blob: blobs.Blob) -> bool:
    """Whether the key's length is in the rule, or need not be: the CAAM's blobs have it.

    The CAAM needs no options. The blob of another source may have such a length by chance.
    """
    if options.method.backend != "trusted" or rule.key.length == options.key_bytes:
        return True
    is_in_blob = not options.method.options and blob.key_bytes == options.key_bytes
    return not rule.key.length and is_in_blob


def _needed(options: str) -> set[str]:
    """Return the options that opening needs. A TPM's blob itself names the handle of its key."""
    return {option for option in options.split() if not option.startswith("keyhandle=")}


def partition_of(options: ProvisionOptions, config: Config, disk: Volume) -> Volume:
    """Describe the partition that fills a disk, as the agent will see it."""
    return replace(
        _known_to_udev(disk, config),
        id=VolumeId(disk.id.diskseq, 1),
        devtype=DevType.PARTITION,
        partlabel=options.label,
        parttype=str(LINUX_DATA),
    )


def _known_to_udev(disk: Volume, config: Config) -> Volume:
    """Describe the disk with the facts that udev knows, such as its socket."""
    source = udev.default_source() if config.source == "auto" else config.source
    with closing(udev.Devices(source)) as devices:
        return devices.volume(disk.node)

"""Which rule admits a volume, under which names, or why none does. Pure: values in, values out."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from fnmatch import fnmatchcase
from typing import ClassVar, Final, Literal

from caam_hotplug import names
from caam_hotplug.formats.blobs import Backend
from caam_hotplug.formats.crypt_table import Crypt
from caam_hotplug.model import SECTOR_BYTES, Bus, DevType, Volume

MountOption = Literal[
    "nosuid",
    "nodev",
    "noexec",
    "nosymfollow",
    "noatime",
    "nodiratime",
    "relatime",
    "strictatime",
]

FilesystemName = Literal["ext4", "xfs", "btrfs", "f2fs", "vfat", "exfat"]


class Action(Enum):
    """How far a rule goes."""

    MOUNT = "mount"
    UNLOCK = "unlock"
    IGNORE = "ignore"


class OnStop(Enum):
    """What a clean stop of the agent does with a volume."""

    LOCK = "lock"
    KEEP = "keep"


class OnBusy(Enum):
    """What becomes of those who use a volume that is to be locked or ejected on request."""

    REFUSE = "refuse"
    """The request is refused, and says who they are."""
    SIGNAL = "signal"
    """They are told to end (SIGTERM), then made to (SIGKILL)."""
    DETACH = "detach"
    """They may finish what they have open; the volume stays in use until then."""


class Bytes(int):
    """A size in bytes, written as a number or as a text such as `64MiB`."""

    UNITS: Final = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

    @classmethod
    def from_text(cls, text: str) -> Bytes:
        """Parse `64MiB`. Raises: ValueError for any other form."""
        digits = text.rstrip(string.ascii_letters)
        unit = text[len(digits) :]
        digits = digits.rstrip(" ")
        is_number = digits.isascii() and digits.isdigit() and len(digits) <= 20
        if not is_number or unit not in cls.UNITS:
            raise ValueError(f"expected a size such as 512MiB or 64GiB, found {text!r}")
        return cls(int(digits) * cls.UNITS[unit])


class UnsafeNameError(ValueError):
    """A value of the medium cannot become part of a path."""


class Template:
    """A file name with places for what identifies a volume, such as `{partlabel}.bb`."""

    _MAX_LENGTH: ClassVar = names.RENDERED_MAX_LENGTH
    FIELDS: Final = ("partlabel", "partuuid", "label", "uuid", "serial", "diskseq", "partn")

    def __init__(self, text: str) -> None:
        """Raises: ValueError if the text has unknown places, or could leave its directory."""
        self.text = text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
        for literal, place, spec, conversion in self._parts:
            self._check(literal)
            if place is not None and (place not in self.FIELDS or spec or conversion):
                known = ", ".join(f"{{{name}}}" for name in self.FIELDS)
                raise ValueError(f"{text!r}: {{{place}}} is not one of {known}")
        if not text or text[0] in ".-":
            raise ValueError(f"{text!r}: a name must not be empty or start with . or -")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def places(self) -> set[str]:
        """Which facts of a volume are part of the name."""
        return {place for _, place, _, _ in self._parts if place is not None}

    def render(self, volume: Volume) -> str:
        """The name for this volume. Raises: UnsafeNameError with the reason."""
        name = "".join(
            literal + ("" if place is None else self._value(place, volume))
            for literal, place, _, _ in self._parts
        )
        if len(name) > self._MAX_LENGTH:
            raise UnsafeNameError(
                f"{self.text!r} becomes {len(name)} characters, more than {self._MAX_LENGTH}"
            )
        return name

    def _check(self, literal: str) -> None:
        """Raises: ValueError for what cannot stand between the places."""
        if "/" in literal:
            raise ValueError(f"{self.text!r} names a path; expected one file name")
        if not names.PLAIN_TEXT.fullmatch(literal):
            raise ValueError(f"{self.text!r}: file names here are made of A-Z a-z 0-9 . _ -")

    def _value(self, place: str, volume: Volume) -> str:
        match place:
            case "diskseq":
                return str(volume.id.diskseq)
            case "partn":
                return str(volume.id.partition)
        value: str | None = getattr(volume, place)
        if value is None:
            raise UnsafeNameError(f"the medium has no {place}")
        reason = names.why_unsafe(value)
        if reason is not None:
            raise UnsafeNameError(f"{place} {value!a} cannot be part of a file name: {reason}")
        return value


class UnitTemplate(Template):
    """The name of a systemd unit, such as `ingest@{partlabel}.service`."""

    _LITERAL: Final = re.compile(r"[A-Za-z0-9:_.@-]*")
    _SUFFIXES: Final = (".service", ".target")
    _MAX_LENGTH: ClassVar = 255

    def __init__(self, text: str) -> None:
        """Raises: ValueError if it cannot become a unit's name."""
        super().__init__(text)
        if not text.endswith(self._SUFFIXES):
            raise ValueError(f"{text!r}: expected a unit whose name ends in .service or .target")

    def _check(self, literal: str) -> None:
        if not self._LITERAL.fullmatch(literal):
            raise ValueError(f"{self.text!r}: unit names here are made of A-Z a-z 0-9 : _ . @ -")

    def _value(self, place: str, volume: Volume) -> str:
        """Escaped, so that `%I` in the unit is the value (systemd-escape(1))."""
        return super()._value(place, volume).replace("-", "\\x2d")


BLOB_OF_LABEL: Final = Template("{partlabel}.bb")
NAME_OF_LABEL: Final = Template("{partlabel}")

Globs = str | tuple[str, ...]
Buses = Bus | tuple[Bus, ...]


ON_THE_TABLE: Final = frozenset({"partlabel", "partuuid", "parttype"})
"""What a look at the partition table tells; of these the kernel's event has a label at most."""
_OF_UDEV: Final = frozenset({"label", "uuid", "serial", "vendor", "model", "path"})


def _unknown_of(volume: Volume) -> frozenset[str]:
    """The facts that nobody has told of the volume yet."""
    if not volume.awaits_udev:
        return frozenset()
    return _OF_UDEV if volume.identified else _OF_UDEV | (ON_THE_TABLE - {"partlabel"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a volume must be. Absent keys ask for nothing; a list means any of."""

    partlabel: Globs | None = None
    partuuid: Globs | None = None
    parttype: Globs | None = None
    label: Globs | None = None
    uuid: Globs | None = None
    serial: Globs | None = None
    vendor: Globs | None = None
    model: Globs | None = None
    path: Globs | None = None
    bus: Buses | None = None
    removable: bool | None = None
    devtype: DevType = DevType.PARTITION
    min_size: Bytes | None = None
    max_size: Bytes | None = None

    def failures(self, volume: Volume) -> Iterator[str]:
        """The conditions that the volume does not meet, in words, in the order of the keys.

        What is not known of it yet fails no condition.
        """
        unknown = _unknown_of(volume)
        for name in _MATCH_KEYS:
            wanted = getattr(self, name)
            if wanted is None or name in unknown:
                continue
            match name:
                case "min_size" | "max_size":
                    size = volume.size * SECTOR_BYTES
                    if size < wanted if name == "min_size" else size > wanted:
                        yield f"{name} is {wanted} bytes, the volume has {size}"
                case "bus":
                    buses = wanted if isinstance(wanted, tuple) else (wanted,)
                    if volume.bus not in buses:
                        listed = ", ".join(bus.value for bus in buses)
                        yield f"bus is {volume.bus.value}, not {listed}"
                case "removable":
                    if volume.removable != wanted:
                        yield f"removable is {_toml(volume.removable)}, not {_toml(wanted)}"
                case "devtype":
                    if volume.devtype is not wanted:
                        yield f"devtype is {volume.devtype.value}, not {wanted.value}"
                case _:
                    yield from _glob_failure(name, getattr(volume, name), wanted)


_MATCH_KEYS: Final = tuple(f.name for f in fields(Match))


def _toml(value: bool) -> str:
    return "true" if value else "false"


def _glob_failure(name: str, value: str | None, wanted: Globs) -> Iterator[str]:
    patterns = (wanted,) if isinstance(wanted, str) else wanted
    listed = ", ".join(repr(pattern) for pattern in patterns)
    if value is None:
        yield f"{name} is not there, so it is not {listed}"
    elif not any(fnmatchcase(value, pattern) for pattern in patterns):
        yield f"{name} is {value!a}, not {listed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """Where the key comes from."""

    backend: Literal["auto", "tagged", "trusted", "encrypted"] = "auto"
    """`tagged`: NXP's /dev/caam-keygen and tagged keys. `trusted`, `encrypted`: the kernel's key
    types of those names. `auto`: whichever has made the blob."""
    blob: Template = BLOB_OF_LABEL
    """The blob's file name in the blob directory."""
    length: int = 0
    """In bytes, of a trusted key whose blob does not tell it, as no CAAM has sealed it; else 0."""
    options: str = ""
    """What a trust source needs beside the blob, such as `keyhandle=0x81000001` of a TPM."""

    @property
    def form(self) -> Backend | None:
        """The form that its blob must have; None for any."""
        return None if self.backend == "auto" else self.backend


_ALWAYS: Final[dict[str, tuple[str, ...]]] = {
    # A superblock may ask for errors=panic; a medium must not bring the machine down.
    "ext4": ("errors=remount-ro",),
    # A medium put back while a program still holds its first insertion has that one's UUID.
    "xfs": ("nouuid",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MountSettings:
    """Where and how the volume is mounted."""

    name: Template = NAME_OF_LABEL
    """The mount point's name in the mount root."""
    filesystems: tuple[FilesystemName, ...] = ("ext4", "xfs", "btrfs", "f2fs", "vfat", "exfat")
    options: tuple[MountOption, ...] = ("nosuid", "nodev", "noexec")
    read_only: bool = False
    filesystem_options: dict[FilesystemName, tuple[str, ...]] = field(default_factory=dict)
    """Added to what the agent always asks for: errors=remount-ro for ext4, nouuid for xfs."""

    def options_for(self, filesystem: str) -> tuple[str, ...]:
        """The filesystem's own options; of two that contradict each other the last one holds."""
        asked = {str(name): options for name, options in self.filesystem_options.items()}
        return _ALWAYS.get(filesystem, ()) + asked.get(filesystem, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: what it admits and what is done then."""

    name: str
    action: Action = Action.MOUNT
    on_stop: OnStop = OnStop.LOCK
    on_busy: OnBusy = OnBusy.REFUSE
    on_mount: UnitTemplate | None = None
    """A unit that is started when the volume is mounted."""
    on_unmount: UnitTemplate | None = None
    """A unit that is started, and waited for, before the volume is unmounted."""
    unit_within_s: float = 30.0
    """How long an unmount waits for it, in seconds."""
    match: Match = Match()
    key: KeySource = KeySource()
    crypt: Crypt = field(default_factory=Crypt)
    mount: MountSettings = field(default_factory=MountSettings)

    def asks_for(self, facts: frozenset[str]) -> bool:
        """Whether it takes one of these facts to tell what the rule makes of a volume."""
        templates = (self.key.blob, self.mount.name, self.on_mount, self.on_unmount)
        places = {place for template in templates if template for place in template.places}
        return any(getattr(self.match, f, None) is not None or f in places for f in facts)


BUILT_IN: Final = (
    Rule(name="built-in", match=Match(bus=(Bus.USB, Bus.MMC), removable=True, partlabel="?*")),
)
"""The common case, for a board without a configuration file."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A rule wants the volume, under these names."""

    rule: Rule
    blob: str
    """File name in the blob directory."""
    mount_name: str
    """Name of the mount point in the mount root; a part of the DM name too."""
    on_mount: str | None = None
    on_unmount: str | None = None

    def makes_the_same(self, other: Plan) -> bool:
        """Whether a volume that is held as the other has it can stay as it is."""
        mine, others = (
            (plan.blob, plan.mount_name, plan.rule.action, plan.rule.crypt, plan.rule.mount)
            for plan in (self, other)
        )
        return mine == others


@dataclass(frozen=True, slots=True)
class NoMatch:
    """No rule wants the volume."""

    reasons: tuple[tuple[str, str], ...]
    """Pairs of a rule's name and its first condition that failed; a name may be empty."""

    def __str__(self) -> str:
        if not self.reasons:
            return "there are no rules"
        return "; ".join(f"{name}: {why}" if name else why for name, why in self.reasons)


@dataclass(frozen=True, slots=True)
class NeedsUdev:
    """It takes what udev has yet to tell."""


def decide(rules: tuple[Rule, ...], volume: Volume) -> Plan | NoMatch | NeedsUdev:
    """The first matching rule with the names it gives, or for each rule why it is not it.

    Undecided only of a volume that awaits udev. Then Admitted holds unless udev contradicts what
    is known already.
    """
    unknown = _unknown_of(volume)
    if volume.opted_out:
        return NoMatch((("", f"udev's property {names.UDEV_OPT_OUT} is 0"),))
    if volume.parttype is not None and volume.parttype.lower() == names.UNFINISHED_TYPE:
        return NoMatch((("", "it is not finished; run the same `provision` or `migrate` again"),))
    reasons: list[tuple[str, str]] = []
    for rule in rules:
        failure = next(rule.match.failures(volume), None)
        if failure is not None:
            reasons.append((rule.name, failure))
            continue
        if rule.asks_for(unknown):
            return NeedsUdev()
        return _made_of(rule, volume)
    return NoMatch(tuple(reasons))


def _made_of(rule: Rule, volume: Volume) -> Plan | NoMatch:
    """What the rule, which matches, makes of the volume."""
    if rule.action is Action.IGNORE:
        return NoMatch(((rule.name, "matches, and its action is ignore"),))
    try:
        return Plan(
            rule,
            rule.key.blob.render(volume),
            rule.mount.name.render(volume),
            None if rule.on_mount is None else rule.on_mount.render(volume),
            None if rule.on_unmount is None else rule.on_unmount.render(volume),
        )
    except UnsafeNameError as error:
        return NoMatch(((rule.name, f"matches, but {error}"),))

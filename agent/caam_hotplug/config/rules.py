"""Which rule matches a volume, under which names, or why none does. Pure: values in, values out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

from caam_hotplug import names
from caam_hotplug.config.match import Match, unknown_facts
from caam_hotplug.config.templates import Template, UnitTemplate, UnsafeNameError
from caam_hotplug.formats.blobs import Backend
from caam_hotplug.formats.crypt_table import Crypt
from caam_hotplug.model import Bus, Volume

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


BLOB_OF_LABEL: Final = Template("{partlabel}.bb")
NAME_OF_LABEL: Final = Template("{partlabel}")


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
    """One rule: what it matches and what is done then."""

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
    match: Match = field(default_factory=Match)
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


def match_rules(rules: tuple[Rule, ...], volume: Volume) -> Plan | NoMatch | NeedsUdev:
    """The first matching rule with the names it gives, or for each rule why it is not it.

    NeedsUdev is returned only for a volume that awaits udev. For such a volume a Plan holds unless
    udev contradicts what is known already.
    """
    unknown = unknown_facts(volume)
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
        return NoMatch(((rule.name, "its action is ignore"),))
    try:
        return Plan(
            rule,
            rule.key.blob.render(volume),
            rule.mount.name.render(volume),
            None if rule.on_mount is None else rule.on_mount.render(volume),
            None if rule.on_unmount is None else rule.on_unmount.render(volume),
        )
    except UnsafeNameError as error:
        return NoMatch(((rule.name, str(error)),))

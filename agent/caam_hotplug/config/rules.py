"""Which rule matches a volume, under which names, or why none does. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final, Literal

from caam_hotplug import names
from caam_hotplug.config.match import Match, unknown_facts
from caam_hotplug.config.templates import PathTemplate, Template, UnitTemplate, UnsafeNameError
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
    """Extent of what a rule has done with a volume."""

    MOUNT = "mount"
    UNLOCK = "unlock"
    IGNORE = "ignore"


class OnStop(Enum):
    """Treatment of a volume when the agent stops cleanly."""

    LOCK = "lock"
    KEEP = "keep"


class OnBusy(Enum):
    """Treatment of other users of a volume that is to be locked or ejected on request."""

    REFUSE = "refuse"
    """The request is refused, and the message names them."""
    SIGNAL = "signal"
    """They get SIGTERM, and SIGKILL if they do not end."""
    DETACH = "detach"
    """They may go on with open files; the volume stays in use until they close them."""


BLOB_OF_LABEL: Final = Template("{partlabel}.bb")
NAME_OF_LABEL: Final = Template("{partlabel}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """Where the key of a volume comes from."""

    backend: Literal["auto", "tagged", "trusted", "encrypted"] = "auto"
    """Who has sealed the key: NXP's caam-keygen (`tagged`), the kernel's key type `trusted` or
    `encrypted`, or the one that the blob's form tells (`auto`)."""
    blob: Template = BLOB_OF_LABEL
    """File name of the blob in the blob directory."""
    length: int = 0
    """Length in bytes of a trusted key that no CAAM has sealed; 0 where the blob tells it."""
    options: str = field(default="", repr=False)  # one may be a password
    """Options of the trust source, such as `keyhandle=0x81000001` of a TPM."""

    @property
    def form(self) -> Backend | None:
        """The form that the blob must have; None for any."""
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
    """Name of the mount point in the mount root."""
    path: PathTemplate | None = None
    """Path of a mount point of its own, outside the mount root, instead of a name in it."""
    filesystems: tuple[FilesystemName, ...] = ("ext4", "xfs", "btrfs", "f2fs", "vfat", "exfat")
    """Filesystems that may be mounted."""
    options: tuple[MountOption, ...] = ("nosuid", "nodev", "noexec")
    """Options of the mount; a list here replaces the default."""
    read_only: bool = False
    """Whether the volume is mounted read-only even if it could be written."""
    filesystem_options: dict[FilesystemName, tuple[str, ...]] = field(default_factory=dict)
    """Options of each filesystem, added to errors=remount-ro for ext4 and nouuid for xfs."""

    def options_for(self, filesystem: str) -> tuple[str, ...]:
        """List the filesystem's own options; of two that contradict each other the last applies."""
        asked = {str(name): options for name, options in self.filesystem_options.items()}
        return _ALWAYS.get(filesystem, ()) + asked.get(filesystem, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which volumes a rule matches, and what is done with them."""

    name: str
    """Name of the rule in messages; every rule needs its own."""
    action: Action = Action.MOUNT
    """Extent of the action: `mount`, only `unlock`, or `ignore` (leave it untouched)."""
    on_stop: OnStop = OnStop.LOCK
    """Treatment at a clean stop of the agent: `lock` unmounts and forgets the key, `keep` leaves
    the volume as it is. A restart and an upgrade always leave it, a shutdown
    never."""
    on_busy: OnBusy = OnBusy.REFUSE
    """Treatment of other users at a request to lock or eject: `refuse` and name them, `signal` them
    to end, or `detach` and let them finish."""
    on_mount: UnitTemplate | None = None
    """Unit of systemd that is started when the volume is mounted."""
    on_unmount: UnitTemplate | None = None
    """Unit of systemd that is started, and waited for, before the volume is unmounted."""
    unit_within_s: float = 30.0
    """Seconds that an unmount waits for the unit of `on_unmount`."""
    match: Match = field(default_factory=Match)
    """Conditions that a volume must meet, all of them."""
    key: KeySource = KeySource()
    """Origin of the key."""
    crypt: Crypt = field(default_factory=Crypt)
    """Encryption of the volume."""
    mount: MountSettings = field(default_factory=MountSettings)
    """Place and options of the mount."""

    def asks_for(self, facts: Set[str]) -> bool:
        """Whether a condition or a name of the rule depends on one of these facts."""
        if any(getattr(self.match, fact, None) is not None for fact in facts):
            return True
        place = self.mount.path or self.mount.name
        templates = (self.key.blob, place, self.on_mount, self.on_unmount)
        return any(not facts.isdisjoint(each.placeholders) for each in templates if each)


BUILT_IN: Final = (
    Rule(name="built-in", match=Match(bus=(Bus.USB, Bus.MMC), removable=True, partlabel="?*")),
)
"""The rule of a board without a configuration file."""


def mount_globs(rules: Iterable[Rule]) -> list[str]:
    """List the paths of mount points outside the mount root, each with a glob as its last name.

    Those whose directory a volume chooses are not among them.
    """
    paths = (rule.mount.path for rule in rules)
    return sorted({path.glob for path in paths if path is not None and path.glob})


def mount_folders(rules: Iterable[Rule]) -> list[Path]:
    """List the directories that these mount points are in."""
    return sorted({Path(glob).parent for glob in mount_globs(rules)})


@dataclass(frozen=True, slots=True)
class Plan:
    """The rule that matches a volume, with the names that it gives."""

    rule: Rule
    blob: str
    """File name of the blob in the blob directory."""
    mount_name: str
    """Name of the mount point in its directory, and part of the DM name."""
    on_mount: str | None = None
    on_unmount: str | None = None
    mount_path: str = ""
    """Path of the mount point outside the mount root; empty if it is in that."""

    @property
    def place(self) -> str:
        """The mount point, as `kernel.api.Kernel` takes it."""
        return self.mount_path or self.mount_name

    def makes_the_same(self, other: Plan) -> bool:
        """Whether a volume that follows the other plan already follows this one."""
        mine, others = (
            (plan.blob, plan.place, plan.rule.action, plan.rule.crypt, plan.rule.mount)
            for plan in (self, other)
        )
        return mine == others


@dataclass(frozen=True, slots=True)
class NoMatch:
    """No rule matches the volume, or the one that matches leaves it untouched."""

    reasons: tuple[tuple[str, str], ...]
    """Pairs of a rule's name and why it does not apply; a name may be empty."""

    def __str__(self) -> str:
        if not self.reasons:
            return "there are no rules"
        return "; ".join(f"{name}: {why}" if name else why for name, why in self.reasons)


@dataclass(frozen=True, slots=True)
class NeedsUdev:
    """The rules ask for a fact that only udev knows and has not reported yet."""


def may_match(rules: tuple[Rule, ...], volume: Volume, unknown: Set[str]) -> bool:
    """Whether a rule may match the volume, of which these facts are not known."""
    return not isinstance(match_rules(rules, volume, unknown), NoMatch)


def match_rules(
    rules: tuple[Rule, ...], volume: Volume, also_unknown: Set[str] = frozenset()
) -> Plan | NoMatch | NeedsUdev:
    """Choose the first rule that matches the volume, or say for each rule why it does not.

    NeedsUdev is returned only for a volume that awaits udev, or of which something is also unknown.
    For such a volume a Plan holds unless udev contradicts what is known already.
    """
    unknown = unknown_facts(volume) | also_unknown
    if volume.opted_out:
        return NoMatch((("", f"udev's property {names.UDEV_OPT_OUT} is 0"),))
    if volume.parttype is not None and volume.parttype.lower() == names.UNFINISHED_TYPE:
        return NoMatch((("", "it is not finished; run the same `provision` or `migrate` again"),))
    if volume.header is not None:
        why = f"it has a header of {volume.header}, so it is not plain dm-crypt; if that is of an"
        return NoMatch((("", f"{why} earlier use, `wipefs --all --types` removes it"),))
    reasons: list[tuple[str, str]] = []
    for rule in rules:
        failure = next(rule.match.failures(volume, unknown), None)
        if failure is not None:
            reasons.append((rule.name, failure))
            continue
        if rule.asks_for(unknown):
            return NeedsUdev()
        return _apply(rule, volume)
    return NoMatch(tuple(reasons))


def _apply(rule: Rule, volume: Volume) -> Plan | NoMatch:
    """Give the volume the names of the rule, whose conditions it meets."""
    if rule.action is Action.IGNORE:
        return NoMatch(((rule.name, "its action is ignore"),))
    try:
        path = "" if rule.mount.path is None else rule.mount.path.render(volume)
        return Plan(
            rule,
            rule.key.blob.render(volume),
            names.name_of(path) or rule.mount.name.render(volume),
            None if rule.on_mount is None else rule.on_mount.render(volume),
            None if rule.on_unmount is None else rule.on_unmount.render(volume),
            path,
        )
    except UnsafeNameError as error:
        return NoMatch(((rule.name, str(error)),))

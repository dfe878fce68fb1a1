"""Checks of where and how rules mount, beyond one key: places that overlap, and what options mean.

A placeholder counts as any name: what is written on a medium must not choose a place that the
configuration would have refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.config.rules import Action, Rule
from caam_hotplug.config.templates import Name, PathTemplate

_OF_THE_KERNEL: Final = tuple(map(Path, ("/proc", "/sys", "/dev")))
_MEANINGS: Final = {
    "nosuid": "a program on it with a set-user-ID bit runs as its owner, also as root",
    "nodev": "a device node on it leads to that device, such as a disk or the memory",
    "noexec": "users and services can run programs that are on it",
}
"""What leaving out an option of the mount means."""


def overlaps(
    rules: Sequence[Rule], mount_root: Path, blob_directory: Path, configuration: Path
) -> Iterator[tuple[Rule, str]]:
    """Yield what is wrong with a rule's path, for each that lies above or below another place.

    `configuration`: the configuration file. Who could put a medium there would write the rules. A
    copy that is checked is to be that of the agent.
    """
    at = [(rule, rule.mount.path) for rule in rules if rule.mount.path is not None]
    files = (configuration, names.CONFIG_FILE)
    drop_ins = [file.parent / names.RULES_DIRECTORY for file in files]
    folders = {
        mount_root: "the mount_root",
        blob_directory: "the blob_directory",
        **dict.fromkeys(files, "the configuration"),
        **dict.fromkeys(drop_ins, "the directory of the drop-ins"),
        **dict.fromkeys(_OF_THE_KERNEL, "the kernel's"),
    }
    for rule, path in at:
        for folder, what in folders.items():
            if may_overlap(path, folder.parts[1:]):
                relation = _relation(path, len(folder.parts) - 1)
                yield rule, f"{_named(rule, path)} {relation} {folder}, {what}"
        for other, above in at:
            if len(path.names) > len(above.names) and may_overlap(path, above.parts):
                relation = _relation(path, len(above.names))
                words = f"{_named(rule, path)} {relation} {above.text!r}, of rule {other.name!r}"
                yield rule, words


def _named(rule: Rule, path: PathTemplate) -> str:
    return f"rule {rule.name!r}: mount.path {path.text!r}"


def _relation(path: PathTemplate, length: int) -> str:
    """Say how the path lies to another of this many names, with which it overlaps."""
    verb = "may be" if path.placeholders else "is"
    if len(path.names) == length:
        return verb
    return f"{verb} {'above' if len(path.names) < length else 'below'}"


def may_overlap(path: PathTemplate, other: Sequence[Name]) -> bool:
    """Whether a volume could have the one at, above or below the other."""
    return all(_may_be_same(a, b) for a, b in zip(path.parts, other, strict=False))


def _may_be_same(name: Name, other: Name) -> bool:
    """Whether the names can be the same."""
    match name, other:
        case str(), str():
            return name == other
        case str() as text, (begins, ends):
            is_longer = len(text) > len(begins) + len(ends)  # no placeholder is empty
            return is_longer and text.startswith(begins) and text.endswith(ends)
        case (str() as begins, str() as ends), (str() as others, str() as other_ends):
            same_begin = begins.startswith(others) or others.startswith(begins)
            return same_begin and (ends.endswith(other_ends) or other_ends.endswith(ends))
    return _may_be_same(other, name)


def meanings(rules: Iterable[Rule]) -> Iterator[str]:
    """Yield, for each rule that mounts, what the options that it leaves out mean."""
    for rule in rules:
        if rule.action is Action.MOUNT:
            for option, meaning in _MEANINGS.items():
                if option not in rule.mount.options:
                    yield f"rule {rule.name!r} mounts without {option}: {meaning}"

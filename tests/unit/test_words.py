"""Old words for things that have another name now do not come back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

REPOSITORY: Final = Path(__file__).resolve().parents[2]
CHECKED: Final = (
    "agent", "config", "docs", "rules", "tests", "tools",
    "CONTRIBUTING.md", "Makefile", "README.md",
)  # fmt: skip
NOT_CHECKED: Final = (
    "config/completions",  # generated
    "docs/man",  # generated
    "docs/decisions",  # records of the past
    "tests/unit/test_words.py",
    "tests/vm/caam_sim",  # code of the kernel
    "agent/caam_hotplug.egg-info",
)


@dataclass(frozen=True, slots=True)
class Banned:
    """An old word and the new one."""

    hint: str
    """A part of every match: a file without it need not be searched."""
    old: str
    """Pattern in lower case, over text in lower case with blanks for underscores."""
    new: str
    example: str
    """Text that the pattern must find."""
    within: tuple[str, ...] = ("",)
    """Prefixes of the paths to which the ban applies."""


CODE: Final = ("agent", "config", "rules", "tests", "tools")
OF_THE_AGENT: Final = (
    "agent",
    "tests/bus",
    "tests/fakes",
    "tests/kernel",
    "tests/life",
    "tests/unit",
)

BANNED: Final = (
    Banned(" go", r"\blet(s|ting)?( \w+){0,3} go\b", "release", "def let_go(self)"),
    Banned("life", r"(?<!/)\blife\b(?![/.]\w)", "lifecycle", "its life ends", ("agent", "docs")),
    Banned("lives", r"\blives\b", "lifecycles, is", "beside the lives", ("agent",)),
    Banned("claimed", r"\bclaimed\b", "reserved", "the mount point is claimed"),
    Banned("renew", r"\brenew(s|ed|al|als|ing)?\b", "reevaluate", "def renew(self)"),
    Banned("sweep", r"\bsweep(s|ing)?\b", "release leftovers", "async def sweep()"),
    Banned("swept", r"\bswept\b", "leftover released", "the orphan is swept"),
    Banned("admit", r"\badmit(s|ted|ting)?\b", "match", "no rule admits it"),
    Banned("wish", r"\bwish(es|ed)?\b", "target, options", "self._wish", OF_THE_AGENT),
    Banned("scratch", r"\bscratch\b", "temporary mapping", "import scratch", ("agent",)),
    Banned("optout", r"\boptouts?\b", "udev rules", "class OptOuts"),
    Banned("cbind", r"\bcbind\b", "ctypes_lib", "import cbind"),
    Banned("omission", r"\bomissions?\b", "lean imports", "omissions.leave_out()"),
    Banned("surroundings", r"\bsurroundings\b", "environment", "doctor/surroundings.py"),
    Banned("trial", r"\btrials?\b", "self-test", "doctor's trial", ("agent", "docs", "rules")),
    Banned("site", r"\bsite\b", "board", "site: Site", ("agent/caam_hotplug/doctor",)),
    Banned("stir", r"\bstir(s|red|ring)?\b", "wake", "self.stir()"),
    Banned("news", r"\bnews\b", "change", "it is news", ("agent", "tests")),
    Banned(
        "told",
        r"\b(is|are|was|were|been|being|has|have|had|not) told\b(?! apart)|\btold of\b",
        "report",
        "the agent is told",
    ),
    Banned("tell", r"\b(tells?|telling) (of|whether|that)\b", "report", "udev tells of it"),
    Banned("inherit", r"\binherits\b|self\. ?inherited\b", "has leftovers", "inherits: bool"),
    Banned("left behind", r"\bleft behind\b", "leftover", "it was left behind", ("agent",)),
    Banned("lane", r"\blanes?\b", "worker", "the volume's own lane"),
    Banned("rests", r"\brests\b", "parked", "self._rests = None"),
    Banned("undecided", r"\bundecided\b", "needs udev", "class Undecided"),
    Banned("durabl", r"\bdurabl[ey]\b", "atomic", "kernel/durable.py"),
    Banned("throw", r"\bthrow-?aways?\b", "test key, test mapping", "a throwaway key"),
    Banned("poison", r"\bpoison(s|ed|ing)?\b", "replace with an error table", "poison_mapping"),
    Banned("fe", r"\b(fed|feeds?|feeding)\b", "ping", "the watchdog is fed"),
    Banned("wedge", r"\bwedge[ds]?\b", "blocked, stuck", "a wedged medium"),
    Banned("stranger", r"\bstrangers?\b", "another user", "a file of a stranger", CODE),
    Banned("people", r"\bpeople\b", "users, operators", "lines for people", CODE),
    Banned("whoever", r"\bwhoever\b", "name the subject", "whoever has the file", CODE),
    Banned("nobody waits", r"\bnobody waits\b", "without waiting", "nobody waits for it"),
    Banned("born", r"\bborn\b", "made, started", "a volume is born"),
    Banned(
        " look",
        r"\b(a|another|each|every|first|second|own) look\b",
        "check, read",
        "a look at sysfs",
    ),
    Banned("of ours", r"\bof ours\b", "of the agent", "a mapping of ours"),
    Banned("of theirs", r"\bof theirs\b", "the possessive", "a rule of theirs"),
    Banned("'s word", r"\b(kernel|udev)'s words?\b", "error, event", "before udev's word"),
    Banned("asked to leave", r"\basked to leave\b", "stop requested", "it was asked to leave"),
    Banned("helper", r"\bhelpers?\b", "its purpose", "helper functions"),
    Banned(" up", r"\bclean(s|ed|ing)? up\b", "remove, release", "clean up"),
)
CLASSES: Final = re.compile(
    r"\bclass (Chip|Claims|Examination|Finding|Lane|Leave|Life|Made|Site|Standing|Tell|Trial)\b"
)
"""Old names of classes. In lower case these words have other uses."""


def files() -> Iterator[Path]:
    for name in CHECKED:
        top = REPOSITORY / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            relative = str(path.relative_to(REPOSITORY))
            if relative.startswith(NOT_CHECKED) or path.parent.name == "__pycache__":
                continue
            if path.is_file():
                yield path


def plain(text: str) -> str:
    return text.lower().replace("_", " ")


def found(path: Path) -> Iterator[str]:
    """Yield a line for each old word in the file or in its name."""
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return
    name = str(path.relative_to(REPOSITORY))
    text = f"{path.stem}\n{text}"
    lowered = plain(text)
    for banned in BANNED:
        if banned.hint in lowered and name.startswith(banned.within):
            for match in re.finditer(banned.old, lowered):
                yield f"{name}:{_line(text, match)}: {match[0]!r}, instead: {banned.new}"
    if path.suffix == ".py":
        for match in CLASSES.finditer(text):
            yield f"{name}:{_line(text, match)}: {match[0]!r}"


def _line(text: str, match: re.Match[str]) -> int:
    return text.count("\n", 0, match.start())


@pytest.mark.parametrize("banned", BANNED, ids=lambda banned: banned.hint.strip())
def test_a_pattern_finds_its_example(banned: Banned) -> None:
    found_in_example = re.search(banned.old, plain(banned.example))
    assert found_in_example
    assert banned.hint in found_in_example[0]


def test_no_old_word_is_used() -> None:
    assert [line for path in files() for line in found(path)] == []

"""Paths that lie in each other's way are refused, and so is what would make a medium root's."""

from __future__ import annotations

from pathlib import Path

import pytest

from caam_hotplug.config.mount_checks import meanings, overlaps
from caam_hotplug.config.rules import Action, MountSettings, Rule
from caam_hotplug.config.templates import PathTemplate, Template
from caam_hotplug.errors import ConfigError
from unit.config.files import faults, loaded

CONFIGURATION = Path("/etc/caam-hotplug/agent.toml")


def found(*paths: str) -> list[str]:
    rules = [
        Rule(name=f"r{number}", mount=MountSettings(path=PathTemplate(path)))
        for number, path in enumerate(paths, 1)
    ]
    places = (Path("/run/media"), Path("/data/caam"), CONFIGURATION)
    return [words for _, words in overlaps(rules, *places)]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/run/media", "is /run/media, the mount_root"),
        ("/run/media/recorder", "is below /run/media, the mount_root"),
        ("/run", "is above /run/media, the mount_root"),
        ("/data", "is above /data/caam, the blob_directory"),
        ("/data/caam", "is /data/caam, the blob_directory"),
        ("/data/caam/a/b", "is below /data/caam, the blob_directory"),
        ("/proc", "is /proc, the kernel's"),
        ("/sys/fs/x", "is below /sys, the kernel's"),
        ("/dev/shm", "is below /dev, the kernel's"),
        (
            "/etc/caam-hotplug/rules.d",
            "is /etc/caam-hotplug/rules.d, the directory of the drop-ins",
        ),
        ("/data/{partlabel}", "may be /data/caam, the blob_directory"),
        ("/run/m{partlabel}", "may be /run/media, the mount_root"),
        ("/run/{partlabel}a/{serial}", "may be below /run/media, the mount_root"),
    ],
)
def test_a_path_at_above_or_below_a_directory_of_others_is_refused(path: str, words: str) -> None:
    assert found(path) == [f"rule 'r1': mount.path {path!r} {words}"]


def test_every_directory_in_the_way_is_named() -> None:
    assert [each.rpartition("mount.path ")[2] for each in found("/{label}")] == [
        "'/{label}' may be above /run/media, the mount_root",
        "'/{label}' may be above /data/caam, the blob_directory",
        "'/{label}' may be above /etc/caam-hotplug/agent.toml, the configuration",
        "'/{label}' may be above /etc/caam-hotplug/rules.d, the directory of the drop-ins",
        "'/{label}' may be /proc, the kernel's",
        "'/{label}' may be /sys, the kernel's",
        "'/{label}' may be /dev, the kernel's",
    ]


@pytest.mark.parametrize(
    "path",
    [
        "/srv/recorder",
        "/recorder",
        "/run/mediaxy/a",
        "/run/caam",
        "/data/caam-{label}",
        "/devices",
        "/d{label}ev",
    ],
)
def test_a_path_beside_them_is_taken(path: str) -> None:
    assert found(path) == []


@pytest.mark.parametrize(
    ("above", "below", "words"),
    [
        ("/srv/a", "/srv/a/b", "is below '/srv/a', of rule 'r1'"),
        ("/srv/{label}", "/srv/a/b", "is below '/srv/{label}', of rule 'r1'"),
        ("/srv/a", "/srv/{label}/b", "may be below '/srv/a', of rule 'r1'"),
        ("/srv/a{label}", "/srv/{uuid}b/c", "may be below '/srv/a{label}', of rule 'r1'"),
    ],
)
def test_a_path_below_another_rules_path_is_refused(above: str, below: str, words: str) -> None:
    assert found(above, below) == [f"rule 'r2': mount.path {below!r} {words}"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("/srv/a", "/srv/a"), ("/srv/a", "/srv/ab/c"), ("/srv/a-{label}", "/srv/b-{label}/c"),
     ("/srv/{label}-a", "/srv/{label}-b/c"), ("/srv/{label}", "/srv/{uuid}")],
)  # fmt: skip
def test_two_rules_may_have_the_same_path_or_one_beside_the_other(one: str, other: str) -> None:
    assert found(one, other) == []


def test_rules_of_all_files_are_compared_with_the_places_of_the_configuration(file: Path) -> None:
    (file.parent / "rules.d").mkdir()
    drop_in = '[[rule]]\nname = "a"\nmount.path = "/srv"\n'
    (file.parent / "rules.d" / "a.toml").write_text(drop_in)
    text = 'blob_directory = "/b/c"\nmount_root = "/m"\n[[rule]]\nname = "b"\nmount.path = '
    assert faults(file, f"{text}'/srv/x'") == [
        "rule: rule 'b': mount.path '/srv/x' is below '/srv', of rule 'a'"
    ]
    assert faults(file, f"{text}'/b'") == [
        "rule: rule 'b': mount.path '/b' is above /b/c, the blob_directory"
    ]
    assert faults(file, f"{text}'{file.parent}'") == [
        f"rule: rule 'b': mount.path '{file.parent}' is above {file}, the configuration",
        f"rule: rule 'b': mount.path '{file.parent}' is above {file.parent}/rules.d, the directory "
        "of the drop-ins",
    ]


def test_a_path_that_overlaps_is_a_fault_of_the_file_that_has_its_rule(file: Path) -> None:
    drop_in = file.parent / "rules.d" / "a.toml"
    drop_in.parent.mkdir()
    drop_in.write_text("[[rule]]\nname = 'a'\nmount.path = '/proc/a'\n")
    text = "[[rule]]\nname = 'b'\nmount.path = '/sys/b'\n"
    with pytest.raises(ConfigError) as caught:
        loaded(file, text)
    assert [fault.file for fault in caught.value.faults] == [drop_in, file]


@pytest.mark.parametrize("path", ["/etc/caam-hotplug", "/etc/caam-hotplug/rules.d/x"])
def test_a_copy_is_checked_as_the_configuration_that_it_is_to_be(file: Path, path: str) -> None:
    found = faults(file, f"[[rule]]\nname = 'r'\nmount.path = '{path}'\n")
    assert [fault for fault in found if "/etc/caam-hotplug/" in fault]


FIXED = "match.removable = false\n"
REFUSED = (
    "without, who makes a medium could be root here. Only a rule that matches removable = false, "
    "and has mount.path or matches a partuuid without wildcards, may leave it out"
)


@pytest.mark.parametrize(
    ("options", "missing"),
    [("[]", "nosuid and nodev"), ("['nodev']", "nosuid"), ("['nosuid', 'noexec']", "nodev")],
)
@pytest.mark.parametrize(
    "match",
    ["", "match.removable = true\nmount.path = '/srv/a'\n", FIXED, "match.partuuid = 'a'\n",
     "mount.path = '/srv/a'\n", f"{FIXED}match.partlabel = 'a'\n",
     f"{FIXED}match.partuuid = '*'\n", f"{FIXED}match.partuuid = ['a', '0f1c*']\n",
     f"{FIXED}match.partuuid = '0f1c2d3e-0[12]'\n"],
)  # fmt: skip
def test_suid_and_dev_are_for_a_partition_of_the_board_alone(
    file: Path, match: str, options: str, missing: str
) -> None:
    text = f"[[rule]]\nname = 'r'\n{match}mount.options = {options}\n"
    (fault,) = faults(file, text)
    assert fault == f"rule[1].mount.options: expected {missing} in it: {REFUSED}"


@pytest.mark.parametrize(
    "more",
    ["mount.path = '/srv/a'\n", "match.partuuid = '0f1c2d3e-02'\n",
     "match.partuuid = ['0f1c2d3e-01', '0f1c2d3e-02']\n"],
)  # fmt: skip
def test_a_partition_of_the_board_may_have_suid_and_dev(file: Path, more: str) -> None:
    text = f"[[rule]]\nname = 'r'\n{FIXED}{more}mount.options = []\n"
    (rule,) = loaded(file, text).rule
    assert rule.mount.options == ()
    assert list(meanings([rule])) == [
        "rule 'r' mounts without nosuid: a program on it with a set-user-ID bit runs as its owner, "
        "also as root",
        "rule 'r' mounts without nodev: a device node on it leads to that device, such as a disk "
        "or the memory",
        "rule 'r' mounts without noexec: users and services can run programs that are on it",
    ]


def test_a_rule_that_does_not_mount_has_no_options_that_mean_anything() -> None:
    settings = MountSettings(options=("nosuid", "nodev"))
    assert list(meanings([Rule(name="r", action=Action.UNLOCK, mount=settings)])) == []
    assert len(list(meanings([Rule(name="r", mount=settings)]))) == 1
    assert list(meanings([Rule(name="r", mount=MountSettings(name=Template("a")))])) == []

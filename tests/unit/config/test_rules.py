from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from caam_hotplug.config.match import Bytes, Match
from caam_hotplug.config.rules import (
    BUILT_IN,
    Action,
    KeySource,
    MountSettings,
    NoMatch,
    Plan,
    Rule,
    match_rules,
)
from caam_hotplug.config.templates import PathTemplate, Template
from caam_hotplug.model import Bus, DevType, Volume, VolumeId
from unit.volumes import claims, stick, volumes


def test_the_built_in_rule_matches_a_labelled_partition_on_a_removable_bus() -> None:
    assert match_rules(BUILT_IN, stick()) == Plan(BUILT_IN[0], "cartridge.bb", "cartridge")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"partlabel": None}, "partlabel is not there, so it is not '?*'"),
        ({"partlabel": ""}, "partlabel is '', not '?*'"),
        ({"bus": Bus.ATA}, "bus is ata, not usb, mmc"),
        ({"removable": False}, "removable is false, not true"),
        ({"devtype": DevType.DISK}, "devtype is disk, not partition"),
        (
            {"partlabel": "a/b"},
            "partlabel 'a/b' cannot be part of a file name: it has characters "
            "other than A-Z a-z 0-9 . _ -",
        ),
    ],
)
def test_the_built_in_rule_leaves_everything_else_untouched(
    changes: dict[str, Any], why: str
) -> None:
    assert match_rules(BUILT_IN, stick(**changes)) == NoMatch((("built-in", why),))


def test_no_rule_matches_a_device_that_a_udev_rule_opts_out() -> None:
    result = match_rules((Rule(name="all"),), stick(opted_out=True))
    assert str(result) == "udev's property CAAM_HOTPLUG is 0"


@pytest.mark.parametrize("as_written", [str.lower, str.upper])
def test_no_rule_matches_an_unfinished_medium(
    as_written: Callable[[str], str],
) -> None:
    by_serial = KeySource(blob=Template("{serial}.bb"))
    rule = Rule(name="by serial", key=by_serial, mount=MountSettings(name=Template("{serial}")))
    begun = stick(serial="ABC", parttype=as_written("08852176-76a2-4897-9536-c3c5c588df44"))
    result = match_rules((rule,), begun)
    assert str(result) == "it is not finished; run the same `provision` or `migrate` again"


def test_an_ignoring_rule_keeps_later_rules_from_the_volume() -> None:
    rules = (Rule(name="not these", action=Action.IGNORE, match=Match(bus=Bus.USB)), *BUILT_IN)
    assert match_rules(rules, stick()) == NoMatch((("not these", "its action is ignore"),))
    assert isinstance(match_rules(rules, stick(bus=Bus.MMC)), Plan)


def test_an_unsafe_name_does_not_fall_through_to_a_rule_with_another_template() -> None:
    rules = (
        Rule(name="by label"),
        Rule(
            name="by number",
            key=KeySource(blob=Template("{diskseq}.bb")),
            mount=MountSettings(name=Template("{diskseq}")),
        ),
    )
    result = match_rules(rules, stick(partlabel="a b"))
    assert isinstance(result, NoMatch)
    assert [name for name, _ in result.reasons] == ["by label"]


def test_the_mount_name_is_checked_as_well_as_the_blobs() -> None:
    rule = Rule(name="r", mount=MountSettings(name=Template("{serial}")))
    assert match_rules((rule,), stick()) == NoMatch((("r", "the medium has no serial"),))


def test_the_names_come_from_the_rules_templates() -> None:
    rule = Rule(
        name="r",
        key=KeySource(blob=Template("chip-{partn}.bb")),
        mount=MountSettings(name=Template("{partlabel}-{diskseq}")),
    )
    assert match_rules((rule,), stick(id=VolumeId(9, 3))) == Plan(rule, "chip-3.bb", "cartridge-9")


def test_a_path_of_its_own_takes_the_place_of_the_name() -> None:
    settings = MountSettings(path=PathTemplate("/srv/{partlabel}-a"))
    rule = Rule(name="r", key=KeySource(blob=Template("a.bb")), mount=settings)
    plan = match_rules((rule,), stick())
    assert plan == Plan(rule, "a.bb", "cartridge-a", mount_path="/srv/cartridge-a")
    assert plan.place == "/srv/cartridge-a"
    fixed = replace(rule, mount=MountSettings(path=PathTemplate("/srv/recorder")))
    unlabelled = match_rules((fixed,), stick(partlabel=None))
    assert unlabelled == Plan(fixed, "a.bb", "recorder", mount_path="/srv/recorder")


def test_no_match_has_a_reason_for_every_rule() -> None:
    rules = (Rule(name="a", match=Match(bus=Bus.MMC)), Rule(name="b", match=Match(serial="1")))
    assert str(match_rules(rules, stick())) == (
        "a: bus is usb, not mmc; b: serial is not there, so it is not '1'"
    )


def test_no_match_without_rules_says_that_there_are_none() -> None:
    assert str(match_rules((), stick())) == "there are no rules"


globs = st.none() | st.sampled_from(["*", "?*", "cartridge", "[a-m]*", "[", "[!", "a"])
matches = st.builds(
    Match,
    partlabel=globs | st.just(("a*", "b*")),
    serial=globs,
    vendor=globs,
    bus=st.none() | st.sampled_from(Bus) | st.just((Bus.USB, Bus.MMC)),
    removable=st.none() | st.booleans(),
    devtype=st.sampled_from(DevType),
    min_size=st.none() | st.integers(0, 2**50).map(Bytes),
    max_size=st.none() | st.integers(0, 2**50).map(Bytes),
)
rule_lists = st.lists(
    st.builds(Rule, name=st.just("r"), action=st.sampled_from(Action), match=matches), max_size=5
).map(tuple)


@given(rule_lists, volumes)
def test_the_rule_of_a_plan_is_the_first_without_failures(
    rules: tuple[Rule, ...], volume: Volume
) -> None:
    assume(not volume.opted_out)
    fitting = [i for i, rule in enumerate(rules) if not list(rule.match.failures(volume))]
    match match_rules(rules, volume):
        case Plan() as plan:
            assert plan.rule is rules[fitting[0]]
            assert plan.rule.action is not Action.IGNORE
        case NoMatch(reasons) if fitting:
            ((_, why),) = reasons
            ignores = rules[fitting[0]].action is Action.IGNORE
            unnamed = "cannot be part of" in why or why == "the medium has no partlabel"
            assert why == "its action is ignore" if ignores else unnamed
        case NoMatch(reasons):
            assert [why for _, why in reasons] == [
                next(rule.match.failures(volume)) for rule in rules
            ]


@given(claims)
def test_names_of_a_volume_that_a_rule_matches_are_plain_file_names(label: str | None) -> None:
    match match_rules((Rule(name="all"),), stick(partlabel=label)):
        case Plan(_, blob, mount_name):
            assert (blob, mount_name) == (f"{label}.bb", label)
            assert set(mount_name) <= set(string.ascii_letters + string.digits + "._-")
            assert mount_name[0] not in ".-"
        case NoMatch() as no_match:
            assert "cannot be part of a file name" in str(no_match) or label is None

from __future__ import annotations

import string
from collections.abc import Callable
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
from caam_hotplug.config.templates import Template, UnsafeNameError
from caam_hotplug.model import Bus, DevType, Sectors, Volume, VolumeId
from unit.volumes import claims, stick, volumes


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1KiB", 2**10), ("64 MiB", 2**26), ("2GiB", 2**31), ("1TiB", 2**40)],
)
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert Bytes.from_text(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "64MB", "64 mib", "-1MiB", "1.5GiB", "٣MiB", "1_000", "1 M iB", "0x10"]
)
def test_a_size_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 512MiB or 64GiB, found"):
        Bytes.from_text(text)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{partlabel}.bb", "cartridge.bb"),
        ("{partlabel}-{diskseq}p{partn}", "cartridge-7p1"),
        ("fixed", "fixed"),
        ("{diskseq}", "7"),
    ],
)
def test_a_template_gives_a_name_for_the_volume(template: str, name: str) -> None:
    assert Template(template).render(stick()) == name


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "must not be empty"),
        (".hidden", r"start with \. or -"),
        ("-rf", r"start with \. or -"),
        ("../{partlabel}", "names a path; expected one file name"),
        ("keys/{partlabel}.bb", "names a path; expected one file name"),
        ("a\0b", "file names here are made of"),
        ("a{{{partlabel}}}", "file names here are made of"),
        ("{vendor}", r"\{vendor\} is not one of \{partlabel\}, \{partuuid\}"),
        ("{}", "is not one of"),
        ("{0}", "is not one of"),
        ("{partlabel.__class__}", "is not one of"),
        ("{partlabel[0]}", "is not one of"),
        ("{partlabel!r}", "is not one of"),
        ("{partlabel:>40}", "is not one of"),
        ("{partlabel", "expected '}' before end of string"),
        ("partlabel}", "Single '}' encountered"),
    ],
)
def test_a_template_that_is_no_file_name_is_refused_when_it_is_read(
    template: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Template(template)


def test_templates_are_equal_if_their_texts_are() -> None:
    assert Template("{uuid}") == Template("{uuid}") != Template("{label}")
    assert Template("{uuid}") != "{uuid}"
    assert {Template("{uuid}"): 1}[Template("{uuid}")] == 1
    assert repr(Template("{uuid}")) == "Template('{uuid}')"


def test_a_place_that_the_medium_does_not_fill_is_told() -> None:
    with pytest.raises(UnsafeNameError, match=r"^the medium has no serial$"):
        Template("{serial}").render(stick())


def test_a_value_that_could_lead_elsewhere_is_told_escaped() -> None:
    with pytest.raises(UnsafeNameError) as caught:
        Template("{partlabel}.bb").render(stick(partlabel="../ü"))
    assert str(caught.value) == (
        "partlabel '../\\xfc' cannot be part of a file name: it starts with '.'"
    )


places = st.sampled_from([f"{{{name}}}" for name in Template.FIELDS])
literals = st.text("abz019._-/ {", max_size=4)
templates = st.lists(places | literals, max_size=4).map("".join) | st.text(max_size=12)


@given(templates, volumes)
def test_no_rendered_name_leaves_its_directory(text: str, volume: Volume) -> None:
    try:
        name = Template(text).render(volume)
    except ValueError as refused:  # the template's text, or the medium's
        assert str(refused)
        return
    assert name
    assert "/" not in name
    assert "\0" not in name
    assert name[0] not in ".-"


@given(st.lists(places, min_size=1, max_size=3), volumes)
def test_a_name_made_of_a_mediums_texts_has_only_plain_characters(
    parts: list[str], volume: Volume
) -> None:
    try:
        name = Template("".join(parts)).render(volume)
    except UnsafeNameError as refused:
        assert str(refused)
        return
    assert set(name) <= set(string.ascii_letters + string.digits + "._-")


WHOLE = stick(
    partuuid="0f1c3a52-01",
    parttype="0x83",
    label="clear",
    uuid="6ba7b810",
    serial="4C530001",
    vendor="SanDisk",
    model="Ultra",
    path="platform-30b50000.mmc",
)


@pytest.mark.parametrize(
    "match",
    [
        Match(),
        Match(partlabel="cart*"),
        Match(partlabel=("other", "cartridg[a-f]")),
        Match(partuuid="0f1c3a52-??"),
        Match(parttype="0x83"),
        Match(label="clear"),
        Match(uuid="6ba*"),
        Match(serial="4C53*"),
        Match(vendor="SanDisk"),
        Match(model="U*"),
        Match(path="platform-*.mmc"),
        Match(bus=Bus.USB),
        Match(bus=(Bus.MMC, Bus.USB)),
        Match(removable=True),
        Match(devtype=DevType.PARTITION),
        Match(min_size=Bytes(204800 * 512)),
        Match(max_size=Bytes(204800 * 512)),
    ],
)
def test_a_condition_that_the_volume_meets_does_not_fail(match: Match) -> None:
    assert list(match.failures(WHOLE)) == []


@pytest.mark.parametrize(
    ("match", "failure"),
    [
        (Match(partlabel="Cartridge"), "partlabel is 'cartridge', not 'Cartridge'"),
        (Match(partlabel="cart"), "partlabel is 'cartridge', not 'cart'"),
        (Match(partlabel=("a", "b*")), "partlabel is 'cartridge', not 'a', 'b*'"),
        (Match(serial="?*"), "serial is not there, so it is not '?*'"),
        (Match(uuid="*"), "uuid is not there, so it is not '*'"),
        (Match(bus=Bus.MMC), "bus is usb, not mmc"),
        (Match(bus=(Bus.MMC, Bus.NVME)), "bus is usb, not mmc, nvme"),
        (Match(removable=False), "removable is true, not false"),
        (Match(devtype=DevType.DISK), "devtype is partition, not disk"),
        (
            Match(min_size=Bytes(104857601)),
            "min_size is 104857601 bytes, the volume has 104857600",
        ),
        (
            Match(max_size=Bytes(104857599)),
            "max_size is 104857599 bytes, the volume has 104857600",
        ),
    ],
)
def test_a_condition_that_the_volume_does_not_meet_is_told_in_words(
    match: Match, failure: str
) -> None:
    assert list(match.failures(stick())) == [failure]


def test_a_rule_asks_for_partitions_unless_it_says_otherwise() -> None:
    disk = stick(devtype=DevType.DISK)
    assert list(Match().failures(disk)) == ["devtype is disk, not partition"]
    assert list(Match(devtype=DevType.DISK).failures(disk)) == []


def test_every_failed_condition_is_told_in_the_order_of_the_keys() -> None:
    match = Match(max_size=Bytes(1), bus=Bus.MMC, partlabel="x")
    assert [failure.split()[0] for failure in match.failures(stick())] == [
        "partlabel",
        "bus",
        "max_size",
    ]


def test_a_hostile_label_is_told_escaped() -> None:
    volume = stick(partlabel="a\n\x1b[2J")
    assert next(Match(partlabel="x").failures(volume)) == ("partlabel is 'a\\n\\x1b[2J', not 'x'")


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


def test_a_device_that_the_board_keeps_us_off_meets_no_rule() -> None:
    refused = match_rules((Rule(name="all"),), stick(opted_out=True))
    assert str(refused) == "udev's property CAAM_HOTPLUG is 0"


@pytest.mark.parametrize("as_written", [str.lower, str.upper])
def test_a_medium_that_is_not_finished_meets_no_rule_whatever_it_asks_for(
    as_written: Callable[[str], str],
) -> None:
    by_serial = KeySource(blob=Template("{serial}.bb"))
    rule = Rule(name="by serial", key=by_serial, mount=MountSettings(name=Template("{serial}")))
    begun = stick(serial="ABC", parttype=as_written("08852176-76a2-4897-9536-c3c5c588df44"))
    refused = match_rules((rule,), begun)
    assert str(refused) == "it is not finished; run the same `provision` or `migrate` again"


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
    refused = match_rules(rules, stick(partlabel="a b"))
    assert isinstance(refused, NoMatch)
    assert [name for name, _ in refused.reasons] == ["by label"]


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


def test_a_refusal_says_for_every_rule_why() -> None:
    rules = (Rule(name="a", match=Match(bus=Bus.MMC)), Rule(name="b", match=Match(serial="1")))
    assert str(match_rules(rules, stick())) == (
        "a: bus is usb, not mmc; b: serial is not there, so it is not '1'"
    )


def test_a_refusal_without_rules_says_so() -> None:
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
def test_the_deciding_rule_is_the_first_without_failures(
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
        case NoMatch() as refused:
            assert "cannot be part of a file name" in str(refused) or label is None


@given(st.integers(0, 2**40), st.integers(0, 2**50), st.integers(0, 2**50))
def test_sizes_are_limits_that_are_themselves_allowed(sectors: int, least: int, most: int) -> None:
    volume = stick(size=Sectors(sectors))
    match = Match(min_size=Bytes(least), max_size=Bytes(most))
    assert (not list(match.failures(volume))) == (least <= sectors * 512 <= most)

"""Mistakes inside a file: every one is named, with what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from caam_hotplug.config import loader
from caam_hotplug.errors import ConfigError
from caam_hotplug.kernel.config_files import AnyonesFiles
from unit.config.files import (
    faults,
    faults_of,
    in_rule,
    loaded,
)
from unit.config.mistakes import FILE_FAULTS, RULE_FAULTS


def test_a_fault_is_shown_with_file_key_and_problem(file: Path) -> None:
    file.write_text('log_level = "loud"')
    with pytest.raises(ConfigError) as caught:
        loader.load(file, AnyonesFiles())
    assert str(caught.value) == (
        f"{file}: log_level: expected debug, info, warning, error; found 'loud'"
    )


@pytest.mark.parametrize(("text", "fault"), FILE_FAULTS)
def test_a_fault_of_the_file_says_what_was_expected(text: str, fault: str, file: Path) -> None:
    assert faults(file, text) == [fault]


@pytest.mark.parametrize(("line", "fault"), RULE_FAULTS)
def test_a_fault_of_a_rule_has_the_rules_number(line: str, fault: str, file: Path) -> None:
    assert faults(file, in_rule(line)) == [f"rule[1].{fault}"]


@pytest.mark.parametrize(
    "line", ["match.removable = 1", "match.partlabel = 5", "crypt.offset = 0.5"]
)
def test_a_value_of_another_type_is_a_fault(line: str, file: Path) -> None:
    (fault,) = faults(file, in_rule(line))
    assert fault.startswith(f"rule[1].{line.partition(' ')[0]}: expected ")


@pytest.mark.parametrize("name", ["", " a", "a/b", "a\\u0000", "ü", "a\\n", "-a"])
def test_a_rules_name_must_be_fit_for_messages(name: str, file: Path) -> None:
    (fault,) = faults(file, f'[[rule]]\nname = "{name}"')
    assert fault.startswith("rule[1].name: expected a name of A-Z a-z 0-9 . _ - and spaces, found")


def test_one_fault_does_not_hide_the_next(file: Path) -> None:
    text = """
        log_level = "loud"
        [[rule]]
        name = "a"
        crypt.offset = -1
        match.partlable = "x"
        [[rule]]
        key.blob = "/"
    """
    assert [fault.partition(": ")[0] for fault in faults(file, text)] == [
        "log_level",
        "rule[1].crypt.offset",
        "rule[1].match.partlable",
        "rule[2].key.blob",
        "rule[2]",
    ]


def test_rules_of_the_same_name_are_refused(file: Path) -> None:
    assert faults(file, '[[rule]]\nname = "a"\n[[rule]]\nname = "b"\n[[rule]]\nname = "a"\n') == [
        "rule: 2 rules are called 'a'; the name tells them apart in messages"
    ]


@pytest.mark.parametrize("text", ["source = ", "= 1", "[rule", "a = 1\na = 2", "a = 'x", "\0"])
def test_a_text_that_is_not_toml_is_a_fault(text: str, file: Path) -> None:
    (fault,) = faults(file, text)
    assert fault.startswith(": is not TOML: ")


def test_a_text_that_is_not_utf8_is_a_fault(file: Path) -> None:
    file.write_bytes(b'source = "\xff"')
    (fault,) = faults_of(file)
    assert fault.startswith(": is not TOML: 'utf-8' codec can't decode byte 0xff")


HUGE = "0x1" + "0" * 5000
"""More digits than Python prints (sys.int_info.default_max_str_digits)."""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"log_level = {HUGE}", "log_level: expected debug, info, warning, error; found a number "
         "of more than 64 bits"),
        (in_rule(f"crypt.offset = {HUGE}"), "rule[1].crypt.offset: "),
        (in_rule(f"match.min_size = {HUGE}"), "rule[1].match.min_size: "),
        (in_rule(f'match.max_size = "{"9" * 5000}"'),
         "rule[1].match.max_size: expected a size such as 512MiB or 64GiB, found "),
        (f'log_level = "{"x" * 1000}"', "log_level: expected debug, info, warning, error; found "
         f"'{'x' * 60}' and 940 characters more"),
        ('"\\u001b[2J" = 1', "'\\x1b[2J': is not a key here; known are source"),
        (f"{'x' * 1000} = 1", f"'{'x' * 60}…': is not a key here"),
        (f"a = {'[' * 5000}", ": is not TOML that can be read: nested too deeply"),
        (f"a{'.a' * 5000} = 1", ": cannot be read: has a key of more than 100 parts"),
    ],
)  # fmt: skip
def test_an_absurdly_large_value_is_named_in_a_short_line(
    text: str, fault: str, file: Path
) -> None:
    (found,) = faults(file, text)
    assert found.startswith(fault)
    assert len(found) < 500
    assert found.isprintable()


def test_dots_in_prose_are_no_parts_of_a_key(file: Path) -> None:
    assert loaded(file, f"# {'.' * 300}\nrule = [] # {'.' * 90}\n").rule == ()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            'match = { min_size = "2MiB", max_size = "1MiB" }',
            "match.min_size: expected at most max_size, which is 1048576, found 2097152",
        ),
        (
            'mount.options = ["nosuid", "nodev", "noatime", "strictatime"]',
            "mount.options: expected one of noatime, relatime, strictatime; found noatime, "
            "strictatime",
        ),
        (
            'mount = { path = "/srv/recorder", name = "recorder" }',
            "mount.path: expected only one of name and path, found both",
        ),
        (
            'mount.filesystem_options.ext4 = ["ro", "rw"]',
            "mount.filesystem_options: expected one of 'ro' and 'rw' for ext4, found both",
        ),
        (
            'mount.filesystem_options.ext4 = ["exec", "noexec"]',
            "mount.filesystem_options: expected one of 'exec' and 'noexec' for ext4, found both",
        ),
        (
            'mount.filesystem_options.ext4 = ["errors=panic", "errors=continue"]',
            "mount.filesystem_options: expected one of 'errors=panic' and 'errors=continue' for "
            "ext4, found both",
        ),
        (
            'mount = { read_only = true, filesystem_options = { xfs = ["rw"] } }',
            "mount.read_only: expected false, as filesystem_options ask for 'rw', found true",
        ),
        (
            'mount.filesystem_options.ext4 = ["noload\\u0000"]',
            "mount.filesystem_options: expected an option such as errors=continue or noquota for "
            "ext4, found 'noload\\x00'",
        ),
        (
            'mount.filesystem_options.ext4 = [""]',
            "mount.filesystem_options: expected an option such as errors=continue or noquota for "
            "ext4, found ''",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_a_fault(line: str, fault: str, file: Path) -> None:
    assert faults(file, in_rule(line)) == [f"rule[1].{fault}"]


@pytest.mark.parametrize(
    "line",
    [
        'match = { min_size = "1MiB", max_size = "1MiB" }',
        'mount.options = ["nosuid", "nodev", "noatime", "nodiratime"]',
        'mount = { path = "/srv/recorder", name = "{partlabel}" }',
        'mount.filesystem_options = { ext4 = ["ro"], xfs = ["rw"] }',
        'mount.filesystem_options.ext4 = ["errors=continue", "errors=continue", "noload"]',
        'mount = { read_only = true, filesystem_options.ext4 = ["ro"] }',
        'mount.filesystem_options.ext4 = ["context=system_u:object_r:removable_t:s0:c1,c2"]',
    ],
)
def test_keys_that_go_together_are_read(line: str, file: Path) -> None:
    assert loaded(file, in_rule(line)).rule[0].name == "r"

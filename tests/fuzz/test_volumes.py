"""All that is derived from the texts of a medium stays within its bounds, whatever they are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final, Literal

from hypothesis import strategies as st

from caam_hotplug import names
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
from caam_hotplug.config.templates import Template
from caam_hotplug.errors import UnknownError, UnsupportedVolumeError
from caam_hotplug.formats.crypt_table import CryptTarget, crypt_target
from caam_hotplug.kernel import sysfs
from caam_hotplug.model import SECTOR_BYTES, Bus, KeyReference, Volume
from caam_hotplug.volume.target import Target
from fuzz.inputs import INPUT_FILES, tries

DM_NAME_LEN: Final = 128
DM_UUID_LEN: Final = 129
"""Bytes with the NUL at the end (include/uapi/linux/dm-ioctl.h)."""
NAME_MAX: Final = 255
KEY_DESCRIPTION_MAX: Final = 4095
"""Bytes (KEY_MAX_DESC_SIZE in security/keys/keyctl.c)."""

SYS: Final = INPUT_FILES / "sys"
SYS_BLOCK: Final = SYS / "class/block"
DISK: Final = SYS / "devices/pci0/usb1/1-1/host0/target0/block/sdb"
USB_DEVICE: Final = DISK.parents[3]


def make_sysfs() -> None:
    """Make a stick with one partition, as the kernel shows it."""
    (DISK / "sdb1").mkdir(parents=True)
    (DISK / "device").mkdir()
    (SYS / "bus/usb").mkdir(parents=True)
    (USB_DEVICE / "subsystem").symlink_to(SYS / "bus/usb")
    SYS_BLOCK.mkdir(parents=True)
    (SYS_BLOCK / "sdb").symlink_to(os.path.relpath(DISK, SYS_BLOCK))
    (SYS_BLOCK / "sdb1").symlink_to(os.path.relpath(DISK / "sdb1", SYS_BLOCK))


make_sysfs()
SYS_ROOT: Final = os.open(SYS, os.O_PATH | os.O_CLOEXEC)

plain = st.text("abcXYZ019._-", min_size=1, max_size=8)
escapes = st.integers(0, 255).map(lambda byte: f"\\x{byte:02x}")
parts = (
    plain
    | escapes
    | st.sampled_from(["..", "/", "\\", "\\x", "\\x2", "\\xg0", " ", "\n", "%s", "{}"])
)
mount_points = (
    st.lists(parts, max_size=5).map("".join)
    | st.text(max_size=40)  # surrogates too: bytes that are no UTF-8, as pyudev hands them on
    | st.binary(max_size=20).map(lambda raw: raw.decode(errors="surrogateescape"))
    | st.sampled_from(["", ".", "..", "-rf", "a" * 36, "a" * 37, "a" * 5000, "\u202eb", "٧", "\0"])
    | st.integers().map(str)
)
CLAIMS: Final = [
    "ID_PART_ENTRY_NAME", "ID_PART_ENTRY_UUID", "ID_PART_ENTRY_TYPE", "ID_FS_LABEL_ENC",
    "ID_FS_LABEL", "ID_FS_UUID_ENC", "ID_FS_UUID", "ID_SERIAL_SHORT", "ID_SERIAL", "ID_VENDOR_ENC",
    "ID_MODEL_ENC", "ID_PATH", "DISKSEQ", "PARTN", "PARTNAME", "MAJOR", "MINOR", "DEVNAME",
    "ID_PART_ENTRY_NUMBER", "ID_PART_ENTRY_SIZE", "DM_NAME", names.UDEV_OPT_OUT,
]  # fmt: skip
properties = st.dictionaries(st.sampled_from(CLAIMS), mount_points, max_size=8) | mount_points.map(
    lambda label: {"ID_PART_ENTRY_NAME": label}
)
usb_strings = st.binary(max_size=20) | mount_points.map(lambda text: text.encode(errors="replace"))

unsigned = st.sampled_from([0, 1, 7, 2**31, 2**32, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
odd_numbers = st.sampled_from(["", "-1", "x", "1_0", "9" * 25, "٧", "1 1", "\x00"])
attributes = st.fixed_dictionaries(
    {},
    optional={
        "diskseq": unsigned.map(str) | odd_numbers,
        "partition": st.integers(0, 2**31 - 1).map(str) | odd_numbers,
        "size": unsigned.map(str) | odd_numbers,
        "dev": st.sampled_from(["8:17", "259:1048575", "", ":", "8", "-8:1"]),
        "ro": st.sampled_from(["0", "1", "", "x"]),
    },
)
globs = (
    st.none()
    | mount_points
    | st.sampled_from(["*", "?*", "[", "[!", "[z-a]*", "*a*a*a*a*a*b", "[[:x:]]"])
)
places = st.sampled_from([f"{{{name}}}" for name in Template.FIELDS])


def template(text: str) -> Template | None:
    try:
        return Template(text)
    except ValueError:
        return None


templates = (
    st.lists(places | plain, min_size=1, max_size=4)
    .map("".join)
    .map(template)
    .filter(lambda made: made is not None)
)
rules = st.builds(
    Rule,
    name=st.just("r"),
    action=st.sampled_from(Action),
    match=st.builds(
        Match,
        partlabel=globs,
        serial=globs,
        label=globs,
        bus=st.none() | st.sampled_from(Bus),
        min_size=st.none() | unsigned.map(Bytes),
    ),
    key=st.builds(KeySource, blob=templates),
    mount=st.builds(MountSettings, name=templates),
)


def volume_of(
    found: dict[str, str],
    written: dict[str, str],
    usb: dict[str, bytes],
    source: Literal["udev", "kernel"],
) -> Volume | None:
    """Read the volume at sdb1 that sysfs and udev describe so."""
    facts = {
        "diskseq": "9",
        "partition": "1",
        "size": "204800",
        "dev": "8:17",
        "ro": "0",
        **written,
    }
    for name, text in facts.items():
        (DISK / ("" if name == "diskseq" else "sdb1") / name).write_text(text)
    for path in (USB_DEVICE / "serial", DISK / "device/vendor", DISK / "device/model"):
        path.unlink(missing_ok=True)
        if path.name in usb:
            path.write_bytes(usb[path.name])
    try:
        return sysfs.volume_at("sdb1", found, source, SYS_ROOT)
    except UnknownError:  # a number that is none
        return None


def assert_is_one_name(name: str, longest: int) -> None:
    """Assert that it is one component of a path, of characters without a special meaning."""
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:-]*", name, re.ASCII)
    assert len(name) <= longest


def assert_stays_within_bounds(volume: Volume, plan: Plan) -> None:
    """Assert the bounds of all files, names and lines that the plan leads to."""
    attempt = Target(volume, plan)
    assert_is_one_name(plan.blob, NAME_MAX)
    assert_is_one_name(plan.mount_name, NAME_MAX)
    assert_is_one_name(attempt.dm_name, DM_NAME_LEN - 1)
    assert_is_one_name(attempt.dm_uuid, DM_UUID_LEN - 1)
    assert_is_one_name(names.key_description(volume.id), KEY_DESCRIPTION_MAX)
    assert names.volume_of_dm_uuid(attempt.dm_uuid) == volume.id
    for root, name in ((names.MOUNT_ROOT, plan.mount_name), (names.BLOB_DIRECTORY, plan.blob)):
        assert Path(f"{root}/{name}").resolve().parent == root.resolve()
    try:
        target = crypt_target(volume, plan.rule.crypt, KeyReference("logon", 36))
    except UnsupportedVolumeError as error:
        assert str(error).isprintable()
    else:
        assert 0 < target.length <= volume.size
        assert CryptTarget.from_line(target.to_line()) == target


def assert_is_described_within_bounds(volume: Volume) -> None:
    """Assert that its numbers are numbers, and that its text is safe to print."""
    assert volume.id.diskseq >= 0
    assert volume.id.partition >= 0
    assert volume.size * SECTOR_BYTES > 0
    assert str(volume).isascii()
    assert str(volume).isprintable()


@tries(
    "udev: any properties, through the rules to every name",
    found=properties,
    written=attributes,
    usb=st.dictionaries(st.sampled_from(["serial", "vendor", "model"]), usb_strings),
    source=st.sampled_from(["udev", "kernel"]),
    asked=st.lists(rules, max_size=3).map(tuple) | st.just(BUILT_IN),
)
def test_names_stay_names_whatever_the_medium_holds(
    found: dict[str, str],
    written: dict[str, str],
    usb: dict[str, bytes],
    source: Literal["udev", "kernel"],
    asked: tuple[Rule, ...],
) -> None:
    volume = volume_of(found, written, usb, source)
    if volume is None:
        assert written, "the stick is there"
        return
    assert_is_described_within_bounds(volume)
    match match_rules(asked, volume):
        case Plan() as plan:
            assert_stays_within_bounds(volume, plan)
        case NoMatch() as refused:
            assert all(why for _, why in refused.reasons)
            for why in (why for _, why in refused.reasons):
                of_medium = why.partition(", not ")[0]  # the rule's own words come after it
                assert of_medium.isprintable() or "so it is not" in why


@tries("udev: any label, under a rule that matches all", label=mount_points, template=templates)
def test_a_label_becomes_a_name_or_a_reason(label: str, template: Template) -> None:
    volume = volume_of({"ID_PART_ENTRY_NAME": label, "ID_SERIAL_SHORT": label}, {}, {}, "udev")
    assert volume is not None
    rule = Rule(name="all", key=KeySource(blob=template), mount=MountSettings(name=template))
    match match_rules((rule,), volume):
        case Plan() as plan:
            assert_stays_within_bounds(volume, plan)
        case NoMatch() as refused:
            assert re.match(
                r"all: (the medium has no |'.+' becomes |\w+ '.*' cannot be )", str(refused)
            )
            assert str(refused).isprintable()
            assert str(refused).isascii()


@tries("udev: any text, decoded", value=mount_points)
def test_any_value_is_decoded_to_text_that_can_be_written(value: str) -> None:
    text: Any = sysfs.decoded(value)
    assert isinstance(text, str)
    assert text.encode().decode() == text

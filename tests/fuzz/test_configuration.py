"""Any file in the configuration's place is a configuration, or refused with a readable reason."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st

from caam_hotplug import names
from caam_hotplug.cli import main as cli
from caam_hotplug.config import loader
from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import KeySource, MountSettings, NoMatch, Plan, Rule, match_rules
from caam_hotplug.errors import ConfigError, UnsupportedVolumeError
from caam_hotplug.formats.crypt_table import Crypt, CryptTarget, crypt_target
from caam_hotplug.kernel.config_files import AnyonesFiles
from caam_hotplug.model import KeyReference
from fuzz.inputs import INPUT_FILES, KINDS, mutated, put, tries
from unit.volumes import stick

FOLDER: Final = INPUT_FILES / "configuration"
FILE: Final = FOLDER / "agent.toml"
DROP_INS: Final = FOLDER / names.RULES_DIRECTORY
DROP_INS.mkdir(parents=True)

LONGEST_PROBLEM: Final = 500
"""Characters of a line that a reader still reads."""

_INSTALLED: Final = (Path(__file__).parents[2] / "config" / "agent.toml").read_text("utf-8")
EVERYTHING: Final = re.sub(r"^# (\[.+\]|[a-z_0-9]+ = .+)$", r"\1", _INSTALLED, flags=re.MULTILINE)
"""The installed file without comment signs: each key once or twice."""
SHORT: Final = b"""\
log_level = "debug"
[[rule]]
name = "r"
match = { partlabel = ["a*", "b"], bus = "usb", min_size = "64 MiB", max_size = 4_000_000_000 }
key.blob = "{serial}-{partn}.bb"
crypt = { cipher = "capi:tk(cbc(aes))-plain64", sector_size = 4096, flags = ["allow_discards"] }
mount = { name = "{label}", options = ["nodev"], filesystem_options = { ext4 = ["errors=continue"] } }
"""  # noqa: E501

KEYS: Final = [
    f.name for kind in (Config, Rule, Match, KeySource, Crypt, MountSettings) for f in fields(kind)
]


def load_or_refuse(file: Path = FILE) -> Config | None:
    """Load the configuration and check its bounds; None where it was refused with a reason."""
    try:
        read = loader.load(file, AnyonesFiles())
    except ConfigError as error:
        assert error.faults
        for fault in error.faults:
            assert fault.file in {file, *file.parent.glob("rules.d/*")}
            assert fault.problem
            assert fault.problem.isprintable(), fault.problem
            assert fault.key_path.isprintable(), fault.key_path
            assert len(fault.problem) + len(fault.key_path) <= LONGEST_PROBLEM, fault.problem
            assert str(file.parent) in str(fault)
            assert str(fault).isprintable()
        return None
    for path in (read.blob_directory, read.mount_root):
        assert path.is_absolute()
        assert ".." not in path.parts
        assert str(path).isprintable()
    assert read.stuck_after_s > 0
    assert len({rule.name for rule in read.rule}) == len(read.rule)
    for rule in read.rule:
        assert rule.name.isascii()
        assert rule.name.isprintable()
        assert_acts_within_bounds(rule)
    assert match_rules(read.rule, stick())
    return read


def assert_acts_within_bounds(rule: Rule) -> None:
    """Assert that the rule gives names only, and a target line that the kernel reads."""
    volume = stick(label="l", uuid="u", serial="s", partuuid="p")
    anything = Rule(name="r", key=rule.key, mount=rule.mount)
    match match_rules((anything,), volume):
        case Plan(_, blob, mount_name):
            for name in (blob, mount_name):
                assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name)
            assert len(names.dm_name(volume.id, mount_name)) < 128
        case NoMatch() as refused:
            assert "characters, more than" in str(refused)
    for kind in rule.mount.filesystems:
        for option in rule.mount.options_for(kind):
            assert option.isascii()
            assert option.isprintable()
            assert option.partition("=")[0]
    try:
        target = crypt_target(volume, rule.crypt, KeyReference("logon", 36))
    except UnsupportedVolumeError as error:
        assert str(error).startswith("map sdb1: ")
    else:
        assert CryptTarget.from_line(target.to_line()) == target


@tries("configuration: any bytes", content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    put(FILE, "file", content)
    load_or_refuse()


@tries("configuration: any text", text=st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    put(FILE, "file", text.encode(errors="surrogatepass"))
    load_or_refuse()


@tries(
    "configuration: a valid file, damaged",
    content=mutated(st.sampled_from([SHORT, EVERYTHING.encode()])),
)
def test_a_damaged_file_is_read_or_refused(content: bytes) -> None:
    put(FILE, "file", content)
    load_or_refuse()


def quoted(text: str) -> str:
    """Spell the text as a TOML basic string."""
    return (
        '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'
    )


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = (
    st.sampled_from(
        ["true", "false", "0", "-1", "1", "512", "4096", "nan", "-inf", "inf", "1.5", "1e400",
         "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", '"usb"', '"ext4"', '"mount"', '"64MiB"',
         '"{partlabel}"', '"{serial}.bb"', '"/x"', '"/../x"', '"nodev"', '"ro"', '"rw"', '"a=b"',
         '"capi:tk(cbc(aes))-plain"', "{}", "[]", "0x7fffffffffffffff", "9223372036854775808"]
    )
    | texts.map(quoted)
    | st.integers().map(str)
    | st.integers(min_value=0, max_value=20_000).map(lambda digits: "0x1" + "0" * digits)
    | st.integers(min_value=1, max_value=6_000).map(lambda digits: "9" * digits)
    | st.integers(min_value=0, max_value=50_000).map(lambda length: f'"{"a" * length}"')
    | st.integers(min_value=0, max_value=2_000).map(lambda depth: "[" * depth + "]" * depth)
    | st.integers(min_value=0, max_value=2_000).map(lambda depth: "{a=" * depth + "1" + "}" * depth)
)  # fmt: skip
keys = st.sampled_from(KEYS) | texts.map(quoted) | st.just("a" + ".a" * 3_000)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(keys, inner), max_size=3).map(
            lambda pairs: "{ " + ", ".join(f"{key} = {value}" for key, value in pairs) + " }"
        )
    ),
    max_leaves=6,
)
settings_ = st.tuples(keys, values).map(lambda pair: f"{pair[0]} = {pair[1]}")
headers = st.sampled_from(
    ["[[rule]]\nname = 'r'", "[[rule]]", "[rule.match]", "[rule.key]", "[rule.crypt]",
     "[rule.mount]", "[rule.mount.filesystem_options]", "[rule]", "[a.b.c]"]
)  # fmt: skip
documents = st.lists(headers | settings_, max_size=8).map("\n".join)
in_their_tables = st.tuples(
    st.sampled_from(["match", "key", "crypt", "mount", "mount.filesystem_options"]), keys, values
).map(lambda parts: f"[[rule]]\nname = 'r'\n{parts[0]}.{parts[1]} = {parts[2]}\n")


@tries("configuration: TOML of wrong types, depths and sizes", text=documents | in_their_tables)
def test_toml_of_any_form_is_read_or_refused(text: str) -> None:
    put(FILE, "file", text.encode())
    load_or_refuse()


@contextlib.contextmanager
def drop_ins(files: dict[bytes, tuple[str, bytes]]) -> Iterator[None]:
    """Keep these files in the drop-in folder while the context is open."""
    paths = [Path(os.fsdecode(os.fsencode(DROP_INS) + b"/" + name)) for name in files]
    for path, (kind, content) in zip(paths, files.values(), strict=True):
        put(path, kind, content)
    try:
        yield
    finally:
        for path in DROP_INS.iterdir():
            put(path, "nothing")


file_names = st.sampled_from([b"10-a.toml", b"b.toml", b"\xff.toml", b"a\n.toml", b".toml", b"c"])
contents = (
    st.sampled_from([b"", b'[[rule]]\nname = "a"', b'[[rule]]\nname = "b"', b'mount_root = "/m"'])
    | documents.map(str.encode)
    | st.binary(max_size=40)
)


@tries(
    "configuration: drop-ins of any kind",
    main=contents,
    files=st.dictionaries(file_names, st.tuples(KINDS, contents), max_size=4),
)
def test_drop_ins_of_any_kind_are_read_or_refused(
    main: bytes, files: dict[bytes, tuple[str, bytes]]
) -> None:
    put(FILE, "file", main)
    with drop_ins(files):
        read = load_or_refuse()
        if read is not None:
            for name, (kind, content) in files.items():
                if kind == "file" and name.endswith(b".toml") and b"mount_root" in content:
                    raise AssertionError("a drop-in set more than rules")


@tries(
    "configuration: `check` of any file",
    kind=KINDS,
    content=contents | mutated(st.just(SHORT)),
    name=st.sampled_from(["agent.toml", "x.toml", "\udcff.toml", "rules.d/10-a.toml", "a\x1b[2J"]),
)
def test_check_prints_valid_or_every_fault(kind: str, content: bytes, name: str) -> None:
    file = FOLDER / name
    put(file, kind, content)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict") for _ in "oe")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(["check", str(file)])
    finally:
        put(file, "nothing")
    printed = {stream: written(stream) for stream in (out, err)}
    assert all(line.isprintable() for text in printed.values() for line in text.splitlines())
    match status:
        case 0:
            assert ": valid; rules in the order they are asked: " in printed[out]
        case 1:
            assert printed[out] == ""
            assert str(FOLDER) in printed[err]
        case _:
            raise AssertionError(status)


def written(stream: Any) -> str:
    """Return all that was printed to the stream."""
    stream.flush()
    text: str = stream.buffer.getvalue().decode()
    return text

"""Configuration files for tests: the installed one, small ones, and any that TOML allows."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import strategies as st

from caam_hotplug.config import loader
from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import KeySource, MountSettings, Rule
from caam_hotplug.errors import ConfigError
from caam_hotplug.formats.crypt_table import Crypt
from caam_hotplug.kernel.config_files import AnyonesFiles

INSTALLED = Path(__file__).parents[3] / "config" / "agent.toml"
COMMENTED = re.compile(r"^# (\[.+\]|[a-z_0-9]+ = .+)$", re.MULTILINE)
"""A key or a table header behind a comment sign, as opposed to prose."""
SINGLE = COMMENTED.findall(INSTALLED.read_text(encoding="utf-8").split("\n# [[rule]]\n")[0])
"""Keys behind a comment sign that the file shows before its example."""


def loaded(file: Path, text: str) -> Config:
    """Write the text to the file and load it."""
    file.write_text(text)
    return loader.load(file, AnyonesFiles())


def faults(file: Path, text: str) -> list[str]:
    """List every fault of the text as `KEY PATH: PROBLEM`."""
    file.write_text(text)
    return faults_of(file)


def faults_of(file: Path) -> list[str]:
    """List every fault of the file and its drop-ins as `KEY PATH: PROBLEM`."""
    with pytest.raises(ConfigError) as caught:
        loader.load(file, AnyonesFiles())
    assert str(caught.value) == "\n".join(str(fault) for fault in caught.value.faults)
    return [f"{fault.key_path}: {fault.problem}" for fault in caught.value.faults]


def in_rule(line: str) -> str:
    """Make a configuration of one rule with this line."""
    return f'[[rule]]\nname = "r"\n{line}\n'


keys = st.sampled_from(
    [
        f.name
        for kind in (Config, Rule, Match, KeySource, Crypt, MountSettings)
        for f in fields(kind)
    ]
) | st.just("xyzzy")
values = st.recursive(
    st.sampled_from(
        ["true", "0", "-1", "4096", "nan", "inf", "1.5", '""', '"usb"', '"ext4"', "1979-05-27",
         "07:32:00", '"{partlabel}"', '"64MiB"', '"/x"', '"\\u0000"', "{}", "[]"]
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
    | st.tuples(keys, inner).map(lambda pair: f"{{ {pair[0]} = {pair[1]} }}"),
    max_leaves=4,
)  # fmt: skip
headers = st.sampled_from(
    ["[[rule]]", "[rule.match]", "[rule.key]", "[rule.crypt]", "[rule.mount]", 'name = "r"']
)
lines = headers | st.tuples(keys, values).map(lambda pair: f"{pair[0]} = {pair[1]}")
documents = st.lists(lines, max_size=8).map("\n".join)
single_keys = st.tuples(st.sampled_from(["match", "key", "crypt", "mount"]), keys, values).map(
    lambda parts: in_rule(f"{parts[0]}.{parts[1]} = {parts[2]}")
)

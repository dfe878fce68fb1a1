"""The configuration file that is installed."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from generate_schema import as_written

from caam_hotplug.config import loader
from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, KeySource, MountSettings, Rule
from caam_hotplug.formats.crypt_table import Crypt
from caam_hotplug.kernel.config_files import AnyonesFiles
from unit.config.files import (
    COMMENTED,
    INSTALLED,
    SINGLE,
    loaded,
)


def test_the_installed_file_has_the_same_effect_as_none() -> None:
    installed = loader.load(INSTALLED, AnyonesFiles())
    rules = tuple(replace(rule, name=BUILT_IN[0].name) for rule in installed.rule)
    assert replace(installed, rule=rules) == Config()


@pytest.mark.parametrize("described", [Config, Rule, Match, KeySource, Crypt, MountSettings])
def test_the_installed_file_shows_every_key(described: type[Any]) -> None:
    text = INSTALLED.read_text(encoding="utf-8")
    for field in fields(described):
        key = rf"^(# )?(\[+(rule\.)?{field.name}\]+|{field.name} = .+)$"
        assert re.search(key, text, re.MULTILINE), field.name


def test_the_installed_file_is_valid_without_any_comment_sign(file: Path) -> None:
    everything = loaded(file, COMMENTED.sub(r"\1", INSTALLED.read_text(encoding="utf-8")))
    assert [rule.name for rule in everything.rule] == ["removable", "cartridge"]
    cartridge = everything.rule[1]
    assert cartridge.crypt.sector_size == 4096
    assert cartridge.mount.filesystem_options["vfat"] == ("utf8",)


def test_a_default_that_the_installed_file_shows_is_the_default() -> None:
    text = INSTALLED.read_text(encoding="utf-8")
    table = tomllib.loads(COMMENTED.sub(r"\1", text))
    first = table["rule"][0]
    del table["rule"], first["name"]
    shown_match = first.pop("match")
    assert table == {key: as_written(getattr(Config(), key)) for key in table}
    assert first["mount"].pop("path")  # an example
    builtin = BUILT_IN[0]
    for part in ("key", "crypt", "mount"):
        shown = first.pop(part)
        assert shown == {key: as_written(getattr(getattr(builtin, part), key)) for key in shown}
    assert first == {key: as_written(getattr(builtin, key)) for key in first}
    for key in ("bus", "removable", "partlabel", "devtype"):
        assert shown_match[key] == as_written(getattr(builtin.match, key))


@pytest.mark.parametrize("line", SINGLE)
def test_every_commented_key_is_valid_where_it_stands(line: str, file: Path) -> None:
    text = INSTALLED.read_text(encoding="utf-8")
    assert loaded(file, text.replace(f"\n# {line}\n", f"\n{line}\n", 1)).rule[0].name == "removable"

"""The editor's JSON Schemas: up to date, and of one mind with the agent about every file."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generate_schema
import pytest
from generate_schema import NoSchemaError
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from caam_hotplug.config import checks, loader
from caam_hotplug.config.match import Bytes
from caam_hotplug.config.templates import PathTemplate, Template, UnitTemplate
from caam_hotplug.errors import ConfigError
from caam_hotplug.kernel.config_files import AnyonesFiles
from unit.config.files import COMMENTED, INSTALLED, SINGLE, documents, in_rule, single_keys
from unit.config.mistakes import FILE_FAULTS, RULE_FAULTS

REPOSITORY = Path(__file__).parents[3]
GENERATED = generate_schema.generated()
SCHEMAS = {Path(name).name: json.loads(text) for name, text in GENERATED.items()}
AGENT = Draft202012Validator(SCHEMAS["agent.schema.json"])
DROP_IN = Draft202012Validator(SCHEMAS["drop-in.schema.json"])
TEXT = INSTALLED.read_text(encoding="utf-8")
ONLY_THE_AGENT_REFUSES = {'mount_root = "//run/media"', "stuck_after_s = nan"}
"""Mistakes that no schema here expresses: pathlib folds other slashes, and JSON has no nan."""


@pytest.mark.parametrize("name", GENERATED)
def test_the_committed_schema_is_what_the_generator_writes(name: str) -> None:
    assert (REPOSITORY / name).read_text() == GENERATED[name], "run `make man`"


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
def test_a_schema_is_one_of_json_schema_2020_12(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


def test_the_installed_file_names_its_schema_first_and_is_valid_under_it() -> None:
    assert TEXT.startswith("#:schema /usr/share/caam-hotplug/agent.schema.json\n")
    assert AGENT.is_valid(tomllib.loads(TEXT))
    assert AGENT.is_valid(tomllib.loads(COMMENTED.sub(r"\1", TEXT)))


@pytest.mark.parametrize("line", SINGLE)
def test_every_commented_key_of_the_installed_file_is_valid(line: str) -> None:
    assert AGENT.is_valid(tomllib.loads(TEXT.replace(f"\n# {line}\n", f"\n{line}\n", 1)))


def test_a_drop_in_has_rules_and_no_key_of_the_agent() -> None:
    rules = tomllib.loads(in_rule('match.partlabel = "a"'))
    assert AGENT.is_valid(rules)
    assert DROP_IN.is_valid(rules)
    assert not DROP_IN.is_valid(rules | {"log_level": "info"})


@pytest.mark.parametrize(
    "text", [*(text for text, _ in FILE_FAULTS), *(in_rule(line) for line, _ in RULE_FAULTS)]
)
def test_a_mistake_that_the_agent_names_is_one_under_the_schema(text: str) -> None:
    assert AGENT.is_valid(tomllib.loads(text)) == (text in ONLY_THE_AGENT_REFUSES)


@given(documents | single_keys)
def test_the_schema_takes_whatever_the_agent_takes(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"schema-{os.getpid()}.toml"
    file.write_text(text)
    try:
        loader.load(file, AnyonesFiles())
    except ConfigError:
        return
    assert AGENT.is_valid(tomllib.loads(text))


pieces = st.sampled_from(
    ["{uuid}", "{uuid:}", "{label", "{x}", "{uuid!r}", "a", "-", ".", "@", ":", "/", " ", "{{"]
)
template_texts = st.lists(pieces, max_size=5).map("".join)
unit_texts = st.tuples(template_texts, st.sampled_from([".service", ".target", ".mount", ""])).map(
    "".join
)
size_texts = st.tuples(
    st.sampled_from(["", "0", "64", "1_0", "-1", "9" * 21, "٣"]),
    st.sampled_from(["", " ", "  "]),
    st.sampled_from(["", "KiB", "MiB", "MB", "mib", "TiB "]),
).map("".join)


def takes(read: Callable[[str], object], text: str) -> bool:
    """Whether the agent reads the text."""
    try:
        read(text)
    except ValueError:
        return False
    return True


@given(template_texts, unit_texts, size_texts)
def test_a_text_of_a_form_of_its_own_is_valid_where_the_agent_reads_it(
    template: str, unit: str, size: str
) -> None:
    rule = {"name": "r"}
    path = f"/{template}"
    for key, text, read in (
        ("mount", {"path": path}, takes(PathTemplate, path)),
        ("key", {"blob": template}, takes(Template, template)),
        ("on_mount", unit, takes(UnitTemplate, unit)),
        ("match", {"min_size": size}, takes(Bytes.from_text, size)),
    ):
        assert AGENT.is_valid({"rule": [rule | {key: text}]}) == read


def described(key: str) -> dict[str, Any]:
    """The schema of the key at this path."""
    schema = SCHEMAS["agent.schema.json"]
    for part in key.split("."):
        schema = schema.get("items", schema)["properties"][part]
    return schema


@pytest.mark.parametrize("key", sorted({*checks.CHECKS, *checks.MAY_BE_EMPTY}))
def test_every_check_is_one_of_a_key_that_there_is(key: str) -> None:
    assert described(key)


def test_a_key_is_described_with_its_default_and_its_choices() -> None:
    assert described("rule.mount.options") == {
        "description": "Options of the mount; a list here replaces the default.",
        "type": "array",
        "items": {
            "enum": [
                "nosuid",
                "nodev",
                "noexec",
                "nosymfollow",
                "noatime",
                "nodiratime",
                "relatime",
                "strictatime",
            ]
        },
        "default": ["nosuid", "nodev", "noexec"],
    }


@dataclass
class OfStrangeType:
    """A table with a key of a type that no rule describes."""

    key: complex = 0j
    """A key."""


@dataclass
class OfStrangeDefault:
    """A table with a key whose default no rule describes."""

    key: str = b"x"  # type: ignore[assignment]
    """A key."""


@dataclass
class WithoutWords:
    """A table with a key that nothing describes."""

    key: str = ""


@dataclass
class OfPlainText:
    """A table with a key that any rule describes."""

    key: str = ""
    """A key."""


@pytest.mark.parametrize("kind", [OfStrangeType, OfStrangeDefault, WithoutWords])
def test_a_type_that_no_rule_describes_fails_the_generator(kind: type) -> None:
    with pytest.raises(NoSchemaError, match=r"key|b'x'"):
        generate_schema.table(kind, "")


def test_a_check_that_no_rule_describes_fails_the_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert re.search("A key", str(generate_schema.table(OfPlainText, "")))
    monkeypatch.setitem(checks.CHECKS, "key", object())
    with pytest.raises(NoSchemaError, match="for the check"):
        generate_schema.table(OfPlainText, "")

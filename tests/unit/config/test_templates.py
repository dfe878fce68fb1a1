from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.config.templates import PathTemplate, Template, UnitTemplate, UnsafeNameError
from caam_hotplug.model import Volume
from unit.volumes import stick, volumes


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


@pytest.mark.parametrize(
    ("template", "unit"),
    [
        ("ingest.target", "ingest.target"),
        ("ingest@{partlabel}.service", "ingest@cartridge.service"),
        ("a-{diskseq}-{partn}@b@{serial}-{partn}.target", "a-7-1@b@4711-1.target"),
        ("{partn}.service", "1.service"),
    ],
)
def test_a_units_name_may_have_what_is_on_a_medium_after_the_at(template: str, unit: str) -> None:
    assert UnitTemplate(template).render(stick(serial="4711")) == unit


@pytest.mark.parametrize("field", ["partlabel", "partuuid", "label", "uuid", "serial"])
@pytest.mark.parametrize(
    "template",
    [
        "{}.target",
        "{}.service",
        "systemd-{}.service",
        "{}@a.service",
        "a{}@{}.service",
        "{}{}.target",
    ],
)
def test_nothing_on_a_medium_chooses_a_unit(template: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"a medium's {field} would choose the unit, as poweroff"):
        UnitTemplate(template.replace("{}", f"{{{field}}}"))


@pytest.mark.parametrize("text", ["a@.service", "@a.service", "@{uuid}.target", "@.target"])
def test_a_unit_that_systemd_would_not_start_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a name before the @, and one after it"):
        UnitTemplate(text)


@pytest.mark.parametrize(
    ("template", "path", "glob"),
    [
        ("/srv/recorder", "/srv/recorder", "/srv/recorder"),
        ("/recorder", "/recorder", "/recorder"),
        ("/srv/{partlabel}-{diskseq}", "/srv/cartridge-7", "/srv/?*"),
        ("/srv/a-{partlabel}.b", "/srv/a-cartridge.b", "/srv/a-?*.b"),
        ("/srv/{partlabel}/data", "/srv/cartridge/data", None),
    ],
)
def test_a_path_has_a_name_for_each_of_its_templates(
    template: str, path: str, glob: str | None
) -> None:
    made = PathTemplate(template)
    assert (made.render(stick()), made.glob) == (path, glob)
    assert made.placeholders == {field for name in made.names for field in name.placeholders}


@pytest.mark.parametrize(
    "text",
    ["", "/", "srv", "./srv", "//srv", "/srv/", "/srv//a", "/srv/.", "/srv/..", "/../srv",
     "/srv/.hidden", "/srv/-a", "/srv/a b", "/srv/{vendor}", "/srv/{partlabel:/}", "/srv/ü",
     "/srv/{partlabel!r}", "/srv/\0"],
)  # fmt: skip
def test_a_path_that_could_lead_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"expected an absolute path|name|is not one of|expected '}'|unmatched"
    ):
        PathTemplate(text)


def test_a_mediums_text_adds_no_name_to_a_path() -> None:
    for label in ("../etc", "a/b", "..", "/etc", ""):
        with pytest.raises(UnsafeNameError):
            PathTemplate("/srv/{partlabel}").render(stick(partlabel=label))


def test_paths_are_equal_if_their_texts_are() -> None:
    path = PathTemplate("/srv/{uuid}")
    assert path == PathTemplate("/srv/{uuid}") != PathTemplate("/srv/{label}")
    assert path != "/srv/{uuid}"
    assert {path: 1}[PathTemplate("/srv/{uuid}")] == 1
    assert repr(path) == "PathTemplate('/srv/{uuid}')"


def test_templates_are_equal_if_their_texts_are() -> None:
    assert Template("{uuid}") == Template("{uuid}") != Template("{label}")
    assert Template("{uuid}") != "{uuid}"
    assert {Template("{uuid}"): 1}[Template("{uuid}")] == 1
    assert repr(Template("{uuid}")) == "Template('{uuid}')"


def test_a_placeholder_that_the_medium_has_no_value_for_is_named() -> None:
    with pytest.raises(UnsafeNameError, match=r"^the medium has no serial$"):
        Template("{serial}").render(stick())


def test_a_value_that_could_lead_elsewhere_is_shown_escaped() -> None:
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

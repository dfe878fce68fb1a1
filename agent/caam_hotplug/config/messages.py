"""The words of a fault: what was expected, what was found, what may have been meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, get_args, get_origin

from caam_hotplug.config.convert import choices_of
from caam_hotplug.errors import shown


def mismatch(value: Any, wanted: Any) -> str:
    """Describe a value that is of another type than the one wanted."""
    choices = list(choices_of(wanted))
    if not choices:
        return f"expected {' or '.join(dict.fromkeys(_kinds(wanted)))}, found {found(value)}"
    wants_list = get_origin(wanted) is tuple
    expected = f"expected {'a list of ' if wants_list else ''}{', '.join(map(str, choices))}"
    if wants_list and not isinstance(value, list):
        return f"{expected}; found {found(value)}"
    wrong = [
        item
        for item in (value if isinstance(value, list) else [value])
        if item not in choices or isinstance(item, float)
    ]
    hint = _nearest(wrong[0], choices) if wrong and isinstance(wrong[0], str) else ""
    return f"{expected}; found {', '.join(map(found, wrong))}{hint}"


_KINDS: Final[dict[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a table",
    tuple: "a list of texts",
}


def _kinds(wanted: Any) -> Iterator[str]:
    """Yield the words for the type, or for each type of a union."""
    kind = _KINDS.get(get_origin(wanted) or wanted)
    if kind is not None:
        yield kind
    else:
        for part in get_args(wanted):
            yield from _kinds(part)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Describe a key that is not known, with the known key that is most like it."""
    return "is not a key here" + (_nearest(key, known) or f"; known are {', '.join(known)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that is most like this one; empty if none is."""
    import difflib  # noqa: PLC0415  200 kB, and only a mistake needs it

    texts = [choice for choice in known if isinstance(choice, str)]
    near = difflib.get_close_matches(word[:_SHOWN_LENGTH].lower(), texts, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def found(value: Any) -> str:
    """Spell a value of a file as TOML does, shortened."""
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return "a table"
        case list():
            return "a list"
        case int() if abs(value) >> 64:  # of which Python may refuse to print the digits
            return "a number of more than 64 bits"
        case str() if len(value) > _SHOWN_LENGTH:
            return f"{value[:_SHOWN_LENGTH]!r} and {len(value) - _SHOWN_LENGTH} characters more"
    return repr(value)


_SHOWN_LENGTH: Final = 60


def one_line(problem: object) -> str:
    """Shorten the problem to one line that a reader reads to its end."""
    line = shown(problem)
    return line if len(line) <= 400 else f"{line[:300]} … {line[-60:]}"


_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def key_path(at: str, key: str) -> str:
    """Join the path of a table and a key, such as `rule[1].match` and `partlabel`."""
    shortened = key if len(key) <= _SHOWN_LENGTH else f"{key[:_SHOWN_LENGTH]}…"
    spelled = key if _BARE_KEY.fullmatch(shortened) else repr(shortened)
    return f"{at}.{spelled}" if at else spelled

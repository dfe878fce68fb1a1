"""File names and unit names with places for what identifies a volume."""

from __future__ import annotations

import re
import string
from typing import ClassVar, Final

from caam_hotplug import names
from caam_hotplug.model import Volume


class UnsafeNameError(ValueError):
    """A value of the medium cannot become part of a path."""


class Template:
    """A file name with places for what identifies a volume, such as `{partlabel}.bb`."""

    _MAX_LENGTH: ClassVar = names.RENDERED_MAX_LENGTH
    FIELDS: Final = ("partlabel", "partuuid", "label", "uuid", "serial", "diskseq", "partn")

    def __init__(self, text: str) -> None:
        """Raises: ValueError if the text has unknown places, or could leave its directory."""
        self.text = text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
        for literal, place, spec, conversion in self._parts:
            self._check(literal)
            if place is not None and (place not in self.FIELDS or spec or conversion):
                known = ", ".join(f"{{{name}}}" for name in self.FIELDS)
                raise ValueError(f"{text!r}: {{{place}}} is not one of {known}")
        if not text or text[0] in ".-":
            raise ValueError(f"{text!r}: a name must not be empty or start with . or -")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def places(self) -> set[str]:
        """Which facts of a volume are part of the name."""
        return {place for _, place, _, _ in self._parts if place is not None}

    def render(self, volume: Volume) -> str:
        """The name for this volume. Raises: UnsafeNameError with the reason."""
        name = "".join(
            literal + ("" if place is None else self._value(place, volume))
            for literal, place, _, _ in self._parts
        )
        if len(name) > self._MAX_LENGTH:
            raise UnsafeNameError(
                f"{self.text!r} becomes {len(name)} characters, more than {self._MAX_LENGTH}"
            )
        return name

    def _check(self, literal: str) -> None:
        """Raises: ValueError for what cannot stand between the places."""
        if "/" in literal:
            raise ValueError(f"{self.text!r} names a path; expected one file name")
        if not names.PLAIN_TEXT.fullmatch(literal):
            raise ValueError(f"{self.text!r}: file names here are made of A-Z a-z 0-9 . _ -")

    def _value(self, place: str, volume: Volume) -> str:
        match place:
            case "diskseq":
                return str(volume.id.diskseq)
            case "partn":
                return str(volume.id.partition)
        value: str | None = getattr(volume, place)
        if value is None:
            raise UnsafeNameError(f"the medium has no {place}")
        reason = names.why_unsafe(value)
        if reason is not None:
            raise UnsafeNameError(f"{place} {value!a} cannot be part of a file name: {reason}")
        return value


class UnitTemplate(Template):
    """The name of a systemd unit, such as `ingest@{partlabel}.service`."""

    _LITERAL: Final = re.compile(r"[A-Za-z0-9:_.@-]*")
    _SUFFIXES: Final = (".service", ".target")
    _MAX_LENGTH: ClassVar = 255

    def __init__(self, text: str) -> None:
        """Raises: ValueError if it cannot become a unit's name."""
        super().__init__(text)
        if not text.endswith(self._SUFFIXES):
            raise ValueError(f"{text!r}: expected a unit whose name ends in .service or .target")

    def _check(self, literal: str) -> None:
        if not self._LITERAL.fullmatch(literal):
            raise ValueError(f"{self.text!r}: unit names here are made of A-Z a-z 0-9 : _ . @ -")

    def _value(self, place: str, volume: Volume) -> str:
        """Escaped, so that `%I` in the unit is the value (systemd-escape(1))."""
        return super()._value(place, volume).replace("-", "\\x2d")

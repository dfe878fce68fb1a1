"""File names and unit names with placeholders for what identifies a volume."""

from __future__ import annotations

import re
import string
from typing import ClassVar, Final

from caam_hotplug import names
from caam_hotplug.model import Volume

Name = str | tuple[str, str]
"""A name as its text, or, with placeholders, as what is before the first and after the last."""


class UnsafeNameError(ValueError):
    """A value from the medium cannot become part of a path."""


class Template:
    """A file name with placeholders for what identifies a volume, such as `{partlabel}.bb`."""

    FIELDS: Final = ("partlabel", "partuuid", "label", "uuid", "serial", "diskseq", "partn")
    CHARACTERS: ClassVar = "A-Za-z0-9._-"
    """Characters between the placeholders, as a regular expression has them in brackets."""
    SUFFIXES: ClassVar[tuple[str, ...]] = ("",)
    _MAX_LENGTH: ClassVar = names.RENDERED_MAX_LENGTH
    _KIND: ClassVar = "file name"
    _SPELLED: ClassVar = "A-Z a-z 0-9 . _ -"

    def __init__(self, text: str) -> None:
        """Raises: ValueError for unknown placeholders, or a name that could leave its directory."""
        self.text = text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
        for literal, field, spec, conversion in self._parts:
            self._require_plain(literal)
            if field is not None and (field not in self.FIELDS or spec or conversion):
                known = ", ".join(f"{{{name}}}" for name in self.FIELDS)
                raise ValueError(f"{text!r}: {{{field}}} is not one of {known}")
        if not text or text[0] in ".-":
            raise ValueError(f"{text!r}: a name must not be empty or start with . or -")
        self.placeholders = frozenset(field for _, field, _, _ in self._parts if field is not None)
        """The facts of a volume that are part of the name."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def render(self, volume: Volume) -> str:
        """Make the name for this volume. Raises: UnsafeNameError with the reason."""
        name = "".join(
            literal + ("" if field is None else self._value(field, volume))
            for literal, field, _, _ in self._parts
        )
        if len(name) > self._MAX_LENGTH:
            raise UnsafeNameError(
                f"{self.text!r} becomes {len(name)} characters, more than {self._MAX_LENGTH}"
            )
        return name

    def _require_plain(self, literal: str) -> None:
        """Raises: ValueError for a text that cannot stand between the placeholders."""
        if "/" in literal:
            raise ValueError(f"{self.text!r} names a path; expected one {self._KIND}")
        if not re.fullmatch(f"[{self.CHARACTERS}]*", literal):
            raise ValueError(f"{self.text!r}: {self._KIND}s here are made of {self._SPELLED}")

    def _value(self, field: str, volume: Volume) -> str:
        """Look up the volume's value for a placeholder. Raises: UnsafeNameError."""
        match field:
            case "diskseq":
                return str(volume.id.diskseq)
            case "partn":
                return str(volume.id.partition)
        value: str | None = getattr(volume, field)
        if value is None:
            raise UnsafeNameError(f"the medium has no {field}")
        reason = names.why_unsafe(value)
        if reason is not None:
            raise UnsafeNameError(f"{field} {value!a} cannot be part of a file name: {reason}")
        return value


class PathTemplate:
    """A path from the root on, each of whose names is a template, such as `/srv/{partlabel}`."""

    def __init__(self, text: str) -> None:
        """Raises: ValueError for a path that is not absolute, or goes up or through no name."""
        self.text = text
        if not text.startswith("/") or text == "/":
            raise ValueError(f"{text!r}: expected an absolute path such as /srv/recorder")
        try:
            self.names: Final = tuple(Template(name) for name in text[1:].split("/"))
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @property
    def placeholders(self) -> set[str]:
        """The facts of a volume that are part of the path."""
        return {field for name in self.names for field in name.placeholders}

    @property
    def parts(self) -> list[Name]:
        """The names of the path, the last being the mount point's."""
        return [
            (name.text.partition("{")[0], name.text.rpartition("}")[2])
            if name.placeholders
            else name.text
            for name in self.names
        ]

    @property
    def glob(self) -> str | None:
        """The path with a glob as its last name; None if volumes choose one of those above."""
        *above, last = self.parts
        if any(isinstance(name, tuple) for name in above):
            return None
        name = "?*".join(last) if isinstance(last, tuple) else last
        return f"{self.text.rpartition('/')[0]}/{name}"

    def render(self, volume: Volume) -> str:
        """Make the path for this volume. Raises: UnsafeNameError with the reason."""
        return "".join(f"/{name.render(volume)}" for name in self.names)


class UnitTemplate(Template):
    """The name of a systemd unit, such as `ingest@{partlabel}.service`.

    What is written on a medium is the instance of a unit at most, and so never chooses the unit.
    """

    OF_THE_KERNEL: Final = ("diskseq", "partn")
    """Placeholders that may stand before the @: numbers, which nobody writes on a medium."""
    CHARACTERS: ClassVar = "A-Za-z0-9:_.@-"
    SUFFIXES: ClassVar[tuple[str, ...]] = (".service", ".target")
    _MAX_LENGTH: ClassVar = 255
    _KIND: ClassVar = "unit name"
    _SPELLED: ClassVar = "A-Z a-z 0-9 : _ . @ -"

    def __init__(self, text: str) -> None:
        """Raises: ValueError if it cannot become a unit's name."""
        super().__init__(text)
        if not text.endswith(self.SUFFIXES):
            raise ValueError(f"{text!r}: expected a unit whose name ends in .service or .target")
        unit, at, instance = text.partition("@")
        for _, field, _, _ in string.Formatter().parse(unit):
            if field is not None and field not in self.OF_THE_KERNEL:
                raise ValueError(
                    f"{text!r}: a medium's {field} would choose the unit, as poweroff; expected it "
                    f"after an @, as in ingest@{{{field}}}.service"
                )
        if not unit or (at and instance in self.SUFFIXES):
            raise ValueError(f"{text!r}: expected a name before the @, and one after it")

    def _value(self, field: str, volume: Volume) -> str:
        """Escape the value, so that `%I` in the unit is the value (systemd-escape(1))."""
        return super()._value(field, volume).replace("-", "\\x2d")

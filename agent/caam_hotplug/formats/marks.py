"""What an agent remembers of a volume for later runs, as a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, State, Volume, VolumeId


@dataclass(frozen=True, slots=True)
class Mark:
    """How a volume was released, and which of its data were lost."""

    volume: Volume
    """As it was known: the kernel has no partitions of an ejected disk."""
    state: State | None = None
    """LOCKED or EJECTED; None for a volume that is served."""
    is_held: bool = False
    """Whether its disk was held against all others."""
    lost: str = ""
    """What could not be written to it; empty if everything was."""
    is_unmounted: bool = False
    """Whether it was unlocked, and not mounted, on request."""
    released: str = ""
    """What it was released for, in words, while others may hold its mapping; else empty."""

    def to_text(self) -> str:
        """Return the text."""
        facts = {each.name: getattr(self.volume, each.name) for each in fields(self.volume)}
        for name, kind in _AS_TEXT.items():
            facts[name] = kind(facts[name])
        state = None if self.state is None else self.state.value
        how = {"held": self.is_held, "lost": self.lost, "unmounted": self.is_unmounted}
        return json.dumps({"state": state, **how, "released": self.released, "volume": facts})

    @classmethod
    def from_text(cls, text: str) -> Mark | None:
        """Parse what `to_text` returns; None for any other form."""
        if not text:  # as of nearly every volume
            return None
        try:
            found = json.loads(text)
            state = None if found["state"] is None else State(found["state"])
            how = (bool(found["held"]), str(found["lost"]), bool(found.get("unmounted")))
            return cls(_volume(found["volume"]), state, *how, str(found.get("released") or ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _value(member: Any) -> str:
    return str(member.value)


_AS_TEXT: Final[dict[str, Callable[[Any], str]]] = {
    "id": str,
    "number": str,
    "devtype": _value,
    "bus": _value,
}


def _volume(facts: Mapping[str, Any]) -> Volume:
    """Raises: ValueError, KeyError, TypeError or AttributeError for facts of another form."""
    which = VolumeId.from_text(facts["id"])
    if which is None:
        raise ValueError("no volume")
    known = {each.name for each in fields(Volume)}
    return Volume(
        **{
            **{name: value for name, value in facts.items() if name in known},
            "id": which,
            "number": DeviceNumber.from_text(facts["number"]),
            "devtype": DevType(facts["devtype"]),
            "bus": Bus(facts["bus"]),
            "size": Sectors(int(facts["size"])),
        }
    )

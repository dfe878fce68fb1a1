"""Whether a mapping that has a volume's DM-UUID is adopted, made anew, or left alone."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from caam_hotplug import names
from caam_hotplug.config.rules import Rule
from caam_hotplug.errors import ForeignMappingError, UnsupportedVolumeError
from caam_hotplug.formats.blobs import KEY_TYPES
from caam_hotplug.formats.crypt_table import CryptTarget, cipher_for, crypt_target
from caam_hotplug.model import KeyReference, KeyType, Mapping, Volume
from caam_hotplug.volume.target import Target

_LEFT_ALONE: Final = "it is left alone until that is restored"


def may_be_adopted(existing: Mapping, target: Target) -> bool:
    """Return whether our mapping can be adopted; otherwise it is to be made anew.

    One in use stays as it was made: its users read and write by that. Another sector size in the
    rule, or a partition that has grown, count from the next unlock on.
    Raises: ForeignMappingError for one that does something else.
    """
    if not existing.table:
        return False
    crypt = leading_to(existing, target.volume, target.plan.rule)
    if crypt is not None and _is_as_asked(crypt, target):
        return True
    if crypt is not None and not existing.open_count:
        return False
    if crypt is not None and _fits(crypt, target):
        return True
    until = "it goes when it is closed" if existing.is_removed_at_last_close else _LEFT_ALONE
    raise ForeignMappingError(
        f"mapping {existing.name} is not what rule {target.plan.rule.name!r} asks for: "
        f"{'; '.join(existing.table)}; {until}, or `lock` releases it"
    )


def leading_to(mapping: Mapping, volume: Volume, rule: Rule | None) -> CryptTarget | None:
    """Return the crypt target of a mapping by which a write reaches the volume as encrypted.

    It leads to the volume's device, with the volume's key and the rule's cipher; with any cipher if
    no rule matches. None for any other mapping: nothing may be flushed through it.
    """
    crypt = CryptTarget.from_line(mapping.table[0]) if len(mapping.table) == 1 else None
    kind = None if crypt is None else _kind(crypt, volume)
    if crypt is None or kind is None or crypt.device != volume.number:
        return None
    return crypt if rule is None or crypt.cipher == cipher_for(rule.crypt, kind) else None


def _kind(crypt: CryptTarget, volume: Volume) -> KeyType | None:
    """Return the type of the volume's key; None for the key of anything else."""
    kind, _, description = crypt.key_description.partition(":")
    is_its_key = description == names.key_description(volume.id)
    return next((each for each in KEY_TYPES.values() if is_its_key and each == kind), None)


def _fits(crypt: CryptTarget, target: Target) -> bool:
    """Whether it begins where the rule says, and ends within the volume."""
    offset = target.plan.rule.crypt.offset
    return crypt.offset == offset and offset + crypt.length <= target.volume.size


def _is_as_asked(crypt: CryptTarget, target: Target) -> bool:
    """Whether the rule asks for this crypt target, under a key of any type that it allows."""
    rule = target.plan.rule
    forms = KEY_TYPES.values() if rule.key.form is None else [KEY_TYPES[rule.key.form]]
    with suppress(UnsupportedVolumeError):  # it has grown or shrunk since
        return any(
            crypt.does_the_same(crypt_target(target.volume, rule.crypt, KeyReference(kind, 0)))
            for kind in forms
            if crypt.key_description.startswith(f"{kind}:")
        )
    return False

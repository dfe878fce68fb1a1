"""A test key of each kind that this kernel has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, cast

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.formats import blobs
from caam_hotplug.formats.crypt_table import CIPHERS
from caam_hotplug.kernel import caam, memory, test_mapping, trusted
from measure.running import MeasureError
from measure.throughput.rows import Key

TAGGED_BYTES: Final = 16
TRUSTED_BYTES: Final = 64
SOFTWARE_BYTES: Final = 16


@contextmanager
def new_test_keys(absent: dict[str, str]) -> Iterator[list[Key]]:
    """Provide a key of each kind; of those that the kernel has not, `absent` says why.

    Raises: MeasureError if it has none that is sealed.
    """
    with ExitStack() as held:
        plain = held.enter_context(memory.random_key(SOFTWARE_BYTES))
        add = test_mapping.logon_key(plain)
        found = [
            Key("bare", "", "", None),
            Key("software", "capi:cbc(aes)-plain", "cbc(aes)", add),
        ]
        try:
            found.append(_tagged(held))
        except HotplugError as error:
            absent["tagged"] = str(error)
        try:
            found.append(_trusted())
        except HotplugError as error:
            absent["trusted"] = str(error)
        if len(absent) == 2:
            raise MeasureError(
                f"this kernel can seal no key; tagged: {absent['tagged']}; trusted: "
                f"{absent['trusted']}; `caam-hotplug doctor` says what is missing"
            )
        yield found


def _tagged(held: ExitStack) -> Key:
    blob = caam.create_blob(names.CAAM_DEVICE, "ecb", TAGGED_BYTES)
    black = held.enter_context(caam.import_blob(names.CAAM_DEVICE, blob))
    return Key("tagged", CIPHERS["logon"], "tk(cbc(aes))", test_mapping.logon_key(black))


def _trusted() -> Key:
    trusted.is_offered()  # and loaded
    sealed = blobs.parse(trusted.seal_trusted(TRUSTED_BYTES), "trusted")
    add = test_mapping.trusted_key(cast(blobs.Trusted, sealed), TRUSTED_BYTES)
    return Key("trusted", CIPHERS["trusted"], "xts(aes)", add)

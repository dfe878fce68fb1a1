"""Python's modules that others import in passing and nobody here has a use for."""

from __future__ import annotations

import sys
from types import ModuleType


class _Sonames(ModuleType):
    """In place of ctypes.util."""

    @staticmethod
    def find_library(name: str) -> str:
        """What the library of this name is called where it is installed."""
        return f"lib{name}.so.1"


def leave_out() -> None:
    """They do not come into this process's memory, if they have not yet.

    asyncio imports ssl and does without where Python has none: OpenSSL takes 4 MB. pyudev asks
    ctypes.util for libudev, which would start ldconfig, may try gcc, and imports what unpacks
    archives.
    """
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    sys.modules.setdefault("ctypes.util", _Sonames("ctypes.util"))

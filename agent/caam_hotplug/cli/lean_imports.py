"""Placeholders for modules of Python that others import and the agent does not use."""

from __future__ import annotations

import sys
from types import ModuleType


class _CtypesUtil(ModuleType):
    """Stands in for ctypes.util."""

    @staticmethod
    def find_library(name: str) -> str:
        """Return the file name under which the library is installed."""
        return f"lib{name}.so.1"


def leave_out() -> None:
    """Keep the modules out of the memory of this process, unless they are loaded already.

    asyncio imports ssl and does without it if Python has none: OpenSSL takes 4 MB. pyudev asks
    ctypes.util for libudev. That would start ldconfig, perhaps gcc, and import archive formats.
    """
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    sys.modules.setdefault("ctypes.util", _CtypesUtil("ctypes.util"))

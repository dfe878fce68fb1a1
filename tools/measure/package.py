"""The `caam_hotplug` package, which belongs to the agent and is not on Python's path everywhere."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Final

HOMES: Final = (
    Path(__file__).resolve().parent.parent.parent / "agent",
    Path("/usr/lib/caam-hotplug"),
    Path("/usr/local/lib/caam-hotplug"),
)
"""Where an installed agent, or a checkout, has the package."""


def make_importable() -> None:
    """Add the package's directory to Python's path, unless Python finds the package without it."""
    if importlib.util.find_spec("caam_hotplug") is not None:
        return
    found = next((home for home in HOMES if (home / "caam_hotplug").is_dir()), None)
    if found is not None:
        sys.path[:0] = [str(found), str(found / "bundled")]

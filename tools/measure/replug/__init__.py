"""Measure how soon the agent mounts a medium that is plugged, and releases one that is pulled."""

from typing import Final

NAME: Final = "measure replug"
"""What a line on standard error begins with."""

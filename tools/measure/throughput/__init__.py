"""Measure dm-crypt over memory with the keys that this board's kernel can seal."""

from typing import Final

NAME: Final = "measure throughput"
"""What a line on standard error begins with."""

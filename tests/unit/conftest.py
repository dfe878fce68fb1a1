"""The same examples in every run, and no deadline on a machine that does other things too."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unit", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("unit")

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Name the file that a test writes its configuration to."""
    return tmp_path / "agent.toml"

from __future__ import annotations

from pathlib import Path

import pytest

from unit.doctor.boards import BoardFiles


@pytest.fixture
def board(tmp_path: Path) -> BoardFiles:
    return BoardFiles(tmp_path)

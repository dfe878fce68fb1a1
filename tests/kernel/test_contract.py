"""The real kernel keeps the contract that the fake one keeps in tests/life/test_contract.py.

Its fixture `world` is in conftest.py.
"""

from __future__ import annotations

import pytest

from fakes.contract import *  # noqa: F403  the suite

pytestmark = pytest.mark.smoke

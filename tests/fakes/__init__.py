"""Stand-ins for the kernel, kept honest by the contract suite that runs against both."""

import pytest

pytest.register_assert_rewrite("fakes.contract")

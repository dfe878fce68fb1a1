"""The bed's own tests use its fixtures."""

from vm.fixtures import guest, pytest_runtest_makereport

__all__ = ["guest", "pytest_runtest_makereport"]

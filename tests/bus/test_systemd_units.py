"""What the agent asks the service manager, where there is none, or its bus hangs."""

from __future__ import annotations

import pytest

from bus.private import PrivateBus
from caam_hotplug.dbus import systemd_units

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_no_job_is_known_without_a_service_manager(bus: PrivateBus) -> None:
    assert await systemd_units.own_job(30) == ""


async def test_no_job_is_known_on_a_bus_that_hangs_and_the_wait_ends(bus: PrivateBus) -> None:
    bus.hold()
    try:
        assert await systemd_units.own_job(0.1) == ""
    finally:
        bus.resume()


async def test_no_job_is_known_without_a_bus(private_bus: PrivateBus) -> None:
    assert await systemd_units.own_job(30) == ""

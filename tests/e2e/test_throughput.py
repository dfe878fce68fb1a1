"""`measure throughput`, copied to a board that has the agent installed and running."""

from __future__ import annotations

from vm.guest import Guest
from vm.installed import InstalledAgent


async def test_it_runs_beside_the_agent_with_the_package_that_is_installed(
    guest: Guest, agent: InstalledAgent
) -> None:
    await agent.start()
    done = await guest.sh(
        "cp -r /src/tools/measure /root; cd /root; "
        "python3 measure throughput --rounds 1 --size 1 --reads 1; rm -r measure",
        timeout_s=180,
    )
    assert "tagged: capi:tk(cbc(aes))-plain, by tk-cbc-aes-caam" in done.stdout
    said = await agent.journal()
    assert "(dm-" not in said
    assert "unlocking" not in said
    assert await agent.leftovers() == []
    await guest.until("test \"$(dmsetup ls)\" = 'No devices found'")
    await guest.until("! ls /sys/class/block/loop*/loop")
    await agent.stop()

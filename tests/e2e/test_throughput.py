"""The script that measures dm-crypt, copied to a board that has the agent installed and running."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vm.guest import Guest
from vm.installed import InstalledAgent

SCRIPT: Final = Path(__file__).parents[2] / "tools" / "measure" / "throughput.py"


async def test_the_script_runs_beside_the_agent_with_the_package_that_is_installed(
    guest: Guest, agent: InstalledAgent
) -> None:
    await agent.start()
    await guest.write("/root/throughput.py", SCRIPT.read_bytes())
    done = await guest.sh(
        "cd /root; python3 throughput.py --rounds 1 --size 1 --reads 1; rm throughput.py",
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

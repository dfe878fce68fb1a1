"""What several end-to-end tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from vm import media
from vm.guest import Guest

POINT: Final = "/run/media/cartridge-01"
ANY_BUS: Final = '[[rule]]\nname = "any bus"\nmatch.partlabel = "cartridge-*"\n'


def labelled(folder: Path, label: str, **more: Any) -> Path:
    """A medium of this label, under the test key, in a file of its own."""
    number = len(list(folder.glob("*.img")))
    return media.make_medium(folder / f"{number}.img", label, **more)


async def blobs_up_to(guest: Guest, count: int) -> None:
    """cartridge-02 and so on have the blob of cartridge-01, and so the same key."""
    await guest.sh(
        f"cd /data/caam; for n in $(seq -w 2 {count}); do cp cartridge-01.bb "
        'cartridge-$(printf %02d "$((10#$n))").bb; done'
    )


async def slow_caam(guest: Guest, milliseconds: int) -> None:
    """The running agent's imports take this long more, as if others kept the job rings busy.

    strace holds the ioctl up in the agent's own threads; 0 lets it go.
    """
    if milliseconds == 0:
        await guest.sh("pkill strace || true; while pgrep strace; do :; done")
        return
    pid = (await guest.sh("systemctl show -p MainPID --value caam-hotplug")).stdout.strip()
    await guest.sh(
        f"strace -f -qq -p {pid} -P /dev/caam-keygen -o /dev/null -e trace=ioctl "
        f"-e inject=ioctl:delay_enter={milliseconds * 1000} >/dev/null 2>&1 &\n"
        f"until grep -q 'TracerPid:.*[1-9]' /proc/{pid}/status; do :; done"
    )

"""Steps that several end-to-end tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from vm import boards, media
from vm.boards import Board
from vm.guest import Guest

POINT: Final = "/run/media/cartridge-01"
ANY_BUS: Final = '[[rule]]\nname = "any bus"\nmatch.partlabel = "cartridge-*"\n'


def _on(*which: Board, soaked: Sequence[Board] = ()) -> pytest.MarkDecorator:
    """Run a test once on each of these boards; on the last ones in the soak only."""
    tried = [pytest.param(board, id=board.backend) for board in which]
    tried += [pytest.param(b, id=b.backend, marks=pytest.mark.soak) for b in soaked]
    return pytest.mark.parametrize("board", tried, indirect=True, scope="package")


ON_EVERY_BOARD: Final = _on(*boards.BOARDS)
"""With each seal method of each kernel, for a test that depends on it."""
ON_EACH_KERNEL: Final = _on(boards.TAGGED, boards.ENCRYPTED)
"""With NXP's keys and with mainline's; an encrypted key loads its trusted master as well."""
ON_A_LIVE_MAPPING: Final = _on(boards.TAGGED, soaked=[boards.ENCRYPTED])
"""For a test of what comes after the unlock, to which the kind of the key makes no difference."""


def labelled(folder: Path, label: str, board: Board = boards.TAGGED, **more: Any) -> Path:
    """Make a medium with this label, under the test key, in a file of its own."""
    number = len(list(folder.glob("*.img")))
    return media.make_medium(folder / f"{number}.img", label, **{**board.medium, **more})


async def blobs_up_to(guest: Guest, count: int) -> None:
    """Give cartridge-02 and so on the blob of cartridge-01, and so the same key."""
    await guest.sh(
        f"cd /data/caam; for n in $(seq -w 2 {count}); do cp cartridge-01.bb "
        'cartridge-$(printf %02d "$((10#$n))").bb; done'
    )


async def slow_caam(guest: Guest, milliseconds: int, board: Board = boards.TAGGED) -> None:
    """Delay the running agent's imports by this time, as if others kept the job rings busy.

    strace delays the system call in the agent's own threads; 0 ends the delay.
    """
    if milliseconds == 0:
        await guest.sh("pkill strace || true; while pgrep strace; do :; done")
        return
    path = "-P /dev/caam-keygen" if board.call == "ioctl" else ""
    pid = (await guest.sh("systemctl show -p MainPID --value caam-hotplug")).stdout.strip()
    await guest.sh(
        f"strace -f -qq -p {pid} {path} -o /dev/null -e trace={board.call} "
        f"-e inject={board.call}:delay_enter={milliseconds * 1000} >/dev/null 2>&1 &\n"
        f"until grep -q 'TracerPid:.*[1-9]' /proc/{pid}/status; do :; done"
    )

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
    """The CAAM takes this long for an import from now on: its job rings are shared."""
    parameter = "/sys/module/caam_sim/parameters/import_delay_ms"
    await guest.sh(f"echo {milliseconds} > {parameter}")

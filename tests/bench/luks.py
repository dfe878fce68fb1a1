"""A medium for systems that open only LUKS2: the same disk, cipher and key, in a container."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kernel.cartridges import EXT4, HELLO, KEY, TEXT, Cartridge, cartridges
from kernel.witness import run

NAME: Final = "formatting"
CONTAINER: Final = (
    *("--type", "luks2", "--cipher", "aes-cbc-plain", "--key-size", "128"),
    # The cheapest key derivation of cryptsetup: it is not what is measured.
    *("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
    # The default header alone is larger than the disk.
    *("--luks2-metadata-size", "16k", "--luks2-keyslots-size", "128k"),
)


@contextmanager
def luks_cartridge(label: str) -> Iterator[Cartridge]:
    """Make a medium with a container of this label under the board's key, out of its socket."""
    with cartridges([label]) as (medium,):
        with medium.disposable():
            _format(medium)
            medium.contents = Path(medium.partition).read_bytes()
        yield medium


def _format(medium: Cartridge) -> None:
    with_key = ("--batch-mode", "--key-file", "-")
    run("cryptsetup", "luksFormat", *with_key, *CONTAINER, medium.partition, stdin=KEY)
    run("cryptsetup", "open", *with_key, medium.partition, NAME, stdin=KEY)
    try:
        run(*EXT4, "-L", medium.label, f"/dev/mapper/{NAME}")
        run("mount", f"/dev/mapper/{NAME}", "/mnt")
        Path("/mnt", HELLO).write_bytes(TEXT)
        run("umount", "/mnt")
    finally:
        run("cryptsetup", "close", NAME)

"""Debian packages that the guest has for a limited time: an image that systemd-sysext merges.

So the guest's own image stays small, and every other test has an unchanged guest. Maintainer
scripts of the packages do not run, and /etc is not changed.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from vm import cache
from vm.image import run, squash

FOLDER: Final = "/var/lib/extensions"
"""Folder where systemd-sysext finds images."""
WASTE: Final = ("doc", "man", "locale", "bash-completion", "zsh")


def extension(name: str, packages: list[str], base: Path) -> Path:
    """Build NAME.raw, the image of these packages and the dependencies that the base image lacks.

    Returns: its path, from the cache or built now.
    """
    code = Path(__file__)
    with cache.locked():
        folder = cache.built(
            name,
            cache.key_of(" ".join(packages), base.parent.name, code),
            lambda folder: _make(folder / f"{name}.raw", packages, base),
            says=f"Fetching {' and '.join(packages)} for the guest (once)",
        )
    return folder / f"{name}.raw"


def _make(target: Path, packages: list[str], base: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        # As in the guest, where folders in / are links into /usr: an extension has only /usr.
        (tree / "usr").mkdir(parents=True)
        for folder in ("bin", "lib", "sbin"):
            (tree / "usr" / folder).mkdir()
            (tree / folder).symlink_to(f"usr/{folder}")
        for deb in _fetched(packages, base, Path(work)):
            _unpack(deb, tree)
        for waste in WASTE:
            shutil.rmtree(tree / "usr/share" / waste, ignore_errors=True)
        compiled = tree / "usr/lib/python3"
        run(sys.executable, "-m", "compileall", "-q", "-s", tree, compiled)
        release = tree / f"usr/lib/extension-release.d/extension-release.{target.stem}"
        release.parent.mkdir()
        release.write_text("ID=debian\nVERSION_ID=12\n")
        squash(tree, target)


def _fetched(packages: list[str], base: Path, folder: Path) -> list[Path]:
    """Fetch the packages and dependencies that the guest lacks; apt gets the guest's list."""
    status = folder / "status"
    status.write_text(run("unsquashfs", "-cat", base, "var/lib/dpkg/status"))
    asked = ("-q=2", "--simulate", "--no-install-recommends", "-o", f"Dir::State::status={status}")
    missing = re.findall(r"^Inst (\S+)", run("apt-get", *asked, "install", *packages), re.M)
    run("apt-get", "-q=2", "download", *missing, cwd=folder)
    return sorted(folder.glob("*.deb"))


def _unpack(deb: Path, tree: Path) -> None:
    """Unpack with tar, which keeps the tree's links where dpkg-deb would replace them."""
    options = "--keep-directory-symlink --exclude=./etc --exclude=./var"
    script = f"dpkg-deb --fsys-tarfile '{deb}' | tar -x {options} -C '{tree}'"
    run("bash", "-o", "pipefail", "-c", script)

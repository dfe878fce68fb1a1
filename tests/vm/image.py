"""Builds the guest's boot files: kernel, initrd and two squashfs images.

The base image consists of Debian's packages. The bed's image above it holds kernel modules, the
simulated CAAM, Python packages and the bed's agent: a change there costs seconds, not a minute.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vm import cache

HERE: Final = Path(__file__).parent
CAAM_SIM: Final = HERE / "caam_sim"
MAINLINE: Final = HERE / "mainline"
INSIDE: Final = HERE / "inside"

DEFAULT_KERNEL: Final = "6.1"
"""Series of Debian 12's own kernel; $KERNEL may name another that Debian has, such as 6.12."""
GUEST_PACKAGES: Final = [
    "systemd", "systemd-sysv", "udev", "dbus", "python3", "python3-pyudev", "python3-keyutils",
    "dmsetup", "libdevmapper1.02.1", "cryptsetup-bin", "keyutils", "libkeyutils1", "libblkid1",
    "e2fsprogs", "dosfstools", "exfatprogs", "xfsprogs", "btrfs-progs", "f2fs-tools", "fdisk",
    "gdisk", "kmod", "procps", "strace", "libglib2.0-bin", "swtpm", "tpm2-tools",
]  # fmt: skip
_PROJECT: Final = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]
_NEEDED: Final = {
    "coverage", "cryptography", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout", "sdbus",
}  # fmt: skip
GUEST_PYTHON: Final[list[str]] = [
    requirement
    for requirement in _PROJECT["optional-dependencies"]["dev"]
    if re.split("[<>=]", requirement, maxsplit=1)[0] in _NEEDED
]
"""Requirements of the tests that run in the guest."""
MODULES: Final = [
    "virtio_pci", "virtio_blk", "virtio_console", "virtio_scsi", "virtio_rng", "squashfs",
    "overlay", "9p", "9pnet_virtio", "ext4", "vfat", "exfat", "xfs", "btrfs", "f2fs",
    "nls_cp437", "nls_iso8859-1", "nls_ascii", "nls_utf8", "loop", "fuse", "dm-mod", "dm-crypt",
    "dm-flakey", "dm-delay", "dm-zero", "xhci-pci", "usb-storage", "uas", "sd_mod", "sdhci-pci",
    "mmc_block", "scsi_debug", "cbc", "ecb", "ccm", "ctr", "xts", "essiv", "aes_generic",
    "aesni-intel", "sha256_generic", "sha256_ssse3", "crc32c_generic", "crc32c-intel",
    "libcrc32c", "crc32_generic", "algif_skcipher", "algif_hash", "tpm_vtpm_proxy",
    "dummy_hcd", "libcomposite", "usb_f_mass_storage", "usb_f_acm", "cdc-acm",
]  # fmt: skip
INITRD_MODULES: Final = ["virtio_pci", "virtio_blk", "squashfs", "overlay"]
MAINLINE_SOURCES: Final = [
    "security/keys/trusted-keys/trusted_core.c", "security/keys/trusted-keys/trusted_caam.c",
    "security/keys/trusted-keys/trusted_tpm1.c", "security/keys/trusted-keys/trusted_tpm2.c",
    "security/keys/trusted-keys/tpm2key.asn1", "scripts/asn1_compiler.c", "lib/asn1_encoder.c",
    "security/keys/encrypted-keys/encrypted.c", "security/keys/encrypted-keys/encrypted.h",
    "security/keys/encrypted-keys/masterkey_trusted.c",
    "security/keys/encrypted-keys/ecryptfs_format.h",
    "drivers/md/dm-crypt.c", "drivers/md/dm-audit.h",
]  # fmt: skip
"""Files of Debian's kernel sources: mainline's support for the CAAM and a TPM, which Debian's
kernels lack.
"""
MASKED_UNITS: Final = [
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
    "fstrim.timer", "systemd-tmpfiles-clean.timer", "e2scrub_reap.service",
    "getty@tty1.service", "systemd-update-utmp.service", "systemd-random-seed.service",
    "serial-getty@ttyS0.service", "systemd-update-utmp-runlevel.service",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """Files that QEMU boots from, and the key of everything they were built from."""

    kernel: Path
    initrd: Path
    base: Path
    bed: Path
    key: str


def build() -> Image:
    """Return the guest's image; use the cache for what is already built.

    Raises: subprocess.CalledProcessError if a tool of Debian's fails.
    """
    version = kernel_version()
    release = Path("/etc/debian_version").read_text()
    code = HERE / "image.py"
    unpacked = cache.built(
        "kernel",
        cache.key_of(version, release),
        lambda folder: _unpack_kernel(folder, version),
        says=f"Unpacking Debian's kernel {version}",
    )
    base = cache.built(
        "base",
        cache.key_of(" ".join(GUEST_PACKAGES), release),
        _base_image,
        says="Building the guest's root tree (once; about a minute and a half)",
    )
    site = cache.built(
        "site",
        cache.key_of(" ".join(GUEST_PYTHON), sys.version),
        _install_python,
        says="Fetching the guest's Python packages (once)",
    )
    headers = cache.built(
        "headers",
        cache.key_of(version, release),
        lambda folder: _fetch_headers(folder, version),
        says="Fetching the kernel's headers (once; 17 MB)",
    )
    sources = cache.built(
        "sources",
        cache.key_of(version, release, " ".join(MAINLINE_SOURCES)),
        lambda folder: _unpack_sources(folder, version),
        says="Fetching Debian's kernel sources (once; 140 MB)",
    )
    key = cache.key_of(version, release, " ".join(GUEST_PYTHON), code, CAAM_SIM, MAINLINE, INSIDE)
    bed = cache.built(
        "bed",
        key,
        lambda folder: _bed_image(folder, unpacked, site, _Sources(headers, sources), version),
        says="Building the simulated CAAM and the guest's own image",
    )
    vmlinuz = unpacked / "boot" / f"vmlinuz-{version}"
    return Image(vmlinuz, bed / "initrd", base / "base.squashfs", bed / "bed.squashfs", key)


def kernel_version() -> str:
    """Return Debian's current kernel of the series in $KERNEL; `setup` fetches package lists."""
    series = os.environ.get("KERNEL") or DEFAULT_KERNEL
    package = "linux-image-amd64" if series == DEFAULT_KERNEL else f"linux-image-{series}-amd64"
    depends = run("apt-cache", "depends", package)
    found = re.search(r"Depends: linux-image-(\d\S*)", depends)
    if found is None:
        sys.exit(f"Debian has no kernel {series}, or no package lists are here: run tests/vm/setup")
    return found[1]


def run(*command: str | Path, **options: object) -> str:
    """Run the program and return its output; on an error, exit with its error output."""
    done = subprocess.run(  # type: ignore[call-overload]
        [str(word) for word in command], check=False, capture_output=True, text=True, **options
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")
    return str(done.stdout)


def _unpack_kernel(folder: Path, version: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        run("apt-get", "-q=2", "download", f"linux-image-{version}", cwd=scratch)
        (deb,) = Path(scratch).glob("*.deb")
        run("dpkg-deb", "-x", deb, folder)
    shutil.rmtree(folder / "usr")
    packed = sorted(folder.rglob("*.ko.xz"))  # from Linux 6.12 on; the initrd's insmod has no xz
    for start in range(0, len(packed), 500):
        run("xz", "-d", "-T0", *packed[start : start + 500])
    run("depmod", "-b", folder, version)


def _fetch_headers(folder: Path, version: str) -> None:
    """Fetch the packages that modules are built with, without installing them.

    An installation would bring the whole kernel and its hooks: the packages depend on it.
    """
    output = run("apt-cache", "depends", f"linux-headers-{version}")
    needed = re.findall(r"Depends: (linux-headers-\S+-common|linux-kbuild-\S+)", output)
    run("apt-get", "-q=2", "download", f"linux-headers-{version}", *needed, cwd=folder)


def _unpack_headers(packages: Path, folder: Path, version: str) -> Path:
    """Return the folder where the kernel's own build of a module begins."""
    for deb in packages.glob("*.deb"):
        run("dpkg-deb", "-x", deb, folder)
    build = folder / "usr/src" / f"linux-headers-{version}"
    makefile = build / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", "../"))
    return build


def _unpack_sources(folder: Path, version: str) -> None:
    """Unpack MAINLINE_SOURCES from Debian's package of this kernel, all into one folder."""
    output = run("apt-cache", "show", "--no-all-versions", f"linux-image-{version}")
    (release,) = re.findall(r"^Version: (\S+)$", output, re.M)
    series = ".".join(version.split(".")[:2])
    tree = f"linux-source-{series}"
    with tempfile.TemporaryDirectory() as scratch:
        run("apt-get", "-q=2", "download", f"{tree}={release}", cwd=scratch)
        (deb,) = Path(scratch).glob("*.deb")
        # The archive in the package is the whole kernel: unpack a part of it while it is read.
        unpack = (
            f"dpkg-deb --fsys-tarfile '{deb}' | tar -xO ./usr/src/{tree}.tar.xz | "
            f"tar -xJ -C '{scratch}' {' '.join(f'{tree}/{name}' for name in MAINLINE_SOURCES)}"
        )
        run("bash", "-o", "pipefail", "-c", unpack)
        for name in MAINLINE_SOURCES:
            shutil.copy(Path(scratch) / tree / name, folder)


def _base_image(folder: Path) -> None:
    memory = Path("/dev/shm")
    fast = memory if memory.is_dir() and shutil.disk_usage(memory).free > 2 << 30 else folder
    with tempfile.TemporaryDirectory(dir=fast) as scratch:
        tree = Path(scratch) / "root"
        excluded = ("doc/*", "man/*", "locale/*", "info/*", "lintian/*")
        run(
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            '--aptopt=APT::Install-Recommends "false"',
            *(f"--dpkgopt=path-exclude=/usr/share/{glob}" for glob in excluded),
            f"--include={','.join(GUEST_PACKAGES)}",
            "bookworm",
            tree,
            env={**os.environ, "TMPDIR": scratch},
        )
        for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc"):
            shutil.rmtree(tree / waste, ignore_errors=True)
        squash(tree, folder / "base.squashfs")


def squash(tree: Path, image: Path) -> None:
    """Make a squashfs image of the tree, owned by root."""
    run("mksquashfs", tree, image, "-comp", "zstd", "-Xcompression-level", "3", "-quiet",
         "-noappend", "-all-root")  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sources:
    """Sources of modules."""

    headers: Path
    """Folder of the kernel's header packages."""
    mainline: Path
    """Folder of the files in MAINLINE_SOURCES."""


def _bed_image(folder: Path, unpacked: Path, site: Path, sources: _Sources, version: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        lib = tree / "usr/lib/modules" / version
        source = unpacked / "lib/modules" / version
        modules = _with_dependencies(source, MODULES)
        for module in modules:
            (lib / module).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / module, lib / module)
        for index in source.glob("modules.builtin*"):
            shutil.copy(index, lib)
        shutil.copy(source / "modules.order", lib)
        build = _unpack_headers(sources.headers, Path(scratch) / "headers", version)
        caam_sim = Path(scratch) / "caam_sim"
        _build_caam_sim(caam_sim, build, lib, tree / "usr/local/bin")
        mainline = Path(scratch) / "mainline"
        shutil.copytree(MAINLINE, mainline)
        for name in MAINLINE_SOURCES:
            shutil.copy(sources.mainline / Path(name).name, mainline)
        _build_mainline(mainline, build, caam_sim, tree / "opt/mainline")
        (tree / "lib").symlink_to("usr/lib")
        run("depmod", "-b", tree, version)
        (tree / "lib").unlink()
        shutil.copytree(site, tree / "opt/site", ignore=shutil.ignore_patterns(".sizes"))
        (tree / "opt/site").chmod(0o755)  # the cache is private; the guest has other users
        _install_bed(tree)
        squash(tree, folder / "bed.squashfs")
        _initrd(folder / "initrd", source, Path(scratch) / "initrd")


def _with_dependencies(source: Path, wanted: list[str]) -> list[str]:
    """Return the files of the modules and of their dependencies, each after what it needs."""
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (source / "modules.dep").read_text().splitlines():
        module, _, below = line.partition(":")
        needs[module] = below.split()
        by_name[Path(module).name.removesuffix(".ko").replace("_", "-")] = module
    ordered: dict[str, None] = {}
    for name in wanted:
        found = by_name.get(name.replace("_", "-"))
        if found is not None:  # otherwise it is built into the kernel
            ordered |= dict.fromkeys([*reversed(needs[found]), found])
    return list(ordered)


def _build_caam_sim(work: Path, build: Path, lib: Path, programs: Path) -> None:
    shutil.copytree(CAAM_SIM, work)
    run("make", "-C", work, f"HEADERS={build}", "modules", "caam-keygen")
    run("strip", "--strip-debug", work / "caam_sim.ko")
    (lib / "updates").mkdir(parents=True)
    shutil.copy(work / "caam_sim.ko", lib / "updates")
    programs.mkdir(parents=True)
    shutil.copy(work / "caam-keygen", programs)


def _build_mainline(work: Path, build: Path, caam_sim: Path, modules: Path) -> None:
    symbols = f"KBUILD_EXTRA_SYMBOLS={caam_sim}/Module.symvers"
    run(
        "make", "-C", build, f"M={work}", "CONFIG_DEBUG_INFO_BTF_MODULES=", symbols, "modules"
    )  # fmt: skip
    modules.mkdir(parents=True)
    for module in work.glob("*.ko"):
        run("strip", "--strip-debug", module)
        shutil.copy(module, modules)


def _install_python(site: Path) -> None:
    run(
        sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check",
        "--target", site, "--python-version", "3.11", "--implementation", "cp",
        "--only-binary=:all:", *GUEST_PYTHON,
    )  # fmt: skip
    run(sys.executable, "-m", "compileall", "-q", site)


def _install_bed(tree: Path) -> None:
    lib, units = tree / "usr/local/lib/bed", tree / "etc/systemd/system"
    wanted = units / "multi-user.target.wants"
    for folder in (lib, wanted, tree / "src", tree / "etc/modprobe.d"):
        folder.mkdir(parents=True)
    shutil.copy(INSIDE / "agent.py", lib)
    shutil.copy(INSIDE / "board-kernel", tree / "usr/local/bin")
    shutil.copy(INSIDE / "bed-agent.service", units)
    (wanted / "bed-agent.service").symlink_to("../bed-agent.service")
    for unit in MASKED_UNITS:
        (units / unit).symlink_to("/dev/null")
    autologin = units / "serial-getty@hvc0.service.d"
    autologin.mkdir()
    getty = Path("/lib/systemd/system/serial-getty@.service")
    (wanted / "serial-getty@hvc0.service").symlink_to(getty)
    (autologin / "root.conf").write_text(
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty -o '-p -f -- root' --noclear "
        "--autologin root - $TERM\n"
    )
    journald = tree / "etc/systemd/journald.conf.d"
    journald.mkdir()
    (journald / "bed.conf").write_text(
        "[Journal]\nStorage=volatile\nRuntimeMaxUse=64M\nRateLimitBurst=0\n"
    )
    (tree / "etc/modprobe.d/bed.conf").write_text("options usb-storage delay_use=0\n")
    (tree / "etc/hostname").write_text("board\n")
    (tree / "etc/fstab").write_text("")
    (tree / "etc/machine-id").write_text("5f0b9d0c6f0e4a7f9d1f6f1c1f3a2b11\n")
    packages = tree / "usr/lib/python3/dist-packages"
    packages.mkdir(parents=True)
    (packages / "bed.pth").write_text("/opt/site\n")


def _initrd(target: Path, source: Path, work: Path) -> None:
    for folder in ("bin", "dev", "proc", "sys", "modules"):
        (work / folder).mkdir(parents=True)
    shutil.copy("/bin/busybox", work / "bin")
    shutil.copy(INSIDE / "init", work / "init")
    (work / "init").chmod(0o755)
    modules = _with_dependencies(source, INITRD_MODULES)
    for module in modules:
        shutil.copy(source / module, work / "modules")
    (work / "modules/order").write_text("".join(f"{Path(m).name}\n" for m in modules))
    files = "\n".join(str(p.relative_to(work)) for p in sorted(work.rglob("*")))
    with target.open("wb") as archive:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet", "-R", "0:0"],
            cwd=work, input=files.encode(), stdout=archive, check=True,
        )  # fmt: skip

"""QEMU: boot once, save the machine, restore it for every test."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vm import accel, cache, image
from vm.guest import CommandFailedError, Guest, GuestDiedError
from vm.media import KEYS, OTPMK_A
from vm.qmp import Qmp, QmpError

REPOSITORY: Final = Path(__file__).resolve().parents[2]
MEMORY_MIB: Final = 1024
BOOT_DEADLINE_S: Final = 600
RESTORE_DEADLINE_S: Final = 120
REHEARSAL: Final = """
    truncate -s 4M /tmp/disk
    mkfs.ext4 -q /tmp/disk
    loop=$(losetup -f --show /tmp/disk)
    dmsetup create rehearsal --table "0 8192 linear $loop 0"
    mount /dev/mapper/rehearsal /mnt
    umount /mnt
    dmsetup remove --retry rehearsal
    losetup -d $loop
    udevadm settle
    rm /tmp/disk
"""
"""A volume's life once through, so that udev's rules and programs are in memory."""

_looking: Final = threading.Lock()
_found: Final[dict[str, Saved]] = {}


class MachineError(Exception):
    """The guest did not come up; what its console said is in the message."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved machine: the image it booted from, on which accelerator, and its state."""

    image: image.Image
    accelerator: accel.Accelerator
    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / "state"


def _arguments(img: image.Image, accelerator: accel.Accelerator, run: Path) -> list[str]:
    """The machine. They must be the same on restore as they were when the state was saved.

    Without ioeventfd, and with few serial ports, QEMU's main thread has little to watch: without
    KVM it gains nothing by being woken for what a processor's thread can do itself.
    """
    return [
        "qemu-system-x86_64",
        *(*accel.OPTIONS[accelerator], "-smp", "2"),
        *("-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", str(img.kernel), "-initrd", str(img.initrd), "-append"),
        # norandmaps: QEMU translates code anew at every address that it runs at, so that with
        # random addresses no process gains from those before it (a spawn takes 3 times as long).
        # tsc=reliable: the guest's check of its processors' counters against each other fails under
        # emulation, though all are the host's one, and every clock read then goes to QEMU.
        "console=ttyS0 quiet panic=1 oops=panic norandmaps tsc=reliable "
        "systemd.unit=multi-user.target "
        "systemd.show_status=0 mitigations=off audit=0 net.ifnames=0",
        *("-serial", f"file:{run}/console"),
        *("-qmp", f"unix:{run}/qmp,server=on,wait=off"),
        *("-drive", f"if=none,id=base,format=raw,readonly=on,file={img.base}"),
        *("-device", "virtio-blk-pci,drive=base,ioeventfd=off"),
        *("-drive", f"if=none,id=bed,format=raw,readonly=on,file={img.bed}"),
        *("-device", "virtio-blk-pci,drive=bed,ioeventfd=off"),
        *("-device", "virtio-rng-pci,ioeventfd=off"),
        # A new generation per restore: the kernel reseeds its random numbers, or every restored
        # guest would make the same keys and UUIDs.
        *("-device", "vmgenid,guid=auto"),
        *("-device", "virtio-serial-pci,id=serial,max_ports=3,ioeventfd=off"),
        *("-chardev", f"socket,id=agent,path={run}/agent,server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=agent"),
        *("-chardev", f"socket,id=shell,path={run}/shell,server=on,wait=off"),
        *("-device", "virtconsole,chardev=shell"),
        *(word for n in range(3) for word in ("-device", f"qemu-xhci,id=xhci{n},p2=15,p3=15")),
        *("-device", "virtio-scsi-pci,id=scsi,ioeventfd=off"),
        *("-device", "sdhci-pci", "-drive", "if=none,id=sdslot"),
        *("-device", "sd-card,id=sd0,drive=sdslot"),
        *("-fsdev", f"local,id=src,path={REPOSITORY},security_model=none,readonly=on"),
        *("-device", "virtio-9p-pci,fsdev=src,mount_tag=src,ioeventfd=off"),
    ]


@asynccontextmanager
async def _qemu(arguments: list[str], run: Path) -> AsyncIterator[Qmp]:
    """A QEMU process and its control connection; it is killed on the way out."""
    with (run / "qemu.log").open("wb") as log:
        # QEMU must not outlive a test run that is killed.
        process = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", *arguments, stdout=log, stderr=log
        )
    try:
        qmp = await _connected(process, run)
        try:
            yield qmp
        finally:
            await qmp.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _connected(process: asyncio.subprocess.Process, run: Path) -> Qmp:
    while process.returncode is None:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return await Qmp.connected(run / "qmp")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(process.wait()), 0.02)
    raise MachineError(f"QEMU ended:\n{(run / 'qemu.log').read_text()}")


async def _incoming(qmp: Qmp) -> None:
    deadline = time.monotonic() + RESTORE_DEADLINE_S
    while (await qmp("query-status"))["status"] == "inmigrate":
        if time.monotonic() > deadline:
            raise MachineError("the saved state does not load")
        await asyncio.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Layer:
    """What is done to the booted guest before it is saved a second time, ready for its tests."""

    name: str
    key: str
    """Of everything that the outcome of `prepare` depends on."""
    prepare: Callable[[Guest], Awaitable[None]]


def saved(layer: Layer | None = None, *, instead_of: Saved | None = None) -> Saved:
    """The saved machine, from the cache or booted now. Blocks; for a minute and more if not there.

    What this process found once it does not look for again, unless it proved broken (`instead_of`).

    Raises: MachineError if the guest does not come up.
    """
    name = "" if layer is None else layer.name
    with _looking:
        if instead_of is not None:
            cache.forget(instead_of.folder)
            if _found.get(name) == instead_of:
                del _found[name]
        if "" not in _found:
            _found[""] = _booted()
        if layer is not None and name not in _found:
            _found[name] = _layered(_found[""], layer)
        return _found[name]


def _layered(base: Saved, layer: Layer) -> Saved:
    with cache.locked():
        folder = cache.built(
            layer.name,
            cache.key_of(base.folder.name, layer.key),
            lambda making: asyncio.run(_restore_and_save(base, layer, making)),
            says=f"Preparing the guest once more: {layer.name}",
        )
        return Saved(base.image, base.accelerator, folder)


async def _restore_and_save(base: Saved, layer: Layer, making: Path) -> None:
    async with contextlib.AsyncExitStack() as held:
        guest = await _restore(base, held)
        await layer.prepare(guest)
        await guest.sh("umount /src")  # a mounted 9p keeps QEMU from saving
        await _save(guest, making)


async def _save(guest: Guest, making: Path) -> None:
    await guest.close()
    await guest.qmp("stop")
    await guest.qmp("migrate", uri=f"exec:cat > '{making}/state'")
    while (status := (await guest.qmp("query-migrate"))["status"]) != "completed":
        if status == "failed":
            raise MachineError("QEMU could not save the guest")
        await asyncio.sleep(0.1)


def _booted() -> Saved:
    with cache.locked():
        img = image.build()
        accelerator = accel.chosen(img.kernel, img.initrd)
        qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, check=True)
        folder = cache.built(
            "state",
            state_key(img, accelerator, qemu.stdout),
            lambda making: asyncio.run(_boot_and_save(img, accelerator, making)),
            says="Booting the guest and saving its state",
        )
        return Saved(img, accelerator, folder)


def state_key(img: image.Image, accelerator: accel.Accelerator, qemu: bytes) -> str:
    """By which the booted guest is found again; on another accelerator it would not run."""
    here = Path(__file__)
    code = [here, here.with_name("media.py"), here.with_name("guest.py")]
    return cache.key_of(img.key, qemu, " ".join(accel.OPTIONS[accelerator]), *code)


async def _boot_and_save(img: image.Image, accelerator: accel.Accelerator, making: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="caam-bed-") as scratch:
        run = Path(scratch)
        async with _qemu(_arguments(img, accelerator, run), run) as qmp:
            try:
                async with asyncio.timeout(BOOT_DEADLINE_S):
                    guest = await Guest.connected(run, qmp)
                    await _prepare(guest)
                await _save(guest, making)
            except TimeoutError as error:
                raise MachineError(f"the guest does not come up:\n{_console(run)}") from error


def _console(run: Path) -> str:
    return (run / "console").read_text(errors="replace")[-8000:]


async def _prepare(guest: Guest) -> None:
    """What every test finds: the CAAM of board A, its blobs, no SD controller yet."""
    await guest.sh(
        "systemctl is-system-running --wait || true; mkdir -p /data && chmod 755 /data",
        timeout_s=BOOT_DEADLINE_S,
    )
    await guest.sh(f"modprobe caam_sim otpmk={OTPMK_A}; modprobe -a dm-crypt loop 9pnet_virtio 9p")
    for name, key in KEYS.items():
        covering = "ccm" if name.startswith("ccm") else "ecb"
        await guest.run("caam-keygen", "create", name, covering, "-t", key.decode())
    # The tool exits with 0 whatever happens; and the black keys are of this boot only.
    await guest.sh(f"cd /data/caam; ls {' '.join(f'{n}.bb' for n in KEYS)}; rm {' '.join(KEYS)}")
    # What was once loaded and read is there in every restored machine.
    await guest.sh("cd /; python3 -c 'import asyncio, pyudev, argparse, logging'")
    await guest.sh("modprobe -a usb-storage uas sd_mod mmc_block ext4 vfat nls_cp437 nls_ascii")
    await guest.sh(REHEARSAL)
    # sdhci-pci does not survive saving: it is found again after restoring.
    await guest.sh("for d in /sys/bus/pci/drivers/sdhci-pci/0000:*; do echo 1 > $d/remove; done")


@asynccontextmanager
async def restored(layer: Layer | None = None) -> AsyncIterator[Guest]:
    """A booted guest, as it was saved, with the repository at /src; gone on the way out."""
    machine = await asyncio.to_thread(saved, layer)
    async with contextlib.AsyncExitStack() as held:
        try:
            guest = await _restore(machine, held)
        except (MachineError, GuestDiedError, QmpError, CommandFailedError, OSError) as error:
            await held.aclose()
            print(f"The saved guest does not come back ({error})", file=sys.stderr, flush=True)
            guest = await _restore(await asyncio.to_thread(saved, layer, instead_of=machine), held)
        yield guest


async def _restore(machine: Saved, held: contextlib.AsyncExitStack) -> Guest:
    scratch = held.enter_context(tempfile.TemporaryDirectory(prefix="caam-bed-"))
    run = Path(scratch)
    arguments = _arguments(machine.image, machine.accelerator, run)
    arguments += ["-incoming", f"exec:cat '{machine.state}'"]
    qmp = await held.enter_async_context(_qemu(arguments, run))
    async with asyncio.timeout(RESTORE_DEADLINE_S):
        await _incoming(qmp)
        guest = await Guest.connected(run, qmp)
        held.push_async_callback(guest.close)
        await qmp("cont")
        await guest.resume()
    return guest

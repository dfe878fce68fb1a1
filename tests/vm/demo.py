"""The main job, narrated on the terminal: `make demo`."""

from __future__ import annotations

import sys
import tempfile
import textwrap
import time
from pathlib import Path

from vm import installed, machine, media
from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.media import OTPMK_A, OTPMK_B

POINT = "/run/media/cartridge-07"

# The board's own procedure, as NXP documents it; it does not use the agent.
PROCEDURE = """\
caam-keygen create cartridge-07 ecb -s 16
keyctl padd logon logkey: @s < /data/caam/cartridge-07
dmsetup create making --table "0 $(blockdev --getsz /dev/sda1) crypt \
capi:tk(cbc(aes))-plain :36:logon:logkey: 0 /dev/sda1 0 1 sector_size:512"
mkfs.ext4 -q -L cartridge-07 /dev/mapper/making
mount /dev/mapper/making /mnt
echo 'Encrypted data' > /mnt/hello.txt
umount /mnt
dmsetup remove making
keyctl clear @s
rm /data/caam/cartridge-07"""


class Stage:
    """Prints the demo: actions in bold, the machine's answers indented."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        terminal = sys.stdout.isatty()
        self._bold, self._plain = ("\x1b[1m", "\x1b[0m") if terminal else ("", "")

    def say(self, words: str) -> None:
        """Print one step, with the seconds since the beginning."""
        after = time.monotonic() - self._began
        print(f"\n{self._bold}[{after:5.1f} s] {words}{self._plain}", flush=True)

    def show(self, text: str) -> None:
        """Print the machine's answer."""
        print(textwrap.indent(text.rstrip() or "(nothing)", "    "), flush=True)

    async def command(self, guest: Guest, command: str) -> str:
        """Run a command in the guest; print it and its answer."""
        done = await guest.sh(command, check=False)
        self.show("\n".join(f"# {line}" for line in command.splitlines()))
        self.show(done.stdout + done.stderr)
        return done.stdout


async def demo() -> int:
    """Show the main job, from an empty stick to another board's refusal. Returns: exit status."""
    stage = Stage()
    stage.say("Restoring a booted virtual machine: Debian, a real kernel, a simulated CAAM")
    async with machine.restored(installed.layer()) as guest:
        with tempfile.TemporaryDirectory() as folder:
            await _make_and_use(stage, guest, Path(folder) / "stick.img")
    stage.say("That was the main job.")
    return 0


async def _make_and_use(stage: Stage, guest: Guest, image: Path) -> None:
    stage.show((await guest.run("uname", "-srm")).stdout)
    stage.show((await guest.run("dpkg-query", "-W", "caam-hotplug")).stdout)
    media.write_disk(image, "cartridge-07", bytes(16 << 20))
    stick = await guest.plug_usb(image)
    await guest.until("test -b /dev/disk/by-partlabel/cartridge-07")
    stage.say(
        "A blank stick labelled cartridge-07 becomes an encrypted one, by the board's procedure"
    )
    await stage.command(guest, PROCEDURE)
    await stick.pull()

    stage.say("The board is switched off and on: black keys are gone, the blob is all that is left")
    await guest.cold_boot_caam(OTPMK_A)
    await stage.command(guest, "ls -l /data/caam/cartridge-07*")

    stage.say("The agent starts as a systemd service, with no configuration at all")
    agent = InstalledAgent(guest)
    await agent.start()
    await stage.command(guest, "systemctl status --no-pager -n 0 caam-hotplug | head -n 6")

    stage.say("The stick is plugged in")
    plugged = time.monotonic()
    await stick.plug()
    await guest.until_mounted(POINT)
    stage.show(f"mounted {time.monotonic() - plugged:.1f} s after the plug, in emulation")
    read = await stage.command(guest, f"cat {POINT}/hello.txt")
    assert read == "Encrypted data\n"
    await stage.command(guest, f"grep ' {POINT} ' /proc/self/mountinfo")
    await stage.command(guest, "dmsetup table")
    await guest.until("! grep -q caam-hotplug /proc/keys")
    await stage.command(guest, "grep caam-hotplug /proc/keys || echo 'no key in any keyring'")

    stage.say("The stick is pulled out, without a request to the agent")
    await stick.pull()
    await agent.until_said("cartridge-07.*removed-unsafely")
    await stage.command(guest, "dmsetup ls; grep media /proc/self/mountinfo; ls -A /run/media")
    assert await agent.leftovers() == []
    stage.show("mapping, key, mount and directory are gone")

    stage.say("The same stick and blob in another board: another chip, another master key")
    await guest.cold_boot_caam(OTPMK_B)
    await stick.plug()
    await agent.until_said("cartridge-07.*failed")
    assert await agent.leftovers() == []

    stage.say("The log of the agent in the journal, as its user reads it")
    await stage.command(guest, "journalctl -u caam-hotplug -o cat --no-pager | grep cartridge-07")
    await agent.stop()

"""A board whose trusted keys a TPM seals: media that are made there, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from documented import commands
from vm import boards, media
from vm.boards import Board
from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.media import OTPMK_A

LABEL = "archive-02"
MADE = f"/run/media/{LABEL}"
DROP_IN = f"/etc/caam-hotplug/rules.d/{LABEL}.toml"
BY_HAND = """
[[rule]]
name = "by hand"
match.partlabel = "cartridge-07"
[rule.key]
backend = "trusted"
options = "keyhandle=0x81000001"
length = 64
"""
REFUSED = "the trust source refused the blob: damaged, sealed by another chip, or its options are"

pytestmark = pytest.mark.parametrize(
    "board", [boards.ENCRYPTED], ids=["mainline"], indirect=True, scope="package"
)


def documented(*words: str) -> str:
    """The one command of the page's section that has these words."""
    (command,) = [
        each
        for each in commands("docs/mainline.md", "A board with a TPM")
        if all(word in each for word in words)
    ]
    return command


async def power_on(guest: Guest, name: str) -> None:
    """The board has the TPM of this name, whose power was off."""
    await guest.run("board-kernel", "tpm", name, timeout_s=300)


@pytest_asyncio.fixture(loop_scope="session")
async def tpm(guest: Guest, board: Board) -> AsyncIterator[None]:
    """The board has no CAAM but a TPM, A, which has a storage key; there is no blob yet."""
    await guest.sh("rm /data/caam/*; chmod 700 /data/caam")
    await power_on(guest, "A")
    await guest.sh(documented("tpm2_createprimary"))
    await guest.sh(documented("tpm2_evictcontrol"))
    yield
    await guest.run("board-kernel", "mainline", OTPMK_A, timeout_s=300)
    await guest.sh("rm -r /var/lib/swtpm/* /run/storage-key")


async def blank(guest: Guest, folder: Path) -> Path:
    """A medium that was never written to is /dev/sda."""
    image = folder / "blank.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    await guest.plug_usb(image)
    await guest.until("test -b /dev/sda")
    return image


async def findings(guest: Guest) -> dict[str, dict[str, str]]:
    """What doctor says of a board where nothing is amiss."""
    examined = await guest.sh("caam-hotplug doctor --json", check=False, timeout_s=120)
    found = json.loads(examined.stdout)["findings"]
    assert [f for f in found if f["status"] == "failure"] == []
    return {f["check"]: f for f in found}


async def test_a_medium_is_made_outlives_the_power_and_is_refused_with_another_tpm(
    guest: Guest, tpm: None, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.start()
    image = await blank(guest, tmp_path)
    without = documented("provision").replace(" --key-options keyhandle=0x81000001", "")
    refused = await guest.sh(without, check=False)
    assert refused.returncode == 1
    assert (
        "a TPM needs options, such as keyhandle=0x81000001; of the CAAM a job has" in refused.stderr
    )
    await guest.sh(f"test ! -e {DROP_IN} -a ! -e /data/caam/{LABEL}.bb")
    done = await guest.sh(documented("provision"))
    assert done.stdout.startswith(f"/dev/sda1: {LABEL} is made")
    await guest.until_mounted(MADE)
    assert "by its trusted key" in await agent.journal()
    written = (await guest.read(DROP_IN)).decode()
    assert 'options = "keyhandle=0x81000001"\nlength = 64\n' in written
    await guest.write(f"{MADE}/kept", b"kept\n")
    await agent.stop()

    await power_on(guest, "A")
    await agent.start()
    await guest.until_mounted(MADE)
    assert await guest.read(f"{MADE}/kept") == b"kept\n"
    await agent.stop()

    before = image.read_bytes()
    await power_on(guest, "B")
    await agent.start()
    assert REFUSED in await agent.until_said(f"'{LABEL}'.*failed")
    assert await agent.leftovers() == []
    await agent.stop()
    assert image.read_bytes() == before


async def test_a_medium_made_by_hand_is_mounted_by_a_rule_that_says_what_the_blob_does_not(
    guest: Guest, tpm: None, agent: InstalledAgent, tmp_path: Path
) -> None:
    medium = media.make_medium(tmp_path / "m.img", "cartridge-07")
    await guest.plug_usb(medium)
    await guest.until("test -b /dev/sda1")
    await guest.sh(
        "modprobe dm-crypt\n"
        'keyctl add trusted card "new 64 keyhandle=0x81000001" @s\n'
        "keyctl pipe $(keyctl search @s trusted card) > /data/caam/cartridge-07.bb\n"
        'dmsetup create card --table "0 $(blockdev --getsz /dev/sda1) '
        'crypt aes-xts-plain64 :64:trusted:card 0 /dev/sda1 0"\n'
        "mkfs.ext4 -q /dev/mapper/card; dmsetup remove --retry card; keyctl clear @s"
    )
    await agent.configure(BY_HAND.replace("length = 64", ""))
    await agent.start()
    await agent.until_said("'cartridge-07'.*failed: .*say it in the rule's key.length")
    await agent.configure(BY_HAND.replace("keyhandle=0x81000001", "keyhandle=blue"))
    await agent.start()
    await agent.until_said("'cartridge-07'.*failed: .*it has no valid form, or needs other options")
    assert await agent.leftovers() == []
    await agent.configure(BY_HAND)
    await agent.start()
    await guest.until_mounted("/run/media/cartridge-07")


async def test_a_master_of_the_tpms_serves_media_without_a_rule(
    guest: Guest, tpm: None, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.start()
    await blank(guest, tmp_path)
    made = await guest.sh(documented("key create"))
    assert made.stdout == "/data/caam/board.bb: made; 64 bytes, trusted\n"
    done = await guest.sh(
        f"caam-hotplug provision /dev/sda --label {LABEL} --backend encrypted --master board "
        "--key-options keyhandle=0x81000001"
    )
    assert done.stderr == ""
    await guest.until_mounted(MADE)


async def test_doctor_calls_a_board_with_a_tpm_healthy_and_tries_it_once_a_rule_has_its_options(
    guest: Guest, tpm: None, agent: InstalledAgent
) -> None:
    await agent.start()
    await guest.sh(documented("key create"))
    found = await findings(guest)
    assert found["known-answer"]["status"] == "unknown"
    assert found["known-answer"]["found"] == (
        "not tried: the trust source needs options, as a TPM does, and no rule has any"
    )
    assert found["blobs"]["found"].startswith("1 of 1")
    await agent.configure(BY_HAND)
    found = await findings(guest)
    assert found["known-answer"]["found"].startswith("a trusted test key encrypts")
    assert found["blobs"]["found"].startswith("1 of 1")
    await agent.configure(BY_HAND.replace("0x81000001", "0x81000001 pcrlock=16"))
    found = await findings(guest)
    assert found["known-answer"]["found"] == (
        "not tried: rules have options that would change the trust source, or that serve once, "
        "or a password"
    )
    assert found["blobs"]["status"] == "unknown"

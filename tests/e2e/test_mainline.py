"""Boards with a mainline kernel: keys and media that are made there, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from documented import commands
from e2e.support import ANY_BUS, POINT, labelled
from vm import boards, media
from vm.boards import MASTER, Board
from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.media import OTPMK_A, OTPMK_B
from vm.sealing import encrypted_blob, trusted_blob

LABEL = "archive-01"
MADE = f"/run/media/{LABEL}"
RECOVERY = f"/root/{LABEL}.recovery"
ON_MAINLINE = pytest.mark.parametrize(
    "board", [boards.ENCRYPTED], ids=["mainline"], indirect=True, scope="package"
)


def documented(*words: str) -> str:
    """Return the command in docs/mainline.md with these words; of several, the first."""
    return next(
        each for each in commands("docs/mainline.md") if all(word in each for word in words)
    )


async def blank(guest: Guest, folder: Path) -> None:
    """Plug an empty medium as /dev/sda."""
    with (folder / "blank.img").open("wb") as file:
        file.truncate(64 << 20)
    await guest.plug_usb(folder / "blank.img")
    await guest.until("test -b /dev/sda")


@ON_MAINLINE
async def test_a_medium_of_a_trusted_key_is_made_and_refused_elsewhere(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    await agent.start()
    await blank(guest, tmp_path)
    refused = await guest.run(
        "caam-hotplug", "provision", "/dev/sda", "--label", LABEL, "--recovery-key", RECOVERY,
        check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "the kernel makes its trusted keys itself and shows them to nobody" in refused.stderr
    await guest.sh(f"test ! -e {RECOVERY} -a ! -e /data/caam/{LABEL}.bb")
    assert not any((tmp_path / "blank.img").read_bytes())
    done = await guest.sh(documented("provision", "--label archive-01"))
    assert done.stdout.startswith(f"/dev/sda1: {LABEL} is made")
    assert done.stderr == ""
    await guest.until_mounted(MADE)
    assert "by its trusted key" in await agent.journal()
    table = (await guest.run("dmsetup", "table")).stdout
    assert " crypt aes-xts-plain64 :64:trusted:caam-hotplug:" in table
    shown = await guest.run("caam-hotplug", "key", "inspect", f"/data/caam/{LABEL}.bb")
    assert shown.stdout.splitlines()[1:] == ["  key_bytes   64", "  blob_bytes  112"]
    explained = await guest.run("caam-hotplug", "explain", "/dev/sda1")
    assert "aes-xts-plain64 under a trusted or encrypted key" in explained.stdout
    await agent.stop()
    await guest.cold_boot_caam(OTPMK_B)
    await agent.start()
    log = await agent.until_said(f"'{LABEL}'.*failed")
    assert "the trust source refused the blob: damaged, sealed on another chip" in log
    await agent.stop()
    await guest.cold_boot_caam(OTPMK_A)


@ON_MAINLINE
async def test_a_medium_under_a_master_opens_on_a_pc_and_a_second_board(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    await agent.start()
    await blank(guest, tmp_path)
    provision = f"caam-hotplug provision /dev/sda --label {LABEL} --backend encrypted"
    refused = await guest.sh(f"{provision} --master none", check=False)
    assert refused.returncode == 1
    assert "use the master key none: no blob /data/caam/none.bb" in refused.stderr
    assert "caam-hotplug key create none --backend trusted --key-bytes 64" in refused.stderr
    await guest.sh(documented("key create"))
    await guest.sh(documented("provision", "--backend encrypted"))
    await guest.until_mounted(MADE)
    assert "by its encrypted key" in await agent.journal()
    await guest.sh(f"echo kept > {MADE}/kept; sync -f {MADE}/kept")
    listed = json.loads((await guest.run("caam-hotplug", "key", "list", "--json")).stdout)
    types = {blob["name"]: (blob["type"], blob["key_bytes"]) for blob in listed}
    assert types[LABEL] == ("encrypted key", 64)
    assert types["board"] == ("trusted key", 64)
    await agent.stop()

    text = (await guest.read(RECOVERY)).decode()
    (command,) = [line[4:] for line in text.splitlines() if line.startswith("#   sed ")]
    assert "--cipher aes-xts-plain64 --key-size 512" in command
    await guest.sh(f"cd /root; {command}; mount /dev/mapper/{LABEL} /mnt")
    assert await guest.read("/mnt/kept") == b"kept\n"
    await guest.sh(f"umount /mnt; cryptsetup close {LABEL}")

    await guest.cold_boot_caam(OTPMK_B)
    await guest.sh(f"rm /data/caam/{LABEL}.bb /data/caam/board.bb")
    await guest.sh(documented("key create"))
    await guest.sh(documented("key enroll"))
    await agent.start()
    await guest.until_mounted(MADE)
    assert await guest.read(f"{MADE}/kept") == b"kept\n"
    await agent.stop()
    await guest.sh(f"rm {RECOVERY}")
    await guest.cold_boot_caam(OTPMK_A)


@ON_MAINLINE
async def test_every_fault_of_a_kernel_key_has_its_own_message(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    sealed = trusted_blob(board.key, OTPMK_A)
    under = encrypted_blob(board.key, MASTER, "master")
    files = {
        "truncated": sealed[:-1],
        "flipped": sealed[:-1] + (b"0" if sealed[-1:] != b"0" else b"1"),
        "foreign": trusted_blob(board.key, OTPMK_B),
        "noise": trusted_blob(bytes(64), OTPMK_A),
        "tagged": bytes.fromhex("4f676154 00000000 01000000 10000000 4c000000") + bytes(76),
        "masterless": encrypted_blob(board.key, MASTER, "nobody"),
        "elsewhere": encrypted_blob(board.key, MASTER, "elsewhere"),
        "impostor": encrypted_blob(board.key, bytes(64), "master"),
        "user": under.replace(b"trusted:", b"user:"),
    }
    await guest.write("/data/caam/elsewhere.bb", trusted_blob(MASTER, OTPMK_B))
    messages = {
        "truncated": "is cut short: 223 hex digits, half a byte too few",
        "flipped": "the trust source refused the blob: damaged, sealed on another chip",
        "foreign": "the trust source refused the blob: damaged, sealed on another chip",
        "noise": "no known filesystem under this key",
        "tagged": "is the kernel's caam_keygen driver there?",
        "masterless": "load the master key nobody: no blob /data/caam/nobody.bb",
        "elsewhere": "the master key elsewhere cannot be used: the trust source refused the blob",
        "impostor": "damaged, or encrypted under another master key than this board's master",
        "user": "is encrypted under user:, and only a trusted key keeps such a key to this board",
    }
    for name, content in files.items():
        await guest.write(f"/data/caam/cartridge-{name}.bb", content)
    await agent.configure(ANY_BUS)
    await agent.start()
    images = {name: labelled(tmp_path, f"cartridge-{name}", board, size_mib=4) for name in messages}
    before = {name: media.partition_bytes(image) for name, image in images.items()}
    plugs = [await guest.plug_scsi(image) for image in images.values()]
    lines = await agent.until_said("'cartridge-[a-z]+' .*failed: ", times=len(messages))
    for name, words in messages.items():
        (line,) = [line for line in lines.splitlines() if f"'cartridge-{name}'" in line]
        assert words in line
    assert await agent.leftovers() == []
    for plug in plugs:
        await plug.pull()
    assert {name: media.partition_bytes(image) for name, image in images.items()} == before


@ON_MAINLINE
async def test_doctor_calls_a_mainline_board_healthy_and_names_a_blob_of_another(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    await agent.start()
    await guest.sh("chmod 700 /data/caam")
    await guest.plug_usb(labelled(tmp_path, "cartridge-01", board))
    await guest.until_mounted(POINT)
    examined = await guest.sh("caam-hotplug doctor --json", check=False, timeout_s=120)
    findings = json.loads(examined.stdout)["findings"]
    amiss = [f for f in findings if f["status"] in {"warning", "failure"}]
    assert amiss == []
    found = {f["check"]: f for f in findings}
    assert found["caam-device"]["found"].startswith("the kernel has trusted keys")
    assert found["known-answer"]["found"].startswith("a trusted test key encrypts")
    assert "xts(aes)" in found["ciphers"]["found"]
    assert found["blobs"]["found"].startswith("2 of 2")
    await guest.write("/data/caam/foreign.bb", trusted_blob(board.key, OTPMK_B))
    examined = await guest.sh("caam-hotplug doctor --json", check=False, timeout_s=120)
    assert examined.returncode == 1
    (amiss,) = [f for f in json.loads(examined.stdout)["findings"] if f["status"] == "failure"]
    assert "foreign.bb: the trust source refused the blob" in amiss["found"]

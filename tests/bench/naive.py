"""P: a first, simple program. A loop over pyudev that runs the board's tools one after the other.

python3 naive.py LABELS MOUNT_ROOT
"""

from __future__ import annotations

import fnmatch
import os
import socket
import subprocess
import sys

import pyudev


def run(*command: str, stdin: bytes | None = None) -> str:
    """Run the program and return its output."""
    done = subprocess.run(command, input=stdin, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode()


def arrive(label: str, point: str, node: str) -> None:
    """Mount the medium."""
    black = f"/data/caam/{label}"
    run("caam-keygen", "import", f"{black}.bb", label)
    with open(black, "rb") as file:
        run("keyctl", "padd", "logon", "logkey:", "@s", stdin=file.read())
    os.unlink(black)
    sectors = run("blockdev", "--getsz", node).strip()
    table = f"0 {sectors} crypt capi:tk(cbc(aes))-plain :36:logon:logkey: 0 {node} 0"
    run("dmsetup", "create", label, "--table", table)
    run("keyctl", "clear", "@s")
    os.makedirs(point, exist_ok=True)
    run("mount", "-o", "nosuid,nodev,noexec", f"/dev/mapper/{label}", point)


def depart(label: str, point: str) -> None:
    """Unmount the medium and remove its mapping and mount point."""
    run("umount", point)
    run("dmsetup", "remove", "--retry", label)
    os.rmdir(point)


def say_ready() -> None:
    """Report to the service manager that no later event will be missed: sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outlet:
        outlet.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))


def main() -> None:
    """Serve media until killed."""
    labels, root = sys.argv[1:]
    monitor = pyudev.Monitor.from_netlink(pyudev.Context())
    monitor.filter_by("block", "partition")
    monitor.start()
    say_ready()
    for device in iter(monitor.poll, None):
        label = device.properties.get("ID_PART_ENTRY_NAME", "")
        if fnmatch.fnmatchcase(label, labels):
            if device.action == "add":
                arrive(label, f"{root}/{label}", device.device_node)
            elif device.action == "remove":
                depart(label, f"{root}/{label}")


if __name__ == "__main__":
    main()

"""Write docs/dbus.md from config/org.caamhotplug1.xml: python3 docs/generate_dbus.py"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = ROOT / "config" / "org.caamhotplug1.xml"
EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"
SIGNALLED = {"const": " Never changes.", "false": " Changes are not signalled."}

BEGIN = """\
# The D-Bus interface

This page is made from `config/org.caamhotplug1.xml` by `docs/generate_dbus.py`. The service is
optional: without a bus the agent serves media all the same, and says so once in the journal.

"""
END = """\
## Access

| | read | Explain | Reload, Unlock, UnlockWithoutMount, Lock, Eject, Retry |
|---|---|---|---|
| root | yes | yes | yes |
| members of group `caam-hotplug` | yes | yes | yes |
| everyone else | yes | no | no |

The policy of the bus is `config/org.caamhotplug1.conf`, which is installed in
`/usr/share/dbus-1/system.d`. For the last column the agent also asks the bus for the sender of the
message, and checks its permission itself. It logs the sender of each request, refused or not.

Requests of all senders together take a tenth of a processor's time in the long run; the rest waits.
There is no answer to a message of more than 128 KiB, or one with file descriptors.

## Errors

Errors are named `org.caamhotplug1.Error.*`. The message names operation, subject and cause, and if
possible what to do.

| name | when |
|---|---|
| `RequestRefused` | the volume's state does not allow it |
| `VolumeBusy` | others use the volume or its disk; the message has a line for each |
| `Suspended` | its mapping is suspended, so that writes wait; the message has the cure |
| `WritesLost` | a write to the medium has failed since it was inserted |
| `Configuration` | Reload found mistakes; the message has a line for each |
| `BlobMissing`, `BlobRejected`, `Blob` | the blob is absent, refused by the CAAM, or not a blob |
| `MasterKey` | the trusted key that the blob is encrypted under is absent, or of another board |
| `NoFilesystem` | no known filesystem under this key |
| `DeviceInUse`, `DeviceLocked` | another program uses the device |
| `ForeignMapping`, `MountPointOccupied` | another mapping or mount has the name |
| `UnsupportedVolume`, `UnsafePath`, `UnfitFile` | the volume or the file is not safe to use |
| `Release` | a part of the volume could not be released |
| `Flush` | it is not known whether all that was written has reached the medium |
| `MappingBusy`, `MountBusy` | the kernel reports mapping or mount in use |
| `MediumGone` | the medium went while the request was carried out |
| `Unknown` | the kernel did not say what had to be known first; the message has the cure |
| `Kernel`, `Caam`, `Keyring`, `DeviceMapper`, `Mount` | a call to the kernel failed |
| `Failed` | any other failure; the journal has more |

An unknown option of Eject is `org.freedesktop.DBus.Error.InvalidArgs`. A sender without permission
gets `org.freedesktop.DBus.Error.AccessDenied`.

## With gdbus

    timeout 60 gdbus monitor --system --dest org.caamhotplug1
    gdbus call --system --dest org.caamhotplug1 --object-path /org/caamhotplug1 \\
      --method org.caamhotplug1.Manager.Explain /dev/sdb1

## With busctl

    busctl tree org.caamhotplug1
    busctl introspect org.caamhotplug1 /org/caamhotplug1/volumes/9_1
    busctl --timeout=600 call org.caamhotplug1 /org/caamhotplug1/volumes/9_1 \\
      org.caamhotplug1.Volume Eject 'a{sv}' 1 power-off b false
    timeout 60 busctl monitor org.caamhotplug1
"""


def reference(contract: Path) -> str:
    """Return the page, made from the contract's comments and types."""
    source = contract.read_text()
    head = source.partition("<!--\n")[2].partition("-->\n<node>")[0]
    lines = [BEGIN, head, "\n"]
    root = ET.fromstring(source, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    for interface, text in _documented(root, "interface"):
        lines.append(f"## {interface.get('name')}\n\n{text}\n\n")
        lines.extend(_methods(interface))
        lines.append("\n| property | type | |\n|---|---|---|\n")
        for member, meaning in _documented(interface, "property"):
            notes = [
                n.get("value") or "" for n in member.iter("annotation") if n.get("name") == EMITS
            ]
            more = "".join(SIGNALLED.get(note, "") for note in notes)
            lines.append(f"| `{member.get('name')}` | `{member.get('type')}` | {meaning}{more} |\n")
        lines.append("\n")
    return "".join([*lines, END])


def _methods(interface: ET.Element) -> Iterator[str]:
    for method, text in _documented(interface, "method"):
        arguments = list(_documented(method, "arg"))
        takes, returns = (
            ", ".join(
                f"{a.get('name')}: {a.get('type')}"
                for a, _ in arguments
                if a.get("direction") == direction
            )
            for direction in ("in", "out")
        )
        result = f" → {returns}" if returns else ""
        yield f"- **`{method.get('name')}({takes}){result}`** {text}\n"
        for argument, meaning in arguments:
            yield f"  - `{argument.get('name')}`: {meaning}\n"


def _documented(parent: ET.Element, tag: str) -> Iterator[tuple[ET.Element, str]]:
    """Yield the children of this tag, each with the comment before it as one line."""
    comment = ""
    for child in parent:
        if child.tag is ET.Comment:
            comment = " ".join((child.text or "").split())
        elif child.tag == tag:
            yield child, comment


if __name__ == "__main__":
    (ROOT / "docs" / "dbus.md").write_text(reference(CONTRACT))

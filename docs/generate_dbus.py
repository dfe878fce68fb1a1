"""Writes docs/dbus.md from config/org.caamhotplug1.xml: python3 docs/generate_dbus.py"""

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
optional: the agent serves media without a bus too, and then says so once in the journal.

"""
END = """\
## Who may do what

| | look | Explain | Reload, Unlock, Lock, Eject, Retry |
|---|---|---|---|
| root | yes | yes | yes |
| members of group `caam-hotplug` | yes | yes | yes |
| everyone else | yes | no | no |

The bus holds to this by `config/org.caamhotplug1.conf`, which is installed in
`/usr/share/dbus-1/system.d`. For the last column the agent asks the bus who has sent the message,
and looks again itself. It logs who asked for what, and whom it has refused.

## Errors

Errors are named `org.caamhotplug1.Error.*`. The message says operation, subject and cause, and what
to do where that is known.

| name | when |
|---|---|
| `RequestRefused` | the volume's state does not allow it |
| `VolumeBusy` | somebody uses it; the message has a line for each process |
| `Configuration` | Reload found a mistake; a line each |
| `BlobMissing`, `BlobRejected`, `Blob` | the blob is absent, refused by the CAAM, or none |
| `MasterKey` | the trusted key that the blob is encrypted under is absent, or of another board |
| `NoFilesystem` | nothing known lies under this key |
| `DeviceInUse`, `DeviceLocked` | something else uses it |
| `ForeignMapping`, `MountPointOccupied` | something else is in the way |
| `UnsupportedVolume`, `UnsafePath`, `UnfitFile` | it would be unsafe |
| `Release` | something could not be let go |
| `MappingBusy`, `MountBusy` | the kernel says that it is in use |
| `Kernel`, `Caam`, `Keyring`, `DeviceMapper`, `Mount` | a call failed |
| `Failed` | anything else; the journal has more |

An option of Eject that is not known is `org.freedesktop.DBus.Error.InvalidArgs`. Who may not ask
gets `org.freedesktop.DBus.Error.AccessDenied`.

## With busctl

    busctl tree org.caamhotplug1
    busctl introspect org.caamhotplug1 /org/caamhotplug1/volumes/9_1
    busctl --timeout=600 call org.caamhotplug1 /org/caamhotplug1/volumes/9_1 \\
      org.caamhotplug1.Volume Eject 'a{sv}' 1 power-off b false
    timeout 60 busctl monitor org.caamhotplug1

## With gdbus

    timeout 60 gdbus monitor --system --dest org.caamhotplug1
    gdbus call --system --dest org.caamhotplug1 --object-path /org/caamhotplug1 \\
      --method org.caamhotplug1.Manager.Explain /dev/sdb1
"""


def reference(contract: Path) -> str:
    """The page, from the contract's comments and types."""
    text = contract.read_text()
    head = text.partition("<!--\n")[2].partition("-->\n<node>")[0]
    lines = [BEGIN, head, "\n"]
    root = ET.fromstring(text, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    for interface, words in _documented(root, "interface"):
        lines.append(f"## {interface.get('name')}\n\n{words}\n\n")
        lines.extend(_methods(interface))
        lines.append("\n| property | type | |\n|---|---|---|\n")
        for of, words_of in _documented(interface, "property"):
            notes = [n.get("value") or "" for n in of.iter("annotation") if n.get("name") == EMITS]
            more = "".join(SIGNALLED.get(note, "") for note in notes)
            lines.append(f"| `{of.get('name')}` | `{of.get('type')}` | {words_of}{more} |\n")
        lines.append("\n")
    return "".join([*lines, END])


def _methods(interface: ET.Element) -> Iterator[str]:
    for method, words in _documented(interface, "method"):
        arguments = list(_documented(method, "arg"))
        taken, given = (
            ", ".join(
                f"{a.get('name')}: {a.get('type')}"
                for a, _ in arguments
                if a.get("direction") == direction
            )
            for direction in ("in", "out")
        )
        returns = f" → {given}" if given else ""
        yield f"- **`{method.get('name')}({taken}){returns}`** {words}\n"
        for argument, words_of in arguments:
            yield f"  - `{argument.get('name')}`: {words_of}\n"


def _documented(parent: ET.Element, tag: str) -> Iterator[tuple[ET.Element, str]]:
    """The children of this tag, each with the comment before it as one line."""
    words = ""
    for child in parent:
        if child.tag is ET.Comment:
            words = " ".join((child.text or "").split())
        elif child.tag == tag:
            yield child, words


if __name__ == "__main__":
    (ROOT / "docs" / "dbus.md").write_text(reference(CONTRACT))

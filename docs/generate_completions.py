"""Write the shells' completions, config/completions: `make man`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import shtab
from generate_man import REPOSITORY, commands, shown

from caam_hotplug.cli import main as cli


def main() -> None:
    """Write every completion into the repository."""
    for name, text in completions(cli._parser()).items():
        (REPOSITORY / name).write_text(text)


_PLAIN: Final = "[A-Za-z0-9_][A-Za-z0-9._-]*"
# Anybody may write a label, and root's shell would expand it. Only names that the agent accepts as
# well are offered.
_VOLUMES: Final = (
    "timeout 1 caam-hotplug status --json 2>/dev/null | "
    f"""grep -oiE '"(label|device)": *"(/dev/)?{_PLAIN}"' | sed 's/"$//; s/.*"//' | sort -u"""
)
_DEVICES: Final = "ls /sys/class/block 2>/dev/null | grep -E '^[a-z0-9]+$' | sed 's,^,/dev/,'"
_LISTS: Final = {"volumes": _VOLUMES, "devices": _DEVICES}
_PREAMBLE: Final = {
    "bash": "_caam_hotplug_{name}() {{\n  compgen -W \"$({command})\" -- \"$1\"\n}}\n",
    "zsh": "_caam_hotplug_{name}() {{\n  local -a found\n  found=(${{(f)\"$({command})\"}})\n"
    "  compadd -a found\n}}\n",
    "fish": "function _caam_hotplug_{name}\n  {command}\nend\n",
}  # fmt: skip


def completions(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Make the completions of every shell, by their path in the repository."""
    for _, one, _ in commands(parser, parser.prog, ""):
        for action in shown(one):
            offered = _offered(action)
            if offered is not None:
                action.complete = offered  # type: ignore[attr-defined]  # as shtab wants it
    preamble: Any = {
        shell: "".join(text.format(name=n, command=c) for n, c in _LISTS.items())
        for shell, text in _PREAMBLE.items()
    }
    files = {"bash": f"{parser.prog}.bash", "zsh": f"_{parser.prog}", "fish": f"{parser.prog}.fish"}
    return {
        f"config/completions/{name}": shtab.complete(parser, shell, preamble=preamble).rstrip("\n")
        + "\n"
        for shell, name in files.items()
    }


def _offered(action: argparse.Action) -> Any:
    """Choose the words that a shell offers for an argument, by its name in the help."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if "LABEL|" in metavar or "|LABEL" in metavar or metavar == "VOLUME":
        return _function("volumes")
    if "DEVICE" in metavar:
        return _function("devices")
    if "DIR" in metavar:
        return shtab.DIRECTORY
    return shtab.FILE if "FILE" in metavar or action.type is Path else None


def _function(name: str) -> dict[str, str]:
    """Name the shell function that lists such words, for each shell."""
    function = f"_caam_hotplug_{name}"
    return {"bash": function, "zsh": function, "fish": f"({function})"}


if __name__ == "__main__":
    main()

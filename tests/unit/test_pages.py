"""Manual pages and completions: up to date, well formed, and of use in a real shell."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import subprocess
import time
from pathlib import Path

import generate_completions
import generate_man
import pytest

from caam_hotplug.cli import main as cli

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = generate_man.generated()
GENERATED = PAGES | generate_completions.completions(cli._parser())
HOSTILE = r"""[
  {"label": "cartridge-01", "device": "/dev/sdb1", "state": "mounted"},
  {"label": "$(touch ran)", "device": "/dev/sdc1"},
  {"label": "`touch ran`;touch ran", "device": null},
  {"label": "x\", \"label\": \"forged"},
  {"label": "-rf"},
  {"label": "a b"}
]"""
"""Output that `status --json` might print; anybody may write a label."""


@pytest.mark.parametrize("name", GENERATED)
def test_the_committed_file_is_what_the_generator_writes(name: str) -> None:
    assert (REPOSITORY / name).read_text() == GENERATED[name], "run `make man`"


def parser() -> argparse.ArgumentParser:
    """Make a parser with everything that the program's own may have."""
    made = argparse.ArgumentParser(
        prog="caam-hotplug",
        description="Does what is needed.",
        epilog="examples:\n  caam-hotplug key list        'all' \\ ~ of them\n\n"
        "exit status: 0 done; 1 refused, see standard error\n2 wrong usage\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(required=True)
    eject = commands.add_parser("eject", help="take it out", description="Ejects.\n\n  as code")
    eject.add_argument("volume", metavar="LABEL|DEVICE", help="which one, 100 %% safe")
    eject.add_argument(
        "--on-busy", choices=["refuse", "signal", "detach"], metavar="HOW", help="who stays"
    )
    eject.epilog = "Without a heading.\n\nexamples:\n  caam-hotplug eject x"
    either = eject.add_mutually_exclusive_group()
    either.add_argument("--json", action="store_true", help=".json, not `a table`")
    either.add_argument("--quiet", "-q", action="store_true", help=argparse.SUPPRESS)
    key = commands.add_parser("key", help="keys", epilog="notes:\n.starts with a dot — so what")
    keys = key.add_subparsers(required=True)
    keys.add_parser("list", help="list them").add_argument("files", nargs="*", metavar="FILE")
    keys.add_parser("create", help="make one").add_argument("--key-bytes", type=int, required=True)
    keys.add_parser("delete", help="one", epilog="notes:\n.starts with a dot — so what")
    keys.add_parser("secret", help=argparse.SUPPRESS)
    return made


def of_everything() -> dict[str, str]:
    return {"everything.1": generate_man.page_of_parser(parser())}


def complaints(page: str) -> list[str]:
    """List the complaints of the renderers about a page, which has no date on purpose."""
    found = []
    for command in (["groff", "-man", "-Tutf8", "-ww", "-z"], ["mandoc", "-T", "lint"]):
        done = subprocess.run(command, input=page, capture_output=True, text=True)
        found += (done.stdout + done.stderr).splitlines()
    return [line for line in found if "missing date" not in line and "STYLE" not in line]


@pytest.mark.parametrize("page", [*PAGES, "everything.1"])
def test_a_page_renders_without_a_complaint(page: str) -> None:
    assert complaints((GENERATED | of_everything())[page]) == []


def test_a_complaint_would_be_noticed() -> None:
    assert complaints(".TH X 1\n.SH NAME\nx \\- y\n.NOSUCH\n") != []


def rendered(page: str) -> str:
    done = subprocess.run(
        ["mandoc", "-T", "utf8"], input=page, capture_output=True, text=True, check=True
    )
    return " ".join(re.sub(".\b", "", done.stdout).split())  # bold is a letter struck twice


def test_a_page_has_all_that_the_parser_has() -> None:
    said = rendered(of_everything()["everything.1"])
    for words in (
        "caam-hotplug eject LABEL|DEVICE [--on-busy HOW] [--json]",
        "caam-hotplug key list [FILE ...]",
        "caam-hotplug key create --key-bytes KEY_BYTES",
        "Which one, 100 % safe.",
        "Who stays: refuse, signal, detach.",
        ".json, not a table.",
        "as code",
        "caam-hotplug key list 'all' \\ ~ of them",
        "EXIT STATUS 0 Done. 1 Refused, see standard error. 2 Wrong usage.",
        "Notes: .starts with a dot — so what",
        "Without a heading. Examples: caam-hotplug eject x",
        "key delete One. Notes: As for key.",
    ):
        assert words in said
    assert "quiet" not in said
    assert "secret" not in said


def test_the_configurations_page_has_every_key_with_the_words_of_the_installed_file() -> None:
    said = rendered(GENERATED["docs/man/caam-hotplug.toml.5"])
    assert 'on_stop = "lock" Treatment at a clean stop of the agent: "lock" unmounts' in said
    assert 'label = "backup-*" uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8" Label and' in said
    assert "[rule.mount] Place and options of the mount." in said
    assert "EXAMPLE A second rule as an example" in said
    assert '[rule.mount.filesystem_options] vfat = ["utf8"]' in said


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a directory with the completions of such a parser, and the program."""
    for name, text in generate_completions.completions(parser()).items():
        (tmp_path / Path(name).name).write_text(text)
    program = tmp_path / "caam-hotplug"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = 'status --json' ] && cat <<'X'\n{HOSTILE}\nX\n")
    program.chmod(0o755)
    (tmp_path / "a-file.toml").touch()
    return tmp_path


def in_place(place: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{place}:{os.environ['PATH']}", "HOME": str(place)}


def bash_offers(place: Path, line: str) -> set[str]:
    """Ask bash for its offers for the last word of the line."""
    words = " ".join(f"'{word}'" for word in line.split(" "))
    script = (
        f"source ./caam-hotplug.bash; COMP_WORDS=({words})\n"
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n"
        'function=$(complete -p caam-hotplug | sed "s/.*-F //; s/ .*//"); $function\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return asked(["bash", "--norc", "-c", script], place)


def fish_offers(place: Path, line: str) -> set[str]:
    """Ask fish for its offers for the last word of the line."""
    script = f"source ./caam-hotplug.fish; complete -C '{line}'"
    return {one.split("\t")[0] for one in asked(["fish", "--no-config", "-c", script], place)}


def asked(command: list[str], place: Path) -> set[str]:
    done = subprocess.run(command, cwd=place, env=in_place(place), capture_output=True, text=True)
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


VOLUMES = {"cartridge-01", "sdb1", "sdc1"}
OFFERS = [
    ("caam-hotplug ", {"eject", "key"}),
    ("caam-hotplug e", {"eject"}),
    ("caam-hotplug key ", {"list", "create", "delete"}),
    ("caam-hotplug key create --k", {"--key-bytes"}),
    ("caam-hotplug eject --on-busy ", {"refuse", "signal", "detach"}),
    ("caam-hotplug eject --on-busy si", {"signal"}),
    ("caam-hotplug eject ", {"cartridge-01", "/dev/sdb1", "/dev/sdc1"}),
    ("caam-hotplug eject /dev/sdb", {"/dev/sdb1"}),
    ("caam-hotplug key list a-f", {"a-file.toml"}),
]


@pytest.mark.parametrize(("line", "offers"), OFFERS)
@pytest.mark.parametrize("offered", [bash_offers, fish_offers])
def test_a_shell_offers_what_may_come_next(
    place: Path, offered: object, line: str, offers: set[str]
) -> None:
    assert callable(offered)
    assert offered(place, line) == offers
    assert not (place / "ran").exists()


def zsh_completes(place: Path, line: str, expected: str) -> bool:
    """Whether zsh, on a terminal, completes the line to the expected one."""
    (place / ".zshrc").write_text(
        "fpath=($HOME $fpath); autoload -U compinit; compinit -D -u; PS1='> '; PS2=\n"
        "unsetopt prompt_cr prompt_sp; LISTMAX=1000\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execvpe("zsh", ["zsh", "-d", "-i"], in_place(place) | {"TERM": "dumb"})
    said, deadline, typed = "", time.monotonic() + 30, False
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                said += os.read(terminal, 4096).decode(errors="replace")
            if not typed and "> " in said:
                os.write(terminal, f"{line}\t".encode())
                typed = True
            if typed and expected in said:
                return True
    except OSError:
        return False
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return False


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("caam-hotplug ej", "caam-hotplug eject "),
        ("caam-hotplug key cr", "key create "),
        ("caam-hotplug eject car", "eject cartridge-01 "),
        ("caam-hotplug eject --on-busy si", "--on-busy signal "),
        ("caam-hotplug key list a-f", "list a-file.toml "),
    ],
)
def test_zsh_completes_a_line(place: Path, line: str, expected: str) -> None:
    assert zsh_completes(place, line, expected)
    assert not (place / "ran").exists()


def test_the_committed_completions_offer_the_programs_commands(tmp_path: Path) -> None:
    for name, text in GENERATED.items():
        if "completions" in name:
            (tmp_path / Path(name).name).write_text(text)
    assert bash_offers(tmp_path, "caam-hotplug expl") == {"explain"}
    assert fish_offers(tmp_path, "caam-hotplug expl") == {"explain"}

"""Statements of README and docs are true: commands run, options exist, links lead to pages."""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.cli import main as cli
from documented import NO_COMMANDS, PAGES, REPOSITORY, blocks

BY_TESTS: Final = {
    "tests/e2e/test_docs.py::test_the_quick_start_ends_in_a_mounted_medium": [
        "ls -l /dev/caam-keygen",
        "grep -A9 'tk(cbc(aes))' /proc/crypto",
        "install -d -m 0700 -o root -g root /data/caam",
        "caam-keygen create cartridge-01 ecb -s 16",
        "ls -l /data/caam",
        "sgdisk --zap-all --new=1:0:0 --change-name=1:cartridge-01 /dev/sdX",
        "udevadm settle",
        "DEV=/dev/sdX1",
        "cat /data/caam/cartridge-01 | keyctl padd logon logkey: @s",
        'dmsetup create making --table "0 $(blockdev --getsz $DEV) crypt capi:tk(cbc(aes))-plain '
        ':36:logon:logkey: 0 $DEV 0 1 sector_size:512"',
        "mkfs.ext4 -L cartridge-01 /dev/mapper/making",
        "dmsetup remove --retry making",
        "keyctl clear @s",
        "rm /data/caam/cartridge-01",
        "apt install ./build/caam-hotplug_0.1.0_arm64.deb",
        "caam-hotplug check /etc/caam-hotplug/agent.toml",
        "caam-hotplug doctor",
        "systemctl status caam-hotplug",
        "journalctl -u caam-hotplug -o cat",
        "ls /run/media/cartridge-01",
    ],
    "tests/e2e/test_docs.py::test_what_the_page_on_debugging_looks_at_can_be_looked_at": [
        "caam-hotplug explain /dev/sdb1",
        "udevadm info --query=property /dev/sdb1",
        "lsblk -o NAME,SIZE,PARTLABEL,SERIAL,MOUNTPOINTS /dev/sdb",
        "journalctl -u caam-hotplug -b -o cat",
        "journalctl -u caam-hotplug -b LABEL=cartridge-01",
        "udevadm trigger /dev/sdb1",
        "journalctl -k -b -g 'caam|device-mapper|sd[a-z]'",
        "dmsetup table",
        "dmsetup info -c",
        "dmsetup ls --tree",
        "grep /run/media /proc/self/mountinfo",
        "grep caam-hotplug /proc/keys",
    ],
    "tests/e2e/test_mainline.py::test_a_medium_of_a_trusted_key_is_made_and_refused_elsewhere": [
        "caam-hotplug provision /dev/sda --label archive-01",
    ],
    "tests/e2e/test_mainline.py::test_a_medium_under_a_master_opens_on_a_pc_and_a_second_board": [
        "caam-hotplug key create board --backend trusted --key-bytes 64",
        "caam-hotplug provision /dev/sda --label archive-01 --backend encrypted --master board "
        "--recovery-key /root/archive-01.recovery",
        "caam-hotplug key enroll archive-01 --from /root/archive-01.recovery --backend encrypted "
        "--master board",
    ],
    "tests/e2e/test_tpm.py::"
    "test_a_medium_is_made_outlives_the_power_and_is_refused_with_another_tpm": [
        "tpm2_createprimary -C o -G ecc256 -a 'fixedtpm|fixedparent|sensitivedataorigin|"
        "userwithauth|noda|restricted|decrypt' -c /run/storage-key",
        "tpm2_evictcontrol -C o -c /run/storage-key 0x81000001",
        "caam-hotplug provision /dev/sda --label archive-02 --backend trusted "
        "--key-options keyhandle=0x81000001 --rule",
    ],
    "tests/e2e/test_tpm.py::test_a_master_of_the_tpms_serves_media_without_a_rule": [
        "caam-hotplug key create board --backend trusted --key-options keyhandle=0x81000001",
    ],
    "tests/e2e/test_migrate.py::test_a_medium_is_released_moved_and_mounted_again_by_its_new_key": [
        "caam-hotplug lock archive-01",
        "caam-hotplug migrate archive-01 --to trusted",
        "caam-hotplug migrate archive-01 --to trusted --dry-run",
        "caam-hotplug unlock archive-01",
        "caam-hotplug migrate archive-01 --to encrypted --master board "
        "--recovery-key /root/archive-01.recovery",
        "caam-hotplug migrate archive-01 --to tagged",
    ],
    "tests/e2e/test_docs.py::test_the_journals_questions_have_answers": [
        "journalctl MESSAGE_ID=4d2a9b394c4e496a8514c481e22a25e3",
        "journalctl MESSAGE_ID=ed926665d938401c82c932addd7ca5a0 -o json-pretty",
        "journalctl -u caam-hotplug LABEL=cartridge-01",
        "journalctl -u caam-hotplug VOLUME=9-1 -o cat",
        "journalctl -u caam-hotplug -p warning -b",
    ],
    "tests/e2e/test_docs.py::test_a_second_board_opens_a_medium_that_was_enrolled_there": [
        'caam-keygen create cartridge-01 ecb -t "sixteen byte key"',
        "ls -l /data/caam/cartridge-01.bb",
    ],
    "tests/e2e/test_docs.py::test_a_medium_is_read_without_any_caam": [
        '(umask 077; printf %s "sixteen byte key" > recovery.key)',
        "stat -c %s recovery.key",
        "cryptsetup open --type plain --cipher aes-cbc-plain --key-size 128 "
        "--key-file recovery.key --readonly /dev/sdX1 recovered",
        "mount -o ro,noload /dev/mapper/recovered /mnt",
        "ls /mnt",
        "umount /mnt",
        "cryptsetup close recovered",
        "shred -u recovery.key",
    ],
    "tests/e2e/test_bus.py::test_a_busy_volume_is_not_ejected_and_its_holder_is_named": [
        "caam-hotplug status",
        "caam-hotplug eject cartridge-01",
    ],
    "tests/e2e/test_bus.py::test_every_command_of_the_page_on_the_bus_works": [
        "busctl tree org.caamhotplug1",
        "busctl introspect org.caamhotplug1 /org/caamhotplug1/volumes/9_1",
        "busctl --timeout=600 call org.caamhotplug1 /org/caamhotplug1/volumes/9_1 "
        "org.caamhotplug1.Volume Eject 'a{sv}' 1 power-off b false",
        "timeout 60 busctl monitor org.caamhotplug1",
        "timeout 60 gdbus monitor --system --dest org.caamhotplug1",
        "gdbus call --system --dest org.caamhotplug1 --object-path /org/caamhotplug1 "
        "--method org.caamhotplug1.Manager.Explain /dev/sdb1",
    ],
    "tests/e2e/test_provision.py::"
    "test_a_medium_made_beside_the_agent_is_mounted_and_opens_on_a_pc_and_a_second_board": [
        "caam-hotplug provision /dev/sdb --label archive-01 "
        "--recovery-key /root/archive-01.recovery",
        "caam-hotplug key list",
        "caam-hotplug key inspect /data/caam/archive-01.bb",
        "caam-hotplug key create spare-01 --key-bytes 32",
        "sed -n 's/^key = //p' archive-01.recovery | base64 -d | cryptsetup open --type plain "
        "--cipher aes-cbc-plain --key-size 128 --hash plain --sector-size 512 --key-file - "
        "/dev/disk/by-partlabel/archive-01 archive-01",
        "mount /dev/mapper/archive-01 /mnt",
        "cryptsetup close archive-01",
        "caam-hotplug key enroll archive-01 --from /root/archive-01.recovery",
    ],
    "tests/e2e/test_provision.py::"
    "test_a_partition_is_made_while_another_of_its_disk_is_mounted_and_the_agent_mounts_it": [
        "caam-hotplug provision recorder --rule",
        "caam-hotplug provision /dev/sdb2 --label recorder --erase sdb2 --dry-run",
    ],
    "tests/e2e/test_provision.py::"
    "test_a_medium_that_holds_something_is_erased_for_the_running_agent": [
        "caam-hotplug provision /dev/sdb --label cartridge-01",
        "caam-hotplug provision /dev/sdb --label cartridge-01 --erase sdb",
        "caam-hotplug provision /dev/sdb --label cartridge-01 --erase sdb --dry-run",
    ],
    "tests/e2e/test_replug.py::"
    "test_a_stick_goes_and_comes_and_its_figures_tell_nothing_of_whose_it_is": [
        "python3 measure replug /dev/sda1 --json board.json",
    ],
    "tests/e2e/test_replug.py::test_by_hand_it_says_when_to_pull_and_when_to_plug": [
        "python3 measure replug /dev/sda1 --by-hand --cycles 5 --json board.json",
    ],
    "tests/e2e/test_sleep.py::test_volumes_are_locked_before_a_sleep_that_requires_it": [
        "systemctl add-requires systemd-suspend.service caam-hotplug-sleep.service",
    ],
    "tests/e2e/test_upgrade_and_removal.py::"
    "test_an_installation_by_make_runs_without_further_changes": [
        "make install",
        "systemd-sysusers",
        "udevadm control --reload",
        "systemctl daemon-reload",
        "systemctl enable --now caam-hotplug",
        "systemctl enable caam-hotplug-sleep",
    ],
    "tests/kernel/test_throughput.py::test_every_combination_has_figures_in_one_run": [
        "python3 measure throughput --json > board.json",
    ],
    "tests/unit/cli/test_main.py::test_a_valid_file_is_reported_with_its_rules_in_order": [
        "caam-hotplug check agent.toml",
    ],
    "tests/unit/cli/test_main.py::test_a_file_that_run_would_refuse_is_valid_with_a_warning": [
        "caam-hotplug check ~/agent.toml",
    ],
    "tests/unit/test_docs.py::test_every_documented_make_target_exists": [
        "make bench",
        "make bench SYSTEMS=agent,L",
        "make bench WHAT=cycles,storm,scaling,start,idle",
        "make check",
        "make clean",
        "make coverage",
        "make deb",
        "make demo",
        "make fuzz",
        "make man",
        "make soak",
        "make test",
        "make throughput",
        "make vm-shell",
        "make wheel",
    ],
    "tests/unit/test_docs.py::test_every_documented_test_exists": [
        "tests/run-all tests/e2e -k pulled",
    ],
}
"""Test that runs each documented command, on the real thing or, where it says so, dry."""

BY_NOBODY: Final = {
    "it takes a second machine": [
        "scp -r tools/measure root@board:",
    ],
    "tests/install/test_wheel.py does so elsewhere than in /opt": [
        "python3 -m venv /opt/caam-hotplug",
        "/opt/caam-hotplug/bin/pip install build/caam_hotplug-0.1.0-py3-none-any.whl",
        "ln -s /opt/caam-hotplug/bin/caam-hotplug /usr/bin/caam-hotplug",
    ],
}
"""Commands that no test can run, with the reason."""

EVERY: Final = [
    (f"{block.page}:{block.line}", command)
    for page in PAGES
    for block in blocks(page)
    if block.has_commands
    for command in block.commands()
]
COVERED: Final = [
    command
    for listed in (BY_TESTS, BY_NOBODY)
    for several in listed.values()
    for command in several
]
INLINE: Final = [
    (f"{page.name}: {text}", text)
    for page in PAGES
    for text in re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()))
]


@pytest.mark.parametrize(("where", "command"), EVERY)
def test_every_documented_command_is_run_by_a_test(where: str, command: str) -> None:
    assert command in COVERED, f"{where}: say in tests/unit/test_docs.py which test runs it"


def test_every_listed_command_is_on_a_page() -> None:
    assert set(COVERED) - {command for _, command in EVERY} == set()
    assert len(COVERED) == len(set(COVERED))
    firsts = {
        next((line.strip() for line in block.lines if line.strip()), "")
        for page in PAGES
        for block in blocks(page)
    }
    assert set(NO_COMMANDS) - firsts == set()


@pytest.mark.parametrize("node", BY_TESTS)
def test_every_test_that_runs_commands_exists(node: str) -> None:
    assert_is_there(node)


def assert_is_there(node: str) -> None:
    file, _, name = node.partition("::")
    tree = ast.parse((REPOSITORY / file).read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {one.name for one in tree.body if isinstance(one, functions)}


def words_of(command: str) -> list[str]:
    return shlex.split(re.split(r"[|;&>]", command)[0])


@pytest.mark.parametrize(
    ("where", "command"), [(w, c) for w, c in EVERY if c.startswith("caam-hotplug ")]
)
def test_every_documented_command_of_the_agent_has_valid_options(where: str, command: str) -> None:
    try:
        cli._parser().parse_args(words_of(command)[1:])
    except SystemExit:
        pytest.fail(f"{where}: {command}: no such command line")


@pytest.mark.parametrize(
    ("where", "text"), [(w, t) for w, t in INLINE if re.match(r"caam-hotplug [a-z]", t)]
)
def test_every_command_of_the_agent_in_a_sentence_exists(where: str, text: str) -> None:
    parser = cli._parser()
    for word in words_of(text)[1:]:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not nested:
            break
        assert word in nested[0].choices, where
        parser = nested[0].choices[word]


MAKE = r"make ([a-z-]+)"
SHOWN = [*(command for _, command in EVERY), *(text for _, text in INLINE)]


@pytest.mark.parametrize(
    "target", sorted({found[1] for text in SHOWN if (found := re.match(MAKE, text))})
)
def test_every_documented_make_target_exists(target: str) -> None:
    done = subprocess.run(
        ["make", "-n", target], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


RUNNERS = r"(?:tests/run-all|\S*python -m pytest) (.*)"


@pytest.mark.parametrize(
    "arguments", sorted({found[1] for text in SHOWN if (found := re.match(RUNNERS, text))})
)
def test_every_documented_test_exists(arguments: str) -> None:
    words = shlex.split(arguments)
    wanted = words.pop(words.index("-k") + 1) if "-k" in words else ""
    for place in (word for word in words if not word.startswith("-")):
        if "::" in place:
            assert_is_there(place)
            continue
        found = REPOSITORY / place
        files = [found] if found.is_file() else list(found.rglob("test_*.py"))
        assert any(wanted in file.read_text() for file in files), place


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_between_pages_leads_to_a_page(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        linked = page.parent / target
        assert linked.exists(), target


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = (REPOSITORY / "docs" / "README.md").read_text()
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in listed, page.name


def test_the_diagram_of_packages_matches_the_tree() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    floors = [
        {module.strip().removeprefix("caam_hotplug.") for module in layer.split("|")}
        for layer in contract["layers"]
    ]
    tree = REPOSITORY / "agent" / "caam_hotplug"
    packages = {package.parent.name: package for package in tree.glob("*/__init__.py")}
    modules = {module.stem for module in tree.glob("*.py")} - {"__init__"}
    assert set().union(*floors) == packages.keys() | modules
    page = (REPOSITORY / "docs" / "how-it-works.md").read_text()
    picture = page[page.index("┌") + 1 : page.index("└")]
    drawn = re.findall(r"│ (\w+) +(\S.*?) +│", picture)
    assert {name for name, _ in drawn} == packages.keys() | modules
    for name, purpose in drawn:
        assert name in modules or packages[name].read_text() == f'"""{purpose}"""\n', name
    order = [name for name, _ in drawn]
    for above, below in itertools.pairwise(floors):
        assert max(map(order.index, above)) < min(map(order.index, below)), (above, below)


def test_every_example_of_rules_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in PAGES:
        for number, block in enumerate(blocks(page)):
            if block.language == "toml":
                file = tmp_path / f"{number}.toml"
                file.write_text("\n".join(block.lines))
                assert cli.main(["check", str(file)]) == 0, capsys.readouterr().err

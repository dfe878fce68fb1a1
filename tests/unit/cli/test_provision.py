from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from caam_hotplug import names
from caam_hotplug.cli import provision
from caam_hotplug.cli.main import main
from caam_hotplug.dbus import client


@pytest.fixture
def file(roots_folder: Path) -> Path:
    """A configuration whose blobs are beside it."""
    file = roots_folder / "agent.toml"
    file.write_text(f'blob_directory = "{roots_folder}/caam"\n')
    return file


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that changes nothing."""
    assert main(list(arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("caam-hotplug: ").removesuffix("\n")


@pytest.mark.parametrize("command", [["provision", "/dev/null", "--label"], ["key", "create"]])
@pytest.mark.parametrize("options", ["keyhandle", "a=b\nc=d", 'a="b"', " a=b", "a=b  c=d"])
def test_text_that_no_trust_source_takes_as_options_is_refused(
    capsys: pytest.CaptureFixture[str], command: list[str], options: str
) -> None:
    words = refusal(capsys, *command, "x", "--backend=trusted", f"--key-options={options}")
    assert words.startswith("use --key-options: expected options such as keyhandle=0x81000001")


def test_a_tagged_key_takes_no_options_for_a_trust_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = refusal(capsys, "key", "create", "x", "--backend=tagged", "--key-options=keyhandle=1")
    assert words == "use --key-options: the CAAM needs none for a tagged key"


@pytest.mark.parametrize("label", ["", "../x", ".x", "-x", "a b", "ä", "x" * 37, "a\nb"])
def test_labels_that_rules_do_not_take_are_refused(
    capsys: pytest.CaptureFixture[str], label: str
) -> None:
    words = refusal(capsys, "provision", "/dev/null", f"--label={label}")
    assert words.startswith(f"use label {label!a}: it ")


@pytest.mark.parametrize(
    "cipher", ["", "a b", 'x"y', "x\\y", "aes\n", "aes-cbc-plain extra", "äes-cbc-plain"]
)
def test_text_that_is_no_cipher_is_refused(capsys: pytest.CaptureFixture[str], cipher: str) -> None:
    words = refusal(capsys, "provision", "/dev/null", "--label", "x", f"--cipher={cipher}")
    assert words.startswith(f"use cipher {cipher!a}: expected ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["/dev/null"],
        ["--label", "x"],
        ["/dev/null", "--label", "x", "--fs", "ntfs"],
        ["/dev/null", "--label", "x", "--sector-size", "8192"],
        ["/dev/null", "--label", "x", "--key-bytes", "24"],
        ["/dev/null", "--label", "x", "--seal", "gcm"],
    ],
)
def test_wrong_usage_is_exit_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["provision", *arguments])
    assert ended.value.code == 2
    assert "usage: caam-hotplug provision" in capsys.readouterr().err


def test_links_in_a_circle_are_no_disk(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    said = refusal(capsys, "provision", f"{tmp_path}/circle", "--label", "x", "--config", str(file))
    assert said == f"look at {tmp_path}/circle: Too many levels of symbolic links"


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("/dev/null", "it is no block device"),
        ("/no/such/device", "No such file or directory"),
        ("/", "it is no block device"),
    ],
)
def test_a_device_that_is_no_disk_is_refused(
    capsys: pytest.CaptureFixture[str], file: Path, device: str, words: str
) -> None:
    said = refusal(capsys, "provision", device, "--label", "x", "--config", str(file))
    assert said == f"look at {device}: {words}"
    assert os.listdir(file.parent) == [file.name]


def test_help_has_examples_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["provision"], ["key"], *(["key", v] for v in ("create", "enroll", "list"))):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        assert "example" in capsys.readouterr().out


def test_the_names_of_its_mappings_are_not_the_agents() -> None:
    assert not names.COMMAND_DM_UUID_PREFIX.startswith(names.DM_UUID_PREFIX)
    rule = (Path(__file__).parents[3] / "rules" / "50-caam-hotplug.rules").read_text()
    (kept_off,) = [line for line in rule.splitlines() if names.DM_UUID_PREFIX in line]
    assert f"|{names.COMMAND_DM_UUID_PREFIX}*" in kept_off


class Agent:
    """Stands for the running agent, and counts its reloads."""

    def __init__(self) -> None:
        self.reloads = 0

    def run(self, _what: str, work: Callable[[Agent], Coroutine[None, None, None]]) -> None:
        asyncio.run(work(self))

    async def reload(self, _within_s: float) -> list[str]:
        self.reloads += 1
        return ["blob_directory: at the next start"]


def test_the_agents_notes_about_the_new_rule_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "run", Agent().run)
    assert provision._announcing(names.CONFIG_FILE)() == [
        "the running agent has read the rule",
        "blob_directory: at the next start",
    ]


def test_the_installed_agent_does_not_read_another_configurations_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "run", (agent := Agent()).run)
    (note,) = provision._announcing(Path("/root/my.toml"))()
    assert note.startswith("an agent that runs with --config /root/my.toml reads the rule at its")
    assert agent.reloads == 0


@pytest.mark.parametrize(
    ("device", "label"),
    [
        ("recorder", "recorder"),
        ("PARTLABEL=recorder", "recorder"),
        ("PARTUUID=1234abcd-02", None),
        ("1234abcd-02", None),
        ("11111111-2222-4333-8444-55555555555A", None),
        ("/dev/sdb2", None),
        ("./sdb2", None),
    ],
)
def test_a_partition_that_is_named_by_its_label_keeps_it(device: str, label: str | None) -> None:
    assert provision._label_in(device) == label


def test_a_text_that_names_no_partition_is_refused(
    capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    said = refusal(capsys, "provision", "no-such-label", "--config", str(file))
    assert said.startswith("provision no-such-label: ")

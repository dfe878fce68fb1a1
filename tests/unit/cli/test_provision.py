from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug import names
from caam_hotplug.cli import provision
from caam_hotplug.cli.main import main
from caam_hotplug.cli.provision import Progress, rule_for
from caam_hotplug.config import loader
from caam_hotplug.dbus import client
from caam_hotplug.errors import HotplugError
from caam_hotplug.formats.crypt_table import CIPHERS, Crypt
from caam_hotplug.kernel import config_files


@pytest.fixture
def file(roots_folder: Path) -> Path:
    """A configuration whose blobs are beside it."""
    file = roots_folder / "agent.toml"
    file.write_text(f'blob_directory = "{roots_folder}/caam"\n')
    return file


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of a command that changes nothing."""
    assert main(list(arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("caam-hotplug: ").removesuffix("\n")


def test_the_options_defaults_are_those_of_a_rule() -> None:
    rule, _ = rule_for("cartridge-01")
    assert rule.crypt == Crypt(cipher=CIPHERS["logon"])


@given(
    label=st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,35}\Z"),
    filesystem=st.sampled_from(provision.FILESYSTEMS),
    sector_size=st.sampled_from([512, 1024, 2048, 4096]),
)
def test_the_drop_in_is_a_rule_for_the_label_alone(
    tmp_path_factory: pytest.TempPathFactory, label: str, filesystem: str, sector_size: int
) -> None:
    rule, text = rule_for(label, filesystem=filesystem, sector_size=sector_size)
    folder = tmp_path_factory.mktemp("etc")
    (folder / "rules.d").mkdir()
    (folder / "rules.d" / f"{label}.toml").write_text(text)
    loaded = loader.load(folder / "agent.toml", config_files.AnyonesFiles(), required=False)
    assert loaded.rule == (rule,)
    assert (rule.name, rule.match.partlabel) == (label, label)
    assert rule.mount.filesystems == (filesystem,)
    assert rule.crypt.sector_size == sector_size


def test_the_drop_in_says_of_a_trusted_key_what_its_blob_may_not_tell() -> None:
    rule, text = rule_for(
        "x", backend="trusted", key_bytes=64, key_options="keyhandle=0x81000001 migratable=0"
    )
    assert (rule.key.backend, rule.key.length) == ("trusted", 64)
    assert rule.key.options == "keyhandle=0x81000001 migratable=0"
    assert "\n\n[rule.crypt]\n" in text
    under, _ = rule_for("x", backend="encrypted", key_bytes=64, key_options="keyhandle=1")
    assert (under.key.length, under.key.options) == (0, "keyhandle=1")
    assert "[rule.key]" not in rule_for("x", key_bytes=16)[1]


@pytest.mark.parametrize("command", [["provision", "/dev/null", "--label"], ["key", "create"]])
@pytest.mark.parametrize("options", ["keyhandle", "a=b\nc=d", 'a="b"', " a=b", "a=b  c=d"])
def test_what_are_no_options_of_a_trust_source_is_refused(
    capsys: pytest.CaptureFixture[str], command: list[str], options: str
) -> None:
    words = refusal(capsys, *command, "x", "--backend=trusted", f"--key-options={options}")
    assert words.startswith("use --key-options: expected options such as keyhandle=0x81000001")


def test_a_tagged_key_has_no_trust_source_to_be_told_anything(
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
def test_what_is_no_cipher_is_refused(capsys: pytest.CaptureFixture[str], cipher: str) -> None:
    words = refusal(capsys, "provision", "/dev/null", "--label", "x", f"--cipher={cipher}")
    assert words.startswith(f"use cipher {cipher!a}: expected ")


@given(st.text(max_size=40))
def test_any_cipher_is_one_or_refused(cipher: str) -> None:
    try:
        rule, _ = rule_for("x", cipher=cipher)
    except HotplugError:
        return
    assert rule.crypt.cipher == cipher


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
def test_what_is_no_disk_is_refused(
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    with Progress(file := io.StringIO()) as progress:
        progress.tell("step")
    assert file.getvalue() == ""
    with Progress(terminal := Terminal()) as progress:
        progress.tell("step")
    assert terminal.getvalue() == "\r\x1b[K\x1b[2mstep ...\x1b[0m\r\x1b[K"


def test_progress_has_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress(terminal := Terminal()) as progress:
        progress.tell("step")
    assert terminal.getvalue() == "\r\x1b[Kstep ...\r\x1b[K"


def test_the_names_of_its_mappings_are_not_the_agents() -> None:
    assert not names.COMMAND_DM_UUID_PREFIX.startswith(names.DM_UUID_PREFIX)
    rule = (Path(__file__).parents[3] / "rules" / "50-caam-hotplug.rules").read_text()
    (kept_off,) = [line for line in rule.splitlines() if names.DM_UUID_PREFIX in line]
    assert f"|{names.COMMAND_DM_UUID_PREFIX}*" in kept_off


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_agent_is_told_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def never_answered(_what: str, _work: object) -> None:
        async def waiting() -> None:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
            await asyncio.sleep(60)

        asyncio.run(waiting())

    monkeypatch.setattr(client, "run", never_answered)
    with (
        pytest.raises(HotplugError, match=f"/dev/sdb: interrupted by {number.name}; the same"),
        provision.interruptible("provision /dev/sdb"),
    ):
        provision._tell_agent()
    assert signal.getsignal(number) is before


class Agent:
    """Stands for the running agent, and notes what it was asked."""

    def __init__(self) -> None:
        self.reloads = 0

    def run(self, _what: str, work: Callable[[Agent], Coroutine[None, None, None]]) -> None:
        asyncio.run(work(self))

    async def reload(self, _within_s: float) -> list[str]:
        self.reloads += 1
        return ["blob_directory: at the next start"]


def test_what_the_agent_notes_about_the_new_rule_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "run", Agent().run)
    assert provision._announcing(names.CONFIG_FILE)() == [
        "the running agent has read the rule",
        "blob_directory: at the next start",
    ]


def test_the_installed_agent_is_not_said_to_have_read_anothers_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "run", (agent := Agent()).run)
    (note,) = provision._announcing(Path("/root/my.toml"))()
    assert note.startswith("an agent that runs with --config /root/my.toml reads the rule at its")
    assert agent.reloads == 0

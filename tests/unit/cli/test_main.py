from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from caam_hotplug import __version__
from caam_hotplug.cli import main as cli
from caam_hotplug.daemon import main as daemon
from caam_hotplug.kernel.agent_lock import AnotherAgentError

OTHER_USER = 54321
INSTALLED = Path(__file__).parents[3] / "config" / "agent.toml"


@pytest.fixture
def file(roots_folder: Path) -> Path:
    """The file for the configuration of a test."""
    return roots_folder / "agent.toml"


def exit_status(arguments: list[str]) -> int | str | None:
    """Return the status with which the argument parser ends the program."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def test_run_alone_is_what_the_parser_makes_of_it() -> None:
    assert vars(cli._run_without_options()) == vars(cli._parser().parse_args(["run"]))


def test_a_valid_file_is_reported_with_its_rules_in_order(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text('[[rule]]\nname = "first"\n[[rule]]\nname = "second"\n')
    assert cli.main(["check", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{file}: valid; rules in the order they are asked: first, second\n"
    assert shown.err == ""


def test_a_valid_file_without_rules_is_reported(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("rule = []\n")
    assert cli.main(["check", str(file)]) == 0
    assert capsys.readouterr().out.endswith(": none\n")


def test_the_installed_file_passes_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(INSTALLED)]) == 0
    assert "valid" in capsys.readouterr().out


def test_a_file_that_run_would_refuse_is_valid_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("rule = []\n")
    tmp_path.chmod(0o777)
    assert cli.main(["check", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{file}: valid; rules in the order they are asked: none\n"
    assert shown.err.startswith("warning: `run` will refuse this: /tmp: ")


def test_a_file_of_another_user_is_checked_with_a_warning_and_not_run(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("rule = []\n")
    os.chown(file, OTHER_USER, 0)
    assert cli.main(["check", str(file)]) == 0
    why = (
        f"{file}: belongs to user {OTHER_USER}, not to root, and who can change the "
        f"configuration controls the agent: chown root {file}\n"
    )
    assert capsys.readouterr().err == f"warning: `run` will refuse this: {why}"
    assert cli.main(["run", "--config", str(file)]) == 1
    assert capsys.readouterr().err == why


def test_a_faulty_file_of_another_user_is_reported_for_its_fault(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("rule = 1\n")
    os.chown(file, OTHER_USER, 0)
    assert cli.main(["check", str(file)]) == 1
    assert capsys.readouterr().err == f"{file}: rule: expected tables [[rule]], found 1\n"


def test_the_check_says_what_mount_options_mean_that_are_left_out(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text('[[rule]]\nname = "a"\nmount.options = ["nosuid", "nodev"]\n')
    assert cli.main(["check", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "note: rule 'a' mounts without noexec: users and services can run programs that are on it"
    ]


def test_a_drop_in_is_not_checked_as_a_configuration(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drop_in = file.parent / "rules.d" / "10-a.toml"
    drop_in.parent.mkdir()
    drop_in.write_text('[[rule]]\nname = "a"\n')
    assert cli.main(["check", str(drop_in)]) == 1
    assert capsys.readouterr().err == (
        f"{drop_in}: is a drop-in, which is read with the configuration beside rules.d; "
        f"expected that one, such as {file}\n"
    )


def test_a_file_whose_name_a_terminal_would_act_on_is_shown_escaped(
    roots_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = roots_folder / "\x1b[2J\udcff.toml"
    file.write_text("")
    assert cli.main(["check", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"'{roots_folder}/\\x1b[2J\\udcff.toml': valid")


def test_every_fault_is_a_line_on_standard_error(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text('log_level = "loud"\nmount_rot = "/media"\n')
    assert cli.main(["check", str(file)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f"{file}: log_level: expected debug, info, warning, error; found 'loud'",
        f"{file}: mount_rot: is not a key here; did you mean 'mount_root'?",
    ]


def test_a_missing_file_is_reported(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(file)]) == 1
    assert capsys.readouterr().err == f"{file}: cannot be read: No such file or directory\n"


@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("device", ["/dev/null", "/proc/version", "/", ""])
def test_a_path_that_is_no_block_device_cannot_be_explained(
    device: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text('source = "kernel"\n')
    assert cli.main(["explain", "--config", str(file), device]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"caam-hotplug: look at {device}: it is no block device")


def test_a_missing_device_is_reported(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text('source = "kernel"\n')
    assert cli.main(["explain", "--config", str(file), "/dev/nope"]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (
        "", "caam-hotplug: look at /dev/nope: No such file or directory\n"
    )  # fmt: skip


def test_no_device_is_read_with_a_faulty_configuration(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("rule = 1\n")
    assert cli.main(["explain", "--config", str(file), "/dev/null"]) == 1
    assert capsys.readouterr().err == f"{file}: rule: expected tables [[rule]], found 1\n"


def test_the_agent_does_not_start_with_a_faulty_configuration(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("rule = 1\n")
    assert cli.main(["run", "--config", str(file)]) == 1
    assert "expected tables [[rule]]" in capsys.readouterr().err


def test_help_names_commands_examples_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--help"]) == 0
    shown = capsys.readouterr().out
    for words in ("run", "check", "explain", "examples:", "exit status:"):
        assert words in shown


@pytest.mark.parametrize("command", ["run", "check", "explain"])
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status([command, "--help"]) == 0
    assert f"caam-hotplug {command}" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["--version"]) == 0
    assert capsys.readouterr().out == f"caam-hotplug {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["mount"], ["check"], ["explain"], ["check", "a", "b"], ["run", "--fast"]]
)
def test_wrong_usage_is_exit_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(arguments) == 2
    assert "usage: caam-hotplug" in capsys.readouterr().err


def answered(out: int, *arguments: str) -> tuple[int, str]:
    """Return exit status and standard error of the program with standard output to `out`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "agent")}
    done = subprocess.run(
        [sys.executable, "-m", "caam_hotplug.cli.main", *arguments],
        check=False, stdout=out, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_a_closed_pipe_is_not_reported(file: Path) -> None:
    file.write_text("rule = []\n")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        status, error = answered(writing, "check", str(file))
    finally:
        os.close(writing)
    assert (status, error) == (128 + signal.SIGPIPE, "")


def test_output_that_cannot_be_written_is_reported(file: Path) -> None:
    file.write_text("rule = []\n")
    with Path("/dev/full").open("wb") as full:
        status, error = answered(full.fileno(), "check", str(file))
    assert (status, error) == (1, "caam-hotplug: write the output: No space left on device\n")


def test_run_beside_another_agent_has_an_exit_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AnotherAgentError(4711)

    monkeypatch.setattr(daemon, "run", refuse)
    assert cli.main(["run"]) == 75
    said = capsys.readouterr().err
    assert said.startswith("caam-hotplug: run the agent: process 4711 is the agent already")
    assert said.count("\n") == 1


def test_the_service_is_not_restarted_beside_another_agent() -> None:
    unit = INSTALLED.with_name("caam-hotplug.service").read_text()
    assert f"\nRestartPreventExitStatus={AnotherAgentError.exit_status}\n" in unit

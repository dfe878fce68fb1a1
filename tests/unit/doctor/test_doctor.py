"""Doctor's looks at a board that is a folder of files, and what becomes of its findings."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

import pytest

from caam_hotplug.cli.main import main
from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import KeySource, Rule
from caam_hotplug.doctor import caam, environment, kernel, report, runner, self_test, service
from caam_hotplug.doctor.board import Site, is_harmless, is_open_to_service
from caam_hotplug.doctor.result import Result, Status, Verdict, failure, ok, unknown, warning
from caam_hotplug.formats.crypt_table import Crypt

RELEASE: Final = "6.6.52-lts-next"
RULE: Final = (Path(__file__).parents[3] / "rules/50-caam-hotplug.rules").read_text()

Look = Callable[[Site], Iterator[Verdict]]


class Board:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, path: str, content: str | bytes = "") -> Path:
        """The file is there."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def site(self, config: Config | None = None, release: str = RELEASE) -> Site:
        return Site(config or Config(), root=self.root, release=release)

    def seen(self, look: Look, config: Config | None = None) -> list[Verdict]:
        """What the look finds here."""
        return list(look(self.site(config)))

    def status(self, look: Look, config: Config | None = None) -> Status:
        """The status of the look's only finding."""
        (verdict,) = self.seen(look, config)
        return verdict.status

    def runs(self, name: str, pid: int = 77, state: str = "S") -> None:
        self.has(f"/proc/{pid}/stat", f"{pid} ({name}) {state} 1 1 1")


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


# The report.

GOOD = Result("kernel", "kernel", ok("Linux 6.6"))
UNTOLD = Result("caam-state", "CAAM state", unknown("cannot be told", "ask U-Boot"))
DOUBTFUL = Result("automounters", "other automounters", warning("udisksd runs", "keep it off"))
BAD = Result("caam-device", "CAAM device", failure("is not there", "use NXP's kernel"))


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        ([], 0),
        ([GOOD], 0),
        ([GOOD, UNTOLD], 0),
        ([DOUBTFUL, UNTOLD], 3),
        ([BAD, DOUBTFUL], 1),
        ([GOOD, BAD], 1),
    ],
)
def test_the_exit_status_is_that_of_the_worst_finding(findings: list[Result], status: int) -> None:
    assert report.exit_status(findings) == status


def test_a_finding_is_a_line_and_its_remedy_stands_below_the_words() -> None:
    first, second = report.Page().lines(BAD)
    assert first == "failure  CAAM device         is not there"
    assert second == "                             --> use NXP's kernel"
    assert first.index("is not") == second.index("-->")


def test_no_subject_is_wider_than_its_column() -> None:
    starts = {
        next(report.Page().lines(Result(check.name, check.subject, ok("x")))).index("x", 28)
        for check in runner.CHECKS
    }
    assert len(starts) == 1


def test_lines_are_broken_for_a_terminal_between_words() -> None:
    words = "a finding of many words " * 8
    lines = list(report.Page(width=80).lines(Result("x", "subject", warning(words, words))))
    assert len(lines) > 4
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()).count("a finding of many words") == 16


def test_what_a_terminal_would_act_on_is_escaped() -> None:
    (line,) = report.Page().lines(Result("x", "y", ok("a\x1b[2Jb\nc")))
    assert "\x1b" not in line
    assert "\n" not in line


def test_the_last_line_counts_the_worst_first() -> None:
    told = report.summary([GOOD, BAD, DOUBTFUL, GOOD, UNTOLD, DOUBTFUL])
    assert told == "1 failure, 2 warnings, 1 unknown, 2 ok"


def test_json_has_every_finding_and_the_worst_status() -> None:
    told = json.loads(report.to_json([GOOD, DOUBTFUL]))
    assert told["program"] == "caam-hotplug"
    assert told["worst"] == "warning"
    assert told["findings"] == [
        {
            "check": "kernel", "subject": "kernel", "status": "ok", "found": "Linux 6.6",
            "remedy": None,
        },
        {
            "check": "automounters", "subject": "other automounters", "status": "warning",
            "found": "udisksd runs", "remedy": "keep it off",
        },
    ]  # fmt: skip


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_are_for_a_terminal_that_wants_them(
    no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    ours, theirs = os.openpty()
    with os.fdopen(ours, "w") as _, os.fdopen(theirs, "w") as terminal:
        page = runner.page_for(terminal)
    assert any("\x1b" in line for line in page.lines(BAD)) == coloured


def test_a_pipe_gets_no_colours_and_whole_lines() -> None:
    assert runner.page_for(io.StringIO()) == report.Page()


def test_the_names_of_checks_are_told_apart() -> None:
    listed = [check.name for check in runner.CHECKS]
    assert len(listed) == len(set(listed)) > 20


# The command.


def test_doctor_is_for_root(capsys: pytest.CaptureFixture[str]) -> None:
    os.seteuid(65534)
    try:
        assert main(["doctor"]) == 1
    finally:
        os.seteuid(0)
    assert "it needs to be root" in capsys.readouterr().err


def test_a_board_of_nothing_is_examined_to_the_end(board: Board) -> None:
    found = list(runner.findings(board.site()))
    assert [f.check for f in found if f.verdict.status is Status.FAILURE].count("caam-device") == 1
    assert {f.check for f in found} == {check.name for check in runner.CHECKS}
    for finding in found:
        needs_one = finding.verdict.status in {Status.WARNING, Status.FAILURE}
        assert bool(finding.verdict.remedy) or not needs_one, finding


def test_a_look_that_fails_is_told_as_unknown_and_the_others_go_on(board: Board) -> None:
    (board.root / "etc").mkdir()
    (board.root / "etc/fstab").mkdir()
    told = {f.check: f.verdict for f in runner.findings(board.site())}
    assert told["fixed-tables"].status is Status.UNKNOWN
    assert "Is a directory" in told["fixed-tables"].found
    assert "service" in told


# The machine.


@pytest.mark.parametrize(
    ("release", "status"),
    [("5.15.71-imx", Status.OK), ("6.6.52", Status.OK), ("5.4.70-2.3.0", Status.FAILURE),
     ("5.10.9", Status.FAILURE), ("strange", Status.FAILURE)],
)  # fmt: skip
def test_a_kernel_that_does_not_number_insertions_is_too_old(
    release: str, status: Status, board: Board
) -> None:
    (verdict,) = kernel.kernel(board.site(release=release))
    assert verdict.status is status


def test_a_kernel_that_numbers_them_all_the_same_will_do(board: Board) -> None:
    board.has("/sys/block/sda/diskseq", "3\n")
    (verdict,) = kernel.kernel(board.site(release="5.4.0-vendor"))
    assert verdict.status is Status.OK


ALL_OPTIONS = "\n".join(
    f"CONFIG_{name}=y"
    for name in (
        "BLK_DEV_DM", "DM_CRYPT", "KEYS", "TMPFS", "DEVTMPFS", "EXT4_FS", "CRYPTO_DEV_FSL_CAAM",
        "CRYPTO_DEV_FSL_CAAM_JR", "CRYPTO_DEV_FSL_CAAM_CRYPTO_API", "CRYPTO_DEV_FSL_CAAM_TK_API",
    )
)  # fmt: skip


def test_options_are_read_from_the_kernel_itself_before_a_file_in_boot(board: Board) -> None:
    board.has(f"/boot/config-{RELEASE}", "# CONFIG_KEYS is not set\n")
    board.has("/proc/config.gz", gzip.compress(ALL_OPTIONS.encode()))
    (verdict,) = board.seen(kernel.kernel_options)
    assert verdict == ok("all that are needed are set (/proc/config.gz)")


def test_options_that_are_missing_are_named_from_a_file_in_boot(board: Board) -> None:
    options = ALL_OPTIONS.replace("CONFIG_DM_CRYPT=y", "# CONFIG_DM_CRYPT is not set")
    board.has(f"/boot/config-{RELEASE}", options.replace("CONFIG_KEYS=y", ""))
    (verdict,) = board.seen(kernel.kernel_options)
    assert verdict.status is Status.FAILURE
    assert verdict.found == (f"/boot/config-{RELEASE} does not set CONFIG_DM_CRYPT, CONFIG_KEYS")


def test_an_option_whose_work_is_done_otherwise_is_not_missing(board: Board) -> None:
    board.has("/proc/config.gz", gzip.compress(ALL_OPTIONS.replace("EXT4", "X").encode()))
    board.has("/proc/filesystems", "nodev\ttmpfs\n\text4\n")
    (verdict,) = board.seen(kernel.kernel_options)
    assert verdict.status is Status.OK
    assert "done by other drivers: CONFIG_BTRFS_FS or CONFIG_EXFAT_FS" in verdict.found


def test_without_any_configuration_options_cannot_be_told(board: Board) -> None:
    assert board.status(kernel.kernel_options) is Status.UNKNOWN


@pytest.mark.parametrize(
    ("key_users", "used"),
    [
        ("    0:    80 79/79 60/1000000 1280/25000000\n", 60 / 1000000),
        ("  100:     1 1/1 1/200 9/20000\n    0:   80 79/79 190/200 1280/20000\n", 0.95),
        ("    0:    80 79/79 1/200 20000/20000\n", 1.0),
        ("  100:     1 1/1 1/200 9/20000\n", None),
        ("", None),
    ],
)
def test_the_quota_of_keys_is_that_of_keys_or_of_bytes(key_users: str, used: float | None) -> None:
    assert kernel.quota_used(key_users, 0) == used


def test_the_libraries_are_those_of_this_machine(board: Board) -> None:
    assert board.status(kernel.libraries) is Status.OK


# The CAAM.

CRYPTO = """\
name         : tk(cbc(aes))
driver       : tk-cbc-aes-caam
module       : kernel
priority     : 3000
refcnt       : 1
selftest     : {selftest}
internal     : no
type         : skcipher

name         : cbc(aes)
driver       : cbc-aes-caam
module       : kernel
priority     : 3000
selftest     : passed

name         : cbc(aes)
driver       : cbc(aes-generic)
priority     : 100
selftest     : unknown
"""


def test_algorithms_are_read_one_by_one() -> None:
    tagged, *others = caam.algorithms(CRYPTO.format(selftest="passed"))
    assert tagged == caam.Algorithm("tk(cbc(aes))", "tk-cbc-aes-caam", 3000, "passed")
    assert [a.driver for a in others] == ["cbc-aes-caam", "cbc(aes-generic)"]
    assert caam.algorithms("") == []
    assert caam.algorithms("name : x\npriority : high\n\n\nnoise\n") == [
        caam.Algorithm("x", "", 0, "unknown")
    ]


@pytest.mark.parametrize(
    ("selftest", "status"), [("passed", Status.OK), ("unknown", Status.FAILURE)]
)
def test_an_algorithm_of_the_caam_without_a_passed_self_test_is_a_failure(
    selftest: str, status: Status, board: Board
) -> None:
    board.has("/proc/crypto", CRYPTO.format(selftest=selftest))
    assert board.status(caam.of_the_caam) is status
    assert board.status(caam.ciphers) is status


def test_a_cipher_is_judged_by_the_driver_that_the_kernel_would_take(board: Board) -> None:
    board.has("/proc/crypto", CRYPTO.format(selftest="passed"))
    config = Config(rule=(Rule(name="x", crypt=Crypt(cipher="aes-cbc-essiv:sha256")),))
    (verdict,) = board.seen(caam.ciphers, config)
    assert verdict.found == "cbc(aes) by cbc-aes-caam, self-test passed"


def test_a_kernel_without_caam_and_cipher_is_told_so(board: Board) -> None:
    board.has("/proc/crypto", "name : cbc(aes)\ndriver : cbc(aes-generic)\nselftest : passed\n")
    assert board.status(caam.of_the_caam) is Status.FAILURE
    assert board.status(caam.ciphers) is Status.FAILURE


@pytest.mark.parametrize(
    ("cipher", "name"),
    [
        ("capi:tk(cbc(aes))-plain", "tk(cbc(aes))"),
        ("capi:tk(cbc(aes))-plain64", "tk(cbc(aes))"),
        ("capi:cbc(aes)-essiv:sha256", "cbc(aes)"),
        ("capi:xts(ecb(aes-generic))-plain64", "xts(ecb(aes-generic))"),
        ("aes-xts-plain64", "xts(aes)"),
        ("aes-cbc-essiv:sha256", "cbc(aes)"),
        ("aes:64-cbc-lmk", "cbc(aes)"),
        ("aes", "cbc(aes)"),
    ],
)
def test_a_cipher_of_dm_crypt_has_a_name_in_the_crypto_api(cipher: str, name: str) -> None:
    assert caam.api_name(cipher) == name


def test_a_missing_device_and_a_file_in_its_place_are_told_apart(board: Board) -> None:
    (missing,) = board.seen(caam.device)
    assert missing.found == "/dev/caam-keygen is not there, and there are no trusted keys either"
    board.has("/dev/caam-keygen")
    (file,) = board.seen(caam.device)
    assert file.found == "/dev/caam-keygen is a file, not a device"


def test_a_device_that_only_an_unconfined_root_may_open_is_a_failure(board: Board) -> None:
    (board.root / "dev").mkdir()
    device = board.root / "dev/caam-keygen"
    os.mknod(device, 0o020600, os.makedev(1, 3))
    assert board.status(caam.device) is Status.OK
    os.chown(device, 1000, 1000)
    (verdict,) = board.seen(caam.device)
    assert verdict.status is Status.FAILURE
    assert "belongs to user 1000 with mode 0600" in verdict.found


def test_job_rings_are_those_that_linux_drives(board: Board) -> None:
    assert board.status(caam.job_rings) is Status.UNKNOWN
    tree = "/sys/firmware/devicetree/base/soc@0/bus@30800000/crypto@30900000"
    for ring, status in (("jr@1000", "disabled\0"), ("jr@2000", "okay\0")):
        board.has(f"{tree}/{ring}/compatible", "fsl,sec-v4.0-job-ring\0")
        board.has(f"{tree}/{ring}/status", status)
    (none,) = board.seen(caam.job_rings)
    assert none.status is Status.FAILURE
    assert none.found.endswith("has 2, and Linux drives none of them; kept from Linux: jr@1000")
    driver = board.root / "sys/bus/platform/drivers/caam_jr"
    driver.mkdir(parents=True)
    (driver / "30902000.jr").symlink_to("nowhere")
    (driver / "module").symlink_to("nowhere")
    (some,) = board.seen(caam.job_rings)
    assert some == ok("Linux has 1: 30902000.jr; kept from Linux: jr@1000")


@pytest.mark.parametrize(
    ("compatible", "word", "bit"),
    [
        ("fsl,imx8mm-evk\0fsl,imx8mm\0", 7, 1 << 25),
        ("vendor,board\0fsl,imx8mp\0", 7, 1 << 25),
        ("fsl,imx7d-sdb\0fsl,imx7d\0", 7, 1 << 25),
        ("vendor,board\0fsl,imx6ull\0", 6, 1 << 1),
    ],
)
def test_whether_the_part_is_closed_is_read_from_its_fuse(
    compatible: str, word: int, bit: int, board: Board
) -> None:
    board.has("/sys/firmware/devicetree/base/compatible", compatible)
    assert board.status(caam.security_state) is Status.UNKNOWN
    fuses = [~bit & 0xFFFFFFFF if at == word else 0xFFFFFFFF for at in range(16)]
    file = "/sys/bus/nvmem/devices/imx-ocotp0/nvmem"
    board.has(file, struct.pack("<16I", *fuses))
    assert board.status(caam.security_state) is Status.WARNING
    board.has(file, struct.pack("<16I", *(bit if at == word else 0 for at in range(16))))
    assert board.status(caam.security_state) is Status.OK
    board.has(file, b"")
    assert board.status(caam.security_state) is Status.UNKNOWN


def test_the_fuse_of_an_unknown_part_is_not_guessed(board: Board) -> None:
    board.has("/sys/firmware/devicetree/base/compatible", "fsl,imx93\0")
    board.has("/sys/bus/nvmem/devices/imx-ocotp0/nvmem", b"\xff" * 64)
    assert board.status(caam.security_state) is Status.UNKNOWN


def test_without_a_caam_nothing_is_tried(board: Board) -> None:
    assert board.status(self_test.round_trip) is Status.UNKNOWN


def test_a_trust_source_is_tried_with_the_options_that_rules_agree_on(board: Board) -> None:
    def agreed(*options: str) -> str | None:
        rules = tuple(Rule(name=f"{n}", key=KeySource(options=o)) for n, o in enumerate(options))
        return board.site(Config(rule=rules)).trust_options()

    assert agreed() == ""
    assert agreed("", "keyhandle=1", "keyhandle=1") == "keyhandle=1"
    assert agreed("keyhandle=1", "keyhandle=2") is None


def test_options_that_change_a_trust_source_or_are_a_guess_at_it_are_not_tried() -> None:
    assert is_harmless("")
    assert is_harmless("keyhandle=0x81000001 hash=sha256")
    assert not is_harmless("keyhandle=0x81000001 blobauth=x")
    assert not is_harmless("keyhandle=0x81000001 pcrlock=16")
    assert not is_harmless("policyhandle=1")


# What is around.


def test_udevd_runs_or_is_stopped_or_not_there(board: Board) -> None:
    (absent,) = board.seen(environment.udevd)
    assert absent.status is Status.WARNING
    board.has("/run/udev/control")
    assert board.status(environment.udevd) is Status.FAILURE
    assert board.status(environment.udevd, Config(source="kernel")) is Status.OK
    board.runs("systemd-udevd", state="T")
    (stopped,) = board.seen(environment.udevd)
    assert stopped.found.startswith("udevd (process 77) is stopped")
    board.runs("systemd-udevd")
    assert board.status(environment.udevd) is Status.OK


def test_the_rule_counts_by_what_is_in_it_and_where_it_stands(board: Board) -> None:
    look = environment.udev_rule
    assert board.status(look) is Status.FAILURE
    assert board.status(look, Config(source="kernel")) is Status.OK
    shipped = board.has("/usr/lib/udev/rules.d/50-caam-hotplug.rules", RULE)
    assert board.status(look) is Status.OK
    hidden = board.has("/etc/udev/rules.d/50-caam-hotplug.rules")
    (masked,) = board.seen(look)
    assert masked.found.startswith("/etc/udev/rules.d/50-caam-hotplug.rules hides")
    hidden.write_text(RULE.replace("UDISKS_IGNORE", "X"))
    (other,) = board.seen(look)
    assert "is another version" in other.found
    hidden.unlink()
    shipped.rename(shipped.with_name("90-caam-hotplug.rules"))
    (late,) = board.seen(look)
    assert "90-caam-hotplug.rules comes after 55-dm.rules" in late.found


def test_the_rule_stands_before_device_mappers_own_whatever_its_number(board: Board) -> None:
    rule = board.has("/usr/lib/udev/rules.d/50-caam-hotplug.rules", RULE)
    board.has("/usr/lib/udev/rules.d/10-dm.rules", "# device-mapper's\n")
    (late,) = board.seen(environment.udev_rule)
    assert late.found.startswith("/usr/lib/udev/rules.d/50-caam-hotplug.rules comes after 10-dm.")
    assert late.remedy.startswith("name it 09-caam-hotplug.rules")
    rule.rename(rule.with_name("09-caam-hotplug.rules"))
    assert board.status(environment.udev_rule) is Status.OK


MOUNTS = """\
31 1 0:23 / / rw shared:1 - overlay none rw
35 31 0:29 / /run rw,nosuid {run}- tmpfs tmpfs rw
90 35 0:40 / /run/media rw - tmpfs tmpfs rw
91 35 0:41 / /run/media rw {media}- tmpfs tmpfs rw
"""


def test_the_last_mount_at_a_point_is_the_one_that_counts() -> None:
    mounts = environment.shared_mounts(MOUNTS.format(run="master:3 shared:11 ", media="shared:7 "))
    assert mounts == {"/": "shared:1", "/run": "shared:11", "/run/media": "shared:7"}
    assert environment.covering(PurePosixPath("/run/media/x"), mounts) == (
        "/run/media",
        "shared:7",
    )
    assert environment.covering(PurePosixPath("/mnt"), mounts) == ("/", "shared:1")
    assert environment.shared_mounts("noise\n") == {}


def test_a_private_mount_below_the_mount_root_is_a_warning(board: Board) -> None:
    assert board.status(environment.propagation) is Status.UNKNOWN
    board.has("/proc/1/mountinfo", MOUNTS.format(run="", media="shared:7 "))
    assert board.status(environment.propagation) is Status.OK
    board.has("/proc/1/mountinfo", MOUNTS.format(run="", media=""))
    (verdict,) = board.seen(environment.propagation)
    assert verdict.status is Status.WARNING
    assert verdict.remedy == "mount --make-rshared /run/media"


def test_automounters_are_found_running_installed_and_as_rules_of_udev(board: Board) -> None:
    look = environment.automounters
    (board.root / "etc/systemd/system").mkdir(parents=True)
    (board.root / "etc/systemd/system/autofs.service").symlink_to("/dev/null")
    board.has("/lib/systemd/system/autofs.service", "[Unit]\n")
    board.has(
        "/lib/udev/rules.d/99-systemd.rules",
        'KERNEL=="fuse", ENV{SYSTEMD_WANTS}+="sys-fs-fuse-connections.mount"\n# RUN="mount"\n',
    )
    assert board.status(look) is Status.OK
    board.runs("udisksd")
    board.has("/lib/systemd/system/udiskie.service", "[Unit]\n")
    board.has("/etc/udev/rules.d/automount.rules", 'ACTION=="add", RUN+="/etc/udev/mount.sh"\n')
    board.has("/etc/udev/rules.d/m.rules", 'ENV{SYSTEMD_WANTS}+="usb-mount@%k.service"\n')
    found = [verdict.found for verdict in board.seen(look)]
    assert found == [
        "udisksd runs (process 77)",
        "/lib/systemd/system/udiskie.service is installed",
        "udev's rule /etc/udev/rules.d/automount.rules mounts what is plugged",
        "udev's rule /etc/udev/rules.d/m.rules mounts what is plugged",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "PARTLABEL=cartridge-01 /mnt ext4 defaults 0 0",
        "/dev/disk/by-partlabel/cartridge-01 /mnt ext4 defaults 0 0",
        'LABEL="cartridge-01" /mnt ext4 defaults 0 0',
        "secret PARTLABEL=cartridge-01 none luks",
        "/dev/sda1 /run/media/card ext4 defaults 0 0",
        "/dev/mapper/caam-cartridge-01-9-1 /mnt ext4 defaults 0 0",
    ],
)
def test_a_line_about_our_media_is_found(line: str) -> None:
    assert environment.about_our_media(line, ["cartridge-*"], Path("/run/media")) is not None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# PARTLABEL=cartridge-01 /mnt ext4 defaults 0 0",
        "PARTLABEL=root / ext4 defaults 0 0",
        "tmpfs /run/media tmpfs defaults 0 0",
        "UUID=cartridge-01 /mnt ext4 defaults 0 0",
        "word",
    ],
)
def test_a_line_about_something_else_is_left_alone(line: str) -> None:
    assert environment.about_our_media(line, ["cartridge-*"], Path("/run/media")) is None


def test_labels_come_from_blobs_and_from_rules_that_say_more_than_any(board: Board) -> None:
    board.has("/data/caam/card.bb")
    board.has("/etc/fstab", "PARTLABEL=card /a\nPARTLABEL=log-1 /b\nPARTLABEL=root /\n")
    rules = (
        Rule(name="logs", match=Match(partlabel=("log-*", "?*"))),
        Rule(name="any", match=Match(partlabel="?*")),
    )
    found = [
        v.found.split(":")[0] for v in board.seen(environment.fixed_tables, Config(rule=rules))
    ]
    assert found == ["/etc/fstab, line 1", "/etc/fstab, line 2"]


# The agent's own.


@pytest.mark.parametrize(
    ("owner", "group", "mode", "wanted", "open_to_it"),
    [(0, 0, 0o600, 6, True), (0, 0, 0o400, 6, False), (1000, 0, 0o640, 4, True),
     (1000, 1000, 0o660, 6, False), (1000, 1000, 0o604, 4, True), (0, 1000, 0o066, 6, False)],
)  # fmt: skip
def test_the_service_is_a_root_that_modes_hold_for(
    owner: int, group: int, mode: int, wanted: int, open_to_it: bool, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    os.chown(file, owner, group)
    file.chmod(mode)
    assert is_open_to_service(file.stat(), wanted) == open_to_it


def test_blob_directory_and_blobs_of_a_board_without_caam(roots_folder: Path) -> None:
    board = Board(roots_folder)
    assert board.status(service.blob_directory) is Status.FAILURE
    assert board.status(service.blobs) is Status.UNKNOWN
    folder = board.root / "data/caam"
    folder.mkdir(parents=True, mode=0o700)
    assert board.status(service.blob_directory) is Status.OK
    assert board.status(service.blobs) is Status.WARNING
    blob = struct.pack("=5I", 0x5461674F, 0, 1, 16, 76) + bytes(76)
    board.has("/data/caam/a.bb", blob)
    (fine,) = board.seen(service.blobs)
    assert fine.found.endswith("whether this CAAM takes them was not tried, for want of it")
    board.has("/data/caam/b.bb", blob[:-1])
    damaged, rest = board.seen(service.blobs)
    assert "b.bb" in damaged.found
    assert "is cut short" in damaged.found
    assert rest.found.startswith("1 of 2 in ")
    os.chown(folder, 1000, 1000)
    (refused,) = board.seen(service.blob_directory)
    assert refused.remedy == f"chown root {folder}"
    assert board.seen(service.blobs)[0].status is Status.UNKNOWN


def test_a_mount_root_that_others_may_change_is_refused(roots_folder: Path) -> None:
    board = Board(roots_folder)
    assert board.status(service.mount_root) is Status.OK
    root = board.root / "run/media"
    root.mkdir(parents=True)
    assert board.status(service.mount_root) is Status.OK
    root.chmod(0o777)
    assert board.status(service.mount_root) is Status.FAILURE


def test_every_fault_of_the_configuration_is_a_line(roots_folder: Path) -> None:
    file = roots_folder / "agent.toml"
    site = Site(Config(), config_file=file)
    assert [v.status for v in service.configuration(site)] == [Status.OK]
    file.write_text('log_level = "loud"\nmount_rot = "/media"\n')
    faults = list(service.configuration(site))
    assert [v.status for v in faults] == [Status.FAILURE] * 2
    assert f"{file}: mount_rot: is not a key here" in faults[1].found


def test_with_a_faulty_configuration_nothing_is_said_of_what_it_configures(
    roots_folder: Path,
) -> None:
    file = roots_folder / "agent.toml"
    file.write_text('blob_directory = "/srv/keys"\nmount_rot = "/media"\n')
    site = replace(runner._site(file), root=roots_folder)
    told = [(f.check, f.verdict) for f in runner.findings(site)]
    unknown = {check for check, v in told if v.found == "the configuration cannot be read, see its "
               "line" and v.status is Status.UNKNOWN and not v.remedy}  # fmt: skip
    assert unknown == {
        "ciphers", "blob-directory", "blobs", "mount-root", "udevd", "udev-rule",
        "mount-propagation", "fixed-tables",
    }  # fmt: skip
    assert [check for check, v in told if "/data/caam" in f"{v.found}{v.remedy}"] == []
    assert "configuration" in {check for check, v in told if v.status is Status.FAILURE}


def test_a_configuration_that_was_named_must_be_there(roots_folder: Path) -> None:
    site = Site(Config(), config_file=roots_folder / "no.toml", config_required=True)
    assert [v.status for v in service.configuration(site)] == [Status.FAILURE]


def test_where_systemd_does_not_answer_the_service_is_unknown(board: Board) -> None:
    assert board.status(service.service) is Status.UNKNOWN
    assert board.status(service.sockets) is Status.UNKNOWN

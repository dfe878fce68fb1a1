"""Checks of the environment: udev, mount propagation, other automounters, fstab."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Final

from caam_hotplug import names
from caam_hotplug.config.mount_checks import may_overlap
from caam_hotplug.config.rules import mount_folders
from caam_hotplug.config.templates import PathTemplate
from caam_hotplug.doctor import systemd
from caam_hotplug.doctor.board import RULE_FOLDERS, UNIT_FOLDERS, Board, is_masked
from caam_hotplug.doctor.result import Verdict, failure, ok, unknown, warning

_UDEVD: Final = {"systemd-udevd", "udevd"}
_DM_RULES: Final = re.compile(r"\d\d-dm\.rules")
"""Device-mapper's own: 55-dm.rules on Debian, 10-dm.rules as upstream has it and Yocto takes it."""
_STEERS: Final = ("DM_UDEV_DISABLE_OTHER_RULES_FLAG", "UDISKS_IGNORE")

_AUTOMOUNTERS: Final = {"udisksd", "udiskie", "udevil", "devmon", "usbmount", "automount"}
"""Names of processes."""
_AUTOMOUNTER_UNITS: Final = (
    "udisks2.service", "udiskie.service", "usbmount@.service", "devmon@.service", "devmon.service",
    "autofs.service",
)  # fmt: skip
_MOUNTS_BY_RULE: Final = re.compile(
    r'^[^#\n]*\b(?:RUN\b[^=\n]*=\s*"[^"\n]*mount|SYSTEMD_WANTS\b[^=\n]*=\s*"[^"\n]*mount[^"\n]*@)',
    re.MULTILINE,
)
"""A program of that name, or a unit's instance. Plain names are systemd's own mounts."""


def udevd(board: Board) -> Iterator[Verdict]:
    """Check that udevd runs, or that the agent does not need it."""
    running = [process for process in board.processes() if process.name in _UDEVD]
    control = board.at(names.UDEV_CONTROL).exists()
    source = board.config.source
    if source == "kernel":
        yield ok('not asked: the configuration says source = "kernel"')
    elif not running and source == "auto" and not control:
        yield warning(
            "udevd does not run; the agent goes by the kernel's events, and mappings get no links",
            'systemctl start systemd-udevd, or say source = "kernel" in the configuration if '
            "that is meant",
        )
    elif not running:
        yield failure(
            "udevd does not run; media are noticed half a minute late",
            "systemctl start systemd-udevd",
        )
    elif all(process.state in {"T", "t"} for process in running):
        yield failure(
            f"udevd (process {running[0].pid}) is stopped; media are noticed half a minute late",
            f"kill -CONT {running[0].pid}, or systemctl restart systemd-udevd",
        )
    else:
        yield ok(f"udevd runs (process {min(process.pid for process in running)})")


def udev_rule(board: Board) -> Iterator[Verdict]:
    """Check that the agent's rule is in force, before those that obey its flags."""
    install = (
        "install -m 0644 rules/50-caam-hotplug.rules /usr/lib/udev/rules.d/, then "
        "udevadm control --reload"
    )
    effect = "udev opens mappings and other automounters are not kept off them"
    if board.config.source == "kernel" and not board.at(names.UDEV_CONTROL).exists():
        yield ok("not needed: there is no udevd here")
        return
    rules = board.installed(RULE_FOLDERS)
    steered = min(filter(_DM_RULES.fullmatch, rules), default="55-dm.rules")
    ours = {name: text for name, text in _texts(rules) if names.DM_UUID_PREFIX in text}
    masked = [file for name, file in rules.items() if names.PROGRAM in name and is_masked(file)]
    if not ours and masked:
        yield failure(f"{_shown(board, masked[0])} hides the agent's rule; {effect}", "remove it")
    elif not ours:
        yield failure(f"the agent's rule is not installed; {effect}", install)
    elif min(ours) > steered:
        early = "50" if steered > "50" else "09"
        yield failure(
            f"{_shown(board, rules[min(ours)])} comes after {steered}, too late; {effect}",
            f"name it {early}-{names.PROGRAM}.rules, then udevadm control --reload",
        )
    elif not all(flag in ours[min(ours)] for flag in _STEERS):
        yield failure(f"{_shown(board, rules[min(ours)])} is another version; {effect}", install)
    else:
        yield ok(f"{_shown(board, rules[min(ours)])} is in force, before {steered}")


def _texts(files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for name, file in files.items():
        if not name.endswith(".rules"):
            continue
        try:
            yield name, file.read_text(errors="replace")
        except OSError:  # a link that leads nowhere
            continue


def _shown(board: Board, file: Path) -> str:
    return f"/{file.relative_to(board.root)}"


def propagation(board: Board) -> Iterator[Verdict]:
    """Check that all others see what the service mounts."""
    folders = (board.config.mount_root, *mount_folders(board.config.rule))
    roots = [*map(PurePosixPath, folders)]
    pid = _service_pid(board)
    seen = shared_mounts(board.text(f"/proc/{pid or 1}/mountinfo") or "")
    if not seen:
        yield unknown("the table of mounts cannot be read")
        return
    if pid and _namespace(board, str(pid)) != _namespace(board, "1"):
        hosts = shared_mounts(board.text("/proc/1/mountinfo") or "")
        groups = [(covering(root, seen)[1], covering(root, hosts)[1]) for root in roots]
        if any(mine is None or mine != of_host for mine, of_host in groups):
            yield failure(
                "the service has a mount namespace of its own; what it mounts nobody else sees",
                f"take out what gives it one (PrivateMounts=, ProtectSystem=, PrivateTmp= and the "
                f"like): systemctl cat {names.PROGRAM}",
            )
            return
    who = "the service" if pid else "PID 1 (the service does not run)"
    covered = [covering(each, seen) for each in (PurePosixPath("/"), *roots)]
    private = [at for at, group in covered if group is None]
    for at in dict.fromkeys(private):
        yield warning(
            f"{at} is private as {who} sees it: services and containers with mount namespaces of "
            "their own do not see media that are mounted after their start",
            f"mount --make-rshared {at}",
        )
    if not private:
        there = ", ".join(map(str, roots))
        yield ok(f"mounts below {there} spread to other namespaces, as {who} sees it")


def _service_pid(board: Board) -> int | None:
    """Return the running agent's process, or None."""
    try:
        return systemd.unit(names.SERVICE_UNIT, board.at(systemd.SOCKET)).main_pid or None
    except OSError:
        return None


def _namespace(board: Board, pid: str) -> str:
    return str(board.at(f"/proc/{pid}/ns/mnt").readlink())


def shared_mounts(mountinfo: str) -> dict[str, str | None]:
    """Return for each mount the group that shares mounts below it, None for none.

    The last of several mounts at one point counts. Source: proc_pid_mountinfo(5).
    """
    found: dict[str, str | None] = {}
    for line in mountinfo.splitlines():
        fields = line.partition(" - ")[0].split(" ")
        if len(fields) >= 6:
            groups = [word for word in fields[6:] if word.startswith("shared:")]
            found[fields[4]] = groups[0] if groups else None
    return found


def covering(path: PurePosixPath, mounts: dict[str, str | None]) -> tuple[str, str | None]:
    """Return the mount on which the path lies, and its group."""
    for point in (path, *path.parents):
        if str(point) in mounts:
            return str(point), mounts[str(point)]
    return "/", None


def automounters(board: Board) -> Iterator[Verdict]:
    """Check that nothing else mounts what is plugged."""
    keep_off = (
        "keep it off the agent's media, or remove it: two that mount one medium fight; see "
        "docs/doctor.md"
    )
    fine = True
    running = {p.name: p.pid for p in board.processes() if p.name in _AUTOMOUNTERS}
    for name, pid in sorted(running.items()):
        fine = False
        yield warning(f"{name} runs (process {pid})", keep_off)
    for name, file in sorted(board.installed(UNIT_FOLDERS).items()):
        if name in _AUTOMOUNTER_UNITS and not is_masked(file):
            fine = False
            yield warning(
                f"{_shown(board, file)} is installed",
                f"systemctl mask {name} if nothing needs it; {keep_off}",
            )
    for name, text in _texts(board.installed(RULE_FOLDERS)):
        if _MOUNTS_BY_RULE.search(text):
            fine = False
            where = _shown(board, board.installed(RULE_FOLDERS)[name])
            yield warning(
                f"udev's rule {where} mounts what is plugged",
                f"remove it, or hide it: ln -s /dev/null /etc/udev/rules.d/{name}",
            )
    if not fine:
        return
    yield ok("none is there (looked for udisks2, udiskie, udevil, usbmount, autofs, udev rules)")


def fixed_tables(board: Board) -> Iterator[Verdict]:
    """Check that no line of fstab and crypttab is about the agent's media."""
    labels = _labels(board)
    of_rules = (rule.mount.path for rule in board.config.rule)
    paths = [path for path in of_rules if path is not None]
    fine = True
    for file in ("/etc/fstab", "/etc/crypttab"):
        for number, line in enumerate((board.text(file) or "").splitlines(), 1):
            why = about_our_media(line, labels, board.config.mount_root, paths)
            if why is not None:
                fine = False
                yield warning(
                    f"{file}, line {number}: {why}, which is the agent's to serve",
                    "remove the line; systemd acts on it when the medium is plugged",
                )
    if fine:
        yield ok("no line of /etc/fstab and /etc/crypttab is about the agent's media")


def _labels(board: Board) -> list[str]:
    """Return globs for the labels that the agent serves: blobs' names and rules' labels."""
    globs = [file.stem for file in board.at(board.config.blob_directory).glob("*.bb")]
    for rule in board.config.rule:
        wanted = rule.match.partlabel or ()
        asked = (wanted,) if isinstance(wanted, str) else wanted
        globs += [glob for glob in asked if any(letter.isalnum() for letter in glob)]
    return globs


def about_our_media(
    line: str, labels: list[str], mount_root: Path, paths: Sequence[PathTemplate]
) -> str | None:
    """Return why the line of fstab or crypttab is about the agent's media; None if it is not.

    `paths`: those of rules.
    """
    fields = line.split()
    if len(fields) < 2 or fields[0].startswith("#"):
        return None
    for field in fields[:2]:
        for prefix in ("PARTLABEL=", "LABEL=", "/dev/disk/by-partlabel/", "/dev/disk/by-label/"):
            label = field.removeprefix(prefix).strip('"')
            if field.startswith(prefix) and any(fnmatchcase(label, glob) for glob in labels):
                return f"{field} names a label that the agent has a blob or a rule for"
        if field.startswith(f"/dev/mapper/{names.DM_NAME_PREFIX}"):
            return f"{field} names a mapping of the agent's"
        if PurePosixPath(field).is_relative_to(mount_root) and field != str(mount_root):
            return f"{field} is below the agent's mount root"
        if any(_is_at_or_below(field, path) for path in paths):
            return f"{field} is at the path of a rule"
    return None


def _is_at_or_below(field: str, path: PathTemplate) -> bool:
    """Whether the path of a line is one that the rule may mount at, or in that."""
    names_there = PurePosixPath(field).parts[1:]
    is_long = len(names_there) >= len(path.names) and field.startswith("/")
    return is_long and may_overlap(path, names_there)

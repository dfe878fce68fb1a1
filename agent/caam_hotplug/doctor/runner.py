"""The runner: all checks in order, the kernel first, then the CAAM, then what needs them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from caam_hotplug import names
from caam_hotplug.config import loader
from caam_hotplug.doctor import caam, environment, kernel, report, self_test, service
from caam_hotplug.doctor.board import Board
from caam_hotplug.doctor.result import Result, Verdict, unknown
from caam_hotplug.errors import ConfigError, HotplugError
from caam_hotplug.kernel import config_files


@dataclass(frozen=True, slots=True)
class Check:
    """A check of one condition."""

    name: str
    """For programs, so it does not change."""
    subject: str
    run: Callable[[Board], Iterator[Verdict]]
    needs_configuration: bool = False
    """Whether it checks what the configuration names; without one, that would be elsewhere."""


CHECKS: Final = (
    Check("kernel", "kernel", kernel.kernel),
    Check("kernel-options", "kernel options", kernel.kernel_options),
    Check("libraries", "libraries", kernel.libraries),
    Check("dm-crypt", "dm-crypt", kernel.device_mapper),
    Check("keys", "keyring", kernel.keys),
    Check("caam-device", "CAAM device", caam.device),
    Check("caam-job-rings", "CAAM job rings", caam.job_rings),
    Check("caam-state", "CAAM state", caam.security_state),
    Check("caam-algorithms", "CAAM algorithms", caam.of_the_caam),
    Check("ciphers", "cipher", caam.ciphers, needs_configuration=True),
    Check("known-answer", "known answer", self_test.round_trip),
    Check("configuration", "configuration", service.configuration),
    Check("blob-directory", "blob directory", service.blob_directory, needs_configuration=True),
    Check("blobs", "blobs", service.blobs, needs_configuration=True),
    Check("mount-root", "mount root", service.mount_root, needs_configuration=True),
    Check("udevd", "udevd", environment.udevd, needs_configuration=True),
    Check("udev-rule", "udev rule", environment.udev_rule, needs_configuration=True),
    Check(
        "mount-propagation",
        "mount propagation",
        environment.propagation,
        needs_configuration=True,
    ),
    Check("automounters", "other automounters", environment.automounters),
    Check("fixed-tables", "fstab, crypttab", environment.fixed_tables, needs_configuration=True),
    Check("service", "service", service.service),
    Check("sockets", "sockets", service.sockets),
)


_NOT_CONFIGURED: Final = "the configuration cannot be read, see its line"


def results(board: Board) -> Iterator[Result]:
    """Run every check and yield each result at once."""
    for check in CHECKS:
        if check.needs_configuration and board.config_faulty:
            yield Result(check.name, check.subject, unknown(_NOT_CONFIGURED))
            continue
        try:
            for verdict in check.run(board):
                yield Result(check.name, check.subject, verdict)
        except (HotplugError, OSError) as error:
            yield Result(check.name, check.subject, unknown(f"could not be checked: {error}"))


def examine(file: Path | None, out: TextIO, *, as_json: bool) -> int:
    """Check the board, write the report line by line, and return the exit status.

    Raises: HotplugError without root's rights, or if it is interrupted.
    """
    if os.geteuid() != 0:
        raise HotplugError("examine the board: it needs to be root; try sudo")
    # So that what a check has set up is taken down after these signals, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) has it
            signal.signal(number, _interrupt)
    page = page_for(out)
    found: list[Result] = []
    try:
        for result in results(_board(file)):
            found.append(result)
            if not as_json:
                out.writelines(f"{line}\n" for line in page.lines(result))
                out.flush()
    except KeyboardInterrupt as interrupt:
        raise HotplugError("examine the board: interrupted") from interrupt
    out.write(f"{report.to_json(found) if as_json else report.summary(found)}\n")
    return report.exit_status(found)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _board(file: Path | None) -> Board:
    """Return the board, with its configuration if that can be read, even if others may write it."""
    where = names.CONFIG_FILE if file is None else file.absolute()
    required = file is not None
    try:
        loaded = loader.load(where, config_files.AnyonesFiles(), required=required)
    except ConfigError:  # the check of the configuration names its faults
        return Board(loader.Config(), where, required, config_faulty=True)
    return Board(loaded, where, required)


def page_for(out: TextIO) -> report.Page:
    """Return a page with colours and line breaks for a terminal only; https://no-color.org."""
    if not out.isatty():
        return report.Page()
    with suppress(OSError):
        width = os.get_terminal_size(out.fileno()).columns
        return report.Page(coloured=not os.environ.get("NO_COLOR"), width=width or None)
    return report.Page()

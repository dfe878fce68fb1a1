"""All looks in their order: the machine first, then the CAAM, then what is built on them."""

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
from caam_hotplug.doctor.board import Site
from caam_hotplug.doctor.result import Result, Verdict, unknown
from caam_hotplug.errors import ConfigError, HotplugError
from caam_hotplug.kernel import config_files


@dataclass(frozen=True, slots=True)
class Check:
    """A look at one condition."""

    name: str
    """For programs; it does not change."""
    subject: str
    look: Callable[[Site], Iterator[Verdict]]
    of_what_is_configured: bool = False
    """Whether it looks where the configuration says; without one that would be elsewhere."""


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
    Check("ciphers", "cipher", caam.ciphers, of_what_is_configured=True),
    Check("known-answer", "known answer", self_test.round_trip),
    Check("configuration", "configuration", service.configuration),
    Check("blob-directory", "blob directory", service.blob_directory, of_what_is_configured=True),
    Check("blobs", "blobs", service.blobs, of_what_is_configured=True),
    Check("mount-root", "mount root", service.mount_root, of_what_is_configured=True),
    Check("udevd", "udevd", environment.udevd, of_what_is_configured=True),
    Check("udev-rule", "udev rule", environment.udev_rule, of_what_is_configured=True),
    Check(
        "mount-propagation",
        "mount propagation",
        environment.propagation,
        of_what_is_configured=True,
    ),
    Check("automounters", "other automounters", environment.automounters),
    Check("fixed-tables", "fstab, crypttab", environment.fixed_tables, of_what_is_configured=True),
    Check("service", "service", service.service),
    Check("sockets", "sockets", service.sockets),
)


_NOT_CONFIGURED: Final = "the configuration cannot be read, see its line"


def findings(site: Site) -> Iterator[Result]:
    """What every check has found, as it is found."""
    for check in CHECKS:
        if check.of_what_is_configured and site.config_faulty:
            yield Result(check.name, check.subject, unknown(_NOT_CONFIGURED))
            continue
        try:
            for verdict in check.look(site):
                yield Result(check.name, check.subject, verdict)
        except (HotplugError, OSError) as error:
            yield Result(check.name, check.subject, unknown(f"could not be looked at: {error}"))


def examine(file: Path | None, out: TextIO, *, as_json: bool) -> int:
    """The report is written, line by line as it is found; returns the exit status.

    Raises: HotplugError if it is not root who asks, or if it is interrupted.
    """
    if os.geteuid() != 0:
        raise HotplugError("examine the board: it needs to be root; try sudo")
    # What is set up for a look is taken down again on the way out, also of these.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    page = page_for(out)
    found: list[Result] = []
    try:
        for finding in findings(_site(file)):
            found.append(finding)
            if not as_json:
                out.writelines(f"{line}\n" for line in page.lines(finding))
                out.flush()
    except KeyboardInterrupt as interrupt:
        raise HotplugError("examine the board: interrupted") from interrupt
    out.write(f"{report.to_json(found) if as_json else report.summary(found)}\n")
    return report.exit_status(found)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _site(file: Path | None) -> Site:
    """The site, with its configuration if that can be read, whoever could have written it."""
    where = names.CONFIG_FILE if file is None else file.absolute()
    required = file is not None
    try:
        loaded = loader.load(where, config_files.AnyonesFiles(), required=required)
    except ConfigError:  # the check of the configuration names its faults
        return Site(loader.Config(), where, required, config_faulty=True)
    return Site(loaded, where, required)


def page_for(out: TextIO) -> report.Page:
    """Colours and line breaks for a terminal only; https://no-color.org."""
    if not out.isatty():
        return report.Page()
    with suppress(OSError):
        width = os.get_terminal_size(out.fileno()).columns
        return report.Page(coloured=not os.environ.get("NO_COLOR"), width=width or None)
    return report.Page()

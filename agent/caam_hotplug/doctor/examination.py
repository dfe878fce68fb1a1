"""All looks in their order: the machine first, then the CAAM, then what is built on them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from caam_hotplug import config, names
from caam_hotplug.doctor import agent, chip, machine, report, surroundings, trial
from caam_hotplug.doctor.finding import Finding, Verdict, unknown
from caam_hotplug.doctor.site import Site
from caam_hotplug.errors import ConfigError, HotplugError
from caam_hotplug.kernel import files


@dataclass(frozen=True, slots=True)
class Check:
    """A look at one condition."""

    name: str
    """For programs; it does not change."""
    subject: str
    look: Callable[[Site], Iterator[Verdict]]


CHECKS: Final = (
    Check("kernel", "kernel", machine.kernel),
    Check("kernel-options", "kernel options", machine.kernel_options),
    Check("libraries", "libraries", machine.libraries),
    Check("dm-crypt", "dm-crypt", machine.device_mapper),
    Check("keys", "keyring", machine.keys),
    Check("caam-device", "CAAM device", chip.device),
    Check("caam-job-rings", "CAAM job rings", chip.job_rings),
    Check("caam-state", "CAAM state", chip.security_state),
    Check("caam-algorithms", "CAAM algorithms", chip.of_the_caam),
    Check("ciphers", "cipher", chip.ciphers),
    Check("known-answer", "known answer", trial.round_trip),
    Check("configuration", "configuration", agent.configuration),
    Check("blob-directory", "blob directory", agent.blob_directory),
    Check("blobs", "blobs", agent.blobs),
    Check("mount-root", "mount root", agent.mount_root),
    Check("udevd", "udevd", surroundings.udevd),
    Check("udev-rule", "udev rule", surroundings.udev_rule),
    Check("mount-propagation", "mount propagation", surroundings.propagation),
    Check("automounters", "other automounters", surroundings.automounters),
    Check("fixed-tables", "fstab, crypttab", surroundings.fixed_tables),
    Check("service", "service", agent.service),
    Check("sockets", "sockets", agent.sockets),
)


def findings(site: Site) -> Iterator[Finding]:
    """What every check has found, as it is found."""
    for check in CHECKS:
        try:
            for verdict in check.look(site):
                yield Finding(check.name, check.subject, verdict)
        except (HotplugError, OSError) as error:
            yield Finding(check.name, check.subject, unknown(f"could not be looked at: {error}"))


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
    found: list[Finding] = []
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
    """The site, with the configuration as far as it can be read, whoever could have written it."""
    where = names.CONFIG_FILE if file is None else file.absolute()
    loaded = config.Config()
    with suppress(ConfigError):  # the check of the configuration names its faults
        loaded = config.load(where, files.AnyonesFiles(), required=file is not None)
    return Site(loaded, where, file is not None)


def page_for(out: TextIO) -> report.Page:
    """Colours and line breaks for a terminal only; https://no-color.org."""
    if not out.isatty():
        return report.Page()
    with suppress(OSError):
        width = os.get_terminal_size(out.fileno()).columns
        return report.Page(coloured=not os.environ.get("NO_COLOR"), width=width or None)
    return report.Page()

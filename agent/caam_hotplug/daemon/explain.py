"""Which rule matches a device and what it will be called, or for each rule why it does not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace

from caam_hotplug import names
from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import Action, NeedsUdev, NoMatch, Plan, match_rules
from caam_hotplug.errors import KernelError
from caam_hotplug.formats.blobs import KEY_TYPES
from caam_hotplug.formats.crypt_table import cipher_for
from caam_hotplug.kernel import open_volume, sysfs, udev
from caam_hotplug.model import SECTOR_BYTES, Entry, State, Volume

_FACTS = (
    "partlabel", "partuuid", "parttype", "label", "uuid", "header", "serial", "vendor",
    "model", "path",
)  # fmt: skip


def explain(node: str, config: Config, entries: Iterable[Entry] = ()) -> Iterator[str]:
    """Yield lines for users. `entries`: what the running agent has published of its volumes.

    Raises: HotplugError if the node is no block device with a medium.
    """
    source = udev.default_source() if config.source == "auto" else config.source
    with closing(udev.Devices(source)) as devices:
        volume = devices.volume(node)
    entry = next((each for each in entries if each.volume.id == volume.id), None)
    volume = _identified(volume, source) if entry is None else entry.volume
    yield from _facts(volume)
    if volume.awaits_udev:
        yield "  udev has not reported it yet, and may report more"
    yield ""
    if entry is not None and entry.state is not State.IGNORED:
        yield f"it is {entry.state.value}{f': {entry.reason}' if entry.reason else ''}"
        if entry.observed_at:
            at = time.strftime("%F %T", time.localtime(entry.observed_at))
            yield f"  as of {at}, when the kernel was last looked at"
    held_by = entry.rule if entry is not None else ""
    if held_by:
        yield f"  rule {held_by!r} is in force for it"
    match match_rules(config.rule, volume):
        case Plan() as plan:
            if held_by not in {"", plan.rule.name}:
                yield "after a reload of the configuration files:"
            yield from _planned(plan, config, volume)
        case NeedsUdev():
            yield "the rules ask for what only udev knows, and wait for its report"
        case NoMatch() as no_match:
            if held_by:
                yield "after a reload of the configuration files:"
            yield "no rule matches it; it is left untouched"
            for name, why in no_match.reasons:
                yield f"  rule {name!r}: {why}" if name else f"  {why}"


def _identified(volume: Volume, source: sysfs.Source) -> Volume:
    """Return the volume with what its disk says. Raises: KernelError if nothing says anything."""
    volume = replace(volume, awaits_udev=source == "udev" and not volume.identified)
    try:
        return open_volume.identify(volume)
    except KernelError:
        if not volume.identified:
            raise
        return volume


def _cipher(plan: Plan) -> str:
    """Return the cipher; if it depends on the blob, each that it may be."""
    form = plan.rule.key.form
    by_cipher: dict[str, list[str]] = {}
    for made_by, kind in KEY_TYPES.items():
        if form in {None, made_by}:
            by_cipher.setdefault(cipher_for(plan.rule.crypt, kind), []).append(made_by)
    if len(by_cipher) == 1:
        return next(iter(by_cipher))
    return ", or ".join(
        f"{cipher} under a {' or '.join(forms)} key" for cipher, forms in by_cipher.items()
    )


def _facts(volume: Volume) -> Iterator[str]:
    size = volume.size * SECTOR_BYTES
    yield f"{volume.node}: {volume.devtype.value} on {volume.bus.value}, {size} bytes"
    yield f"  volume     {volume.id} (disk sequence number and partition)"
    yield f"  removable  {'true' if volume.removable else 'false'}"
    yield f"  read-only  {'true' if volume.read_only else 'false'}"
    for name in _FACTS:
        value = getattr(volume, name)
        if value is not None:
            yield f"  {name:<10} {value!a}"


def _planned(plan: Plan, config: Config, volume: Volume) -> Iterator[str]:
    yield f"rule {plan.rule.name!r} matches it"
    yield f"  blob        {config.blob_directory / plan.blob}"
    yield f"  mapping     /dev/mapper/{names.dm_name(volume.id, plan.mount_name)}"
    yield f"  cipher      {_cipher(plan)}"
    if plan.rule.action is Action.MOUNT:
        options = ",".join(plan.rule.mount.options)
        yield f"  mount point {config.mount_root / plan.place} ({options})"

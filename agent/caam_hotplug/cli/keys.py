"""The commands `key create`, `enroll`, `list` and `inspect`, for the keys of this board."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from caam_hotplug import names
from caam_hotplug.cli import options, terminal
from caam_hotplug.errors import BlobError, HotplugError, shown
from caam_hotplug.formats.blobs import KEY_TYPES, Blob, Encrypted, Tagged, Trusted, backend_of

if TYPE_CHECKING:
    from caam_hotplug.config import loader

_EXAMPLES: Final = """\
examples:
  caam-hotplug key create spare-01 --key-bytes 32
  caam-hotplug key enroll cartridge-01 --from /root/cartridge-01.recovery
  caam-hotplug key list --json
  caam-hotplug key inspect /data/caam/cartridge-01.bb

exit status: 0 done; 1 refused, failed, or (list) a blob is faulty; 2 wrong usage
"""
_SUFFIX: Final = ".bb"
_KINDS: Final = {Tagged: "black blob", Trusted: "trusted key", Encrypted: "encrypted key"}


def add_to(commands: options.Commands, add_config: options.AddConfig, load: options.Load) -> None:
    """Add the command `key`."""
    key = options.add_command(
        commands,
        "key",
        "make, list and inspect the keys of this board",
        epilog=_EXAMPLES,
    )
    verbs = key.add_subparsers(title="commands", metavar="COMMAND", required=True)

    _add_making(verbs, add_config, load)
    _add_reading(verbs, add_config, load)


def _add_making(verbs: options.Commands, add_config: options.AddConfig, load: options.Load) -> None:
    """Add `create` and `enroll`."""
    create = options.add_command(
        verbs,
        "create",
        "make a key that only the CAAM knows; no medium is touched",
        epilog="example:\n  caam-hotplug key create spare-01 --key-bytes 32 --seal ccm",
    )
    create.add_argument("name", metavar="NAME", help="the blob is NAME.bb in the blob directory")
    options.add_seal_options(create)
    add_config(create)
    create.set_defaults(command=lambda parsed: _create(parsed, load(parsed)))

    enroll = options.add_command(
        verbs,
        "enroll",
        "seal the key of a recovery file for this board, so that it opens the medium too",
        epilog="example:\n  caam-hotplug key enroll cartridge-01 --from cartridge-01.recovery",
    )
    enroll.add_argument("name", metavar="NAME", help="the label of the medium")
    enroll.add_argument(
        "--from", dest="file", type=Path, required=True, metavar="FILE", help="the recovery file"
    )
    options.add_seal_options(enroll, makes_key=False)
    add_config(enroll)
    enroll.set_defaults(command=lambda parsed: _enroll(parsed, load(parsed)))


def _add_reading(
    verbs: options.Commands, add_config: options.AddConfig, load: options.Load
) -> None:
    """Add `list` and `inspect`."""
    listing = options.add_command(
        verbs,
        "list",
        "list the blobs of this board",
        epilog="example:\n  caam-hotplug key list --json",
    )
    listing.add_argument("--json", action="store_true", help="for programs")
    add_config(listing)
    listing.set_defaults(command=lambda parsed: _list(parsed, load(parsed)))

    inspect = options.add_command(
        verbs,
        "inspect",
        "show a blob's header; none of it is secret",
        epilog="example:\n  caam-hotplug key inspect /data/caam/cartridge-01.bb",
    )
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(command=_inspect)


@dataclass(frozen=True, slots=True)
class _Blob:
    """A line of `key list`. None stands for what a faulty blob does not have."""

    name: str
    type: str | None = None
    seal: str | None = None
    key_bytes: int | None = None
    fault: str | None = None


def _require_name(name: str) -> None:
    reason = names.why_unsafe(name)
    if reason is not None:
        raise HotplugError(f"make a key {name!a}: {reason}")


def _create(parsed: argparse.Namespace, loaded: loader.Config) -> int:
    from caam_hotplug.keys import backends, store  # noqa: PLC0415  libraries, only needed here

    _require_name(parsed.name)
    options.require_root(f"make a key {parsed.name}")
    method, key_bytes = options.seal_method(parsed)
    with store.folder(loaded.blob_directory) as folder:
        store.require_new(parsed.name, folder)
        blob = backends.seal(method, key_bytes, folder.path)
        folder.write(parsed.name, blob, settled=True)
        how = method.seal if method.backend == "tagged" else method.backend
        print(f"{folder.file(parsed.name)}: made; {key_bytes} bytes, {how}")
    return 0


def _enroll(parsed: argparse.Namespace, loaded: loader.Config) -> int:
    from caam_hotplug.formats import recovery_files  # noqa: PLC0415  libraries, only needed here
    from caam_hotplug.kernel import memory  # noqa: PLC0415
    from caam_hotplug.keys import backends, store  # noqa: PLC0415  libraries, only needed here

    _require_name(parsed.name)
    options.require_root(f"enroll {parsed.name}")
    method, _ = options.seal_method(parsed)
    backends.BACKENDS[method.backend].require_given()
    memory.refuse_core_dumps()
    with store.recovered(parsed.file) as (about, key):
        if store.is_open_to_others(parsed.file):
            print(
                f"note: others than root can read {shown(parsed.file)}, and with it the medium; "
                "delete it once it is enrolled, or make it root's with mode 600",
                file=sys.stderr,
            )
        if about.label != parsed.name:
            raise HotplugError(
                f"enroll {parsed.name}: {shown(parsed.file)} is the recovery file of "
                f"{about.label}, and the blob must have that name"
            )
        backends.BACKENDS[method.backend].require_fit(about.cipher, len(key))
        with store.folder(loaded.blob_directory) as folder:
            store.require_new(parsed.name, folder)
            blob = backends.seal(method, key, folder.path)
            folder.write(parsed.name, blob, settled=True)
            print(f"{folder.file(parsed.name)}: made; this board opens {parsed.name} too")
    for line in recovery_files.needs_rule(about, KEY_TYPES[method.backend]):
        print(line, file=sys.stderr)
    return 0


def _list(parsed: argparse.Namespace, loaded: loader.Config) -> int:
    from caam_hotplug.kernel import paths  # noqa: PLC0415  only needed here

    directory = loaded.blob_directory
    try:
        with paths.directory(directory) as opened:
            files = [name for name in sorted(os.listdir(opened)) if name.endswith(_SUFFIX)]  # noqa: PTH208
    except FileNotFoundError:
        files = []
    except PermissionError as error:
        raise HotplugError(f"list {shown(directory)}: it needs to be root; use sudo") from error
    blobs = [_examined(directory, name) for name in files if not name.startswith(".")]
    if parsed.json:
        terminal.print_json([asdict(blob) for blob in blobs])
    elif blobs:
        for line in _table(blobs):
            print(line)
    else:
        print(f"no blobs in {shown(directory)}")
    return 1 if any(blob.fault for blob in blobs) else 0


def _table(blobs: list[_Blob]) -> list[str]:
    rows = [("NAME", "TYPE", "SEAL", "KEY", "STATE")]
    for blob in blobs:
        size = "-" if blob.key_bytes is None else f"{blob.key_bytes} bytes"
        state = "ok" if blob.fault is None else shown(blob.fault)
        rows.append((shown(blob.name), blob.type or "-", blob.seal or "-", size, state))
    return terminal.table(rows)


def _examined(directory: Path, file: str) -> _Blob:
    from caam_hotplug.kernel import blob_files  # noqa: PLC0415  only needed here

    name = file.removesuffix(_SUFFIX)
    try:
        blob = blob_files.read(directory, file)
    except BlobError as error:
        fault = str(error).removeprefix(f"read blob {directory / file}: ")
        return _Blob(name, fault=fault)
    return _Blob(name, _KINDS[type(blob)], getattr(blob, "seal", None), blob.key_bytes)


def _inspect(parsed: argparse.Namespace) -> int:
    from caam_hotplug.kernel import blob_files  # noqa: PLC0415  only needed here

    file = parsed.file.absolute()
    blob = blob_files.read_anyones(file)
    facts = _facts(blob)
    if parsed.json:
        terminal.print_json({"file": str(file), "backend": backend_of(blob), **facts})
        return 0
    print(f"{shown(file)}: {_KINDS[type(blob)]}")
    for name, value in facts.items():
        print(f"  {name:<10}  {'not in the blob' if value is None else shown(value)}")
    return 0


def _facts(blob: Blob) -> dict[str, int | str | None]:
    """Return a blob's header. None of it is secret."""
    match blob:
        case Tagged():
            return {
                "type": blob.type,
                "seal": blob.seal,
                "key_bytes": blob.key_bytes,
                "blob_bytes": blob.blob_bytes,
            }
        case Trusted():
            return {"key_bytes": blob.key_bytes, "blob_bytes": len(blob.content)}
        case Encrypted():
            return {"format": blob.format, "master": blob.master, "key_bytes": blob.key_bytes}

"""Checks of keys that were made before against the options of this run. Nothing is changed."""

from __future__ import annotations

from pathlib import Path

from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.formats import blobs
from caam_hotplug.keys import store
from caam_hotplug.model import Volume
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.provision_stage import FoundKeys


def check_new_keys(options: ProvisionOptions, keys: FoundKeys, directory: Path) -> tuple[str, ...]:
    """Check that neither blob nor recovery file is in the way. Raises: HotplugError."""
    if keys.blob.exists and not keys.blob.is_unsettled:
        raise HotplugError(store.why_taken(options.label, directory / options.blob_name))
    if options.recovery_file is None or keys.recovery is None:
        return ()
    store.require_unsettled(keys.recovery, options.recovery_file)
    file = shown(options.recovery_file)  # its description is true of whatever its key encrypts
    return (f"the key is that in {file}, of a run that was interrupted",)


def check_finished(
    options: ProvisionOptions, blob: blobs.Blob, keys: FoundKeys, medium: Volume
) -> tuple[str, ...]:
    """Check that the medium was made with the same options. Returns: notes. Raises: HotplugError.

    `medium`: the whole disk or the partition, whose content --erase would name.
    """
    operation, file = f"provision {medium.node}", options.recovery_file
    require_same_choices(options, blob, f"{operation}: it was made", "use the same")
    if file is None:
        return ()
    if keys.recovery is None:
        raise HotplugError(
            f"{operation}: it was made before, {shown(file)} is not there, and a blob does not "
            "tell its key; leave out --recovery-key, or make it anew under another label, with "
            f"--erase {medium.name}"
        )
    return (f"{shown(file)} was there before; whether its key is the medium's was not checked",)


def require_same_choices(
    options: ProvisionOptions, blob: blobs.Blob, begun: str, remedy: str
) -> None:
    """Check that the blob was made with the same options. Raises: HotplugError."""
    before, asked = _choices_in(blob), _choices_of(options, blob)
    if before != asked:
        raise HotplugError(f"{begun} with {before}, not with {asked}; {remedy}")


def _choices_in(blob: blobs.Blob) -> str:
    """Return the options of the command that made the blob, as far as the blob has them."""
    backend = blobs.backend_of(blob)
    match blob:
        case blobs.Tagged():
            return _as_options(backend, blob.key_bytes, f"--seal {blob.seal}")
        case blobs.Encrypted():
            return _as_options(backend, blob.key_bytes, f"--master {blob.master}")
    return _as_options(backend, blob.key_bytes)


def _choices_of(options: ProvisionOptions, blob: blobs.Blob) -> str:
    """Return this run's options in the same form. Some blobs do not have their key's length."""
    method, key_bytes = options.method, None if blob.key_bytes is None else options.key_bytes
    match method.backend:
        case "tagged":
            return _as_options(method.backend, key_bytes, f"--seal {method.seal}")
        case "encrypted":
            return _as_options(method.backend, key_bytes, f"--master {method.master}")
    return _as_options(method.backend, key_bytes)


def _as_options(backend: blobs.Backend, key_bytes: int | None, *more: str) -> str:
    length = [] if key_bytes is None else [f"--key-bytes {key_bytes}"]
    return " ".join([f"--backend {backend}", *length, *more])

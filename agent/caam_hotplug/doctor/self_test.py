"""The self-test with a known answer: a test key through CAAM, keyring and dm-crypt.

The test key's plain bytes are known, so that software can say what the ciphertext must be. The
CAAM seals the key and takes it back from its blob. The volume is a loop device over memory: no
file and no medium is touched. Names are doctor's own, so the agent may run meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, cast

from caam_hotplug import names
from caam_hotplug.doctor.board import NOT_HARMLESS, Board, is_harmless
from caam_hotplug.doctor.result import Verdict, failure, ok, unknown, warning
from caam_hotplug.errors import BlobRejectedError, CaamError, DmError, KeyringError
from caam_hotplug.formats import blobs
from caam_hotplug.formats.crypt_table import CIPHERS
from caam_hotplug.kernel import caam, keyring, test_mapping, trusted
from caam_hotplug.kernel.loop import over_memory
from caam_hotplug.kernel.test_mapping import Encryption
from caam_hotplug.model import SECTOR_BYTES, SecretBytes, Sectors

_CIPHER: Final = "capi:tk(cbc(aes))-plain"
_KEY_BYTES: Final = 16
_TRUSTED_CIPHER: Final = CIPHERS["trusted"]
_TRUSTED_BYTES: Final = 64

_BLKFLSBUF: Final = 0x1261

_VOLUME: Final = Sectors(128)
_WRITTEN_AT: Final = Sectors(8)
_READ_AT: Final = Sectors(64)
_TEXT: Final = bytes(range(256)) * 16
"""Eight sectors that are alike in pairs, so that equal IVs would show."""

_SOFTWARE: Final = ("cbc(aes-generic)", "cbc(aes)")
"""The first is software by its driver's name; the second may be the CAAM itself."""


def round_trip(board: Board) -> Iterator[Verdict]:
    """Check that dm-crypt with the CAAM's key encrypts as AES in software does."""
    method = board.seal_method()
    cipher = _CIPHER if method == "tagged" else _TRUSTED_CIPHER
    if method is None:
        yield unknown("not tried: the CAAM's device is not there, nor are trusted keys")
        return
    leftovers = test_mapping.remove_leftovers(names.DOCTOR, board.at("/proc"))
    if leftovers:
        left = ", ".join(leftovers)
        yield warning(f"a killed doctor had left {left}; removed", "nothing to be done")
    sealer = "the CAAM" if method == "tagged" else "the trust source"
    try:
        yield _test_tagged_key(board) if method == "tagged" else _test_trusted_key(board)
    except BlobRejectedError as error:
        yield failure(
            f"{sealer} does not take back what it has just sealed: {error}",
            f"{sealer} or its driver is at fault: `dmesg | grep -i -e caam -e trusted -e tpm`",
        )
    except CaamError as error:
        yield failure(
            f"the CAAM makes no key: {error}", "`dmesg | grep -i caam` has the job's error"
        )
    except KeyringError as error:
        of_options = method == "trusted" and error.errno in {errno.EINVAL, errno.EPERM}
        yield failure(
            f"the key does not come to the keyring: {error}",
            "mend key.options in the rules" if of_options else "see the line of the keys",
        )
    except DmError as error:
        yield failure(
            f"dm-crypt does not take {sealer}'s key: {error}",
            f"it is `{cipher}` that is refused; see the lines of the ciphers and of "
            "device-mapper, and `dmesg | grep crypt`",
        )
    except OSError as error:
        yield failure(
            f"what is written to the test volume does not arrive: {error}",
            "the CAAM fails its jobs: `dmesg | grep -i -e caam -e jr` has their errors",
        )


def _test_tagged_key(board: Board) -> Verdict:
    """Compare dm-crypt with software, both ways."""
    keyring.join_session_keyring()
    with ExitStack() as held:
        # Hexadecimal digits: the driver takes the key as a text that ends at its first NUL.
        plain = held.enter_context(
            SecretBytes(bytearray(os.urandom(_KEY_BYTES // 2).hex(), "ascii"))
        )
        black = held.enter_context(_through_blob(board.at(names.CAAM_DEVICE), plain))
        try:
            memory = held.enter_context(over_memory(names.DOCTOR.memory, _VOLUME))
        except OSError as error:
            return _without_loop("the CAAM seals a key and takes it back", error)
        how = Encryption(_CIPHER, test_mapping.logon_key(black))
        node = held.enter_context(test_mapping.mapped(names.DOCTOR, memory, how))
        _write(node, _WRITTEN_AT, _TEXT)
        ciphertext = os.pread(memory.file, len(_TEXT), _WRITTEN_AT * SECTOR_BYTES)
        expected = _in_software(plain, _TEXT, _WRITTEN_AT)
        if expected is None:
            return _without_software(node, ciphertext)
        driver, right = expected
        if ciphertext != right:
            return failure(
                f"what dm-crypt writes with `{_CIPHER}` is not what {driver} makes of the same key",
                "do not use this kernel for data: media would be readable by it alone; report it "
                "with `dmesg` and the kernel's version",
            )
        _, sealed = _in_software(plain, _TEXT, _READ_AT) or ("", b"")
        os.pwrite(memory.file, sealed, _READ_AT * SECTOR_BYTES)
        if _read(node, _READ_AT, len(_TEXT)) != _TEXT:
            return failure(
                f"what {driver} encrypts is not what dm-crypt reads with `{_CIPHER}`",
                "do not use this kernel for data; report it with `dmesg` and the kernel's version",
            )
    return ok(f"a test key went through CAAM, keyring and dm-crypt; both ways as by {driver}")


def _test_trusted_key(board: Board) -> Verdict:
    """Write and read under a new trusted key, if the rules' options permit."""
    options = board.trust_options()
    if options is None:
        return unknown("not tried: rules have different options for the trust source")
    if not is_harmless(options):
        return unknown(f"not tried: {NOT_HARMLESS}")
    keyring.join_session_keyring()
    try:
        sealed = trusted.seal_trusted(_TRUSTED_BYTES, options)
    except KeyringError as error:
        # EINVAL is also what a job of the CAAM's is that failed (caam_jr_strstatus).
        if error.errno != errno.EINVAL or options or not board.has_tpm():
            raise
        return unknown(
            "not tried: the trust source needs options, as a TPM does, and no rule has any",
            'say them in a rule, such as key.options = "keyhandle=0x81000001"',
        )
    blob = cast(blobs.Trusted, blobs.parse(sealed, "trusted"))
    key = test_mapping.trusted_key(blob, _TRUSTED_BYTES, options)
    return _written_and_read(Encryption(_TRUSTED_CIPHER, key))


def _written_and_read(how: Encryption) -> Verdict:
    """Check the kernel's own ciphertext, since nobody else has the key."""
    with ExitStack() as held:
        try:
            memory = held.enter_context(over_memory(names.DOCTOR.memory, _VOLUME))
        except OSError as error:
            return _without_loop("the trust source seals a key", error)
        with test_mapping.mapped(names.DOCTOR, memory, how) as node:
            _write(node, _WRITTEN_AT, _TEXT)
        ciphertext = os.pread(memory.file, len(_TEXT), _WRITTEN_AT * SECTOR_BYTES)
        with test_mapping.mapped(names.DOCTOR, memory, how) as node:
            read = _read(node, _WRITTEN_AT, len(_TEXT))
    if ciphertext == _TEXT or read != _TEXT:
        return failure(
            f"what dm-crypt writes with `{_TRUSTED_CIPHER}` is not encrypted, or does not read "
            "back under the same blob",
            "do not use this kernel for data; report it with `dmesg` and the kernel's version",
        )
    return ok(
        "a trusted test key encrypts, and what it wrote reads back under its blob; nobody but "
        "the kernel has it, so it could not be compared with other software"
    )


def _without_loop(so_far: str, error: OSError) -> Verdict:
    return unknown(
        f"{so_far}; encryption was not tried, for want of a loop device: {error.strerror}",
        "load the kernel's module `loop`",
    )


def _without_software(node: str, ciphertext: bytes) -> Verdict:
    """Check that what is written is encrypted and reads back, and no more."""
    if ciphertext == _TEXT or _read(node, _WRITTEN_AT, len(_TEXT)) != _TEXT:
        return failure(
            f"what dm-crypt writes with `{_CIPHER}` is not encrypted, or does not read back",
            "do not use this kernel for data; report it with `dmesg` and the kernel's version",
        )
    return unknown(
        "a test key encrypts and reads back; whether it is AES could not be compared",
        "build the kernel with CONFIG_CRYPTO_USER_API_SKCIPHER",
    )


def _through_blob(device: Path, plain: SecretBytes) -> SecretBytes:
    """Have the CAAM seal the bytes, and return the tagged key from that blob.

    Raises: CaamError; BlobRejectedError.
    """
    return caam.import_blob(device, caam.create_blob(device, "ecb", plain))


def _write(node: str, at: Sectors, text: bytes) -> None:
    """Write the text to the device, not only to its cache. Raises: OSError."""
    file = os.open(node, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(file, text, at * SECTOR_BYTES)
        os.fsync(file)
    finally:
        os.close(file)


def _read(node: str, at: Sectors, length: int) -> bytes:
    """Read from the device, not from its cache. Raises: OSError."""
    file = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(file, _BLKFLSBUF)
        return os.pread(file, length, at * SECTOR_BYTES)
    finally:
        os.close(file)


def _in_software(key: SecretBytes, text: bytes, at: Sectors) -> tuple[str, bytes] | None:
    """Encrypt sectors from `at` on; return driver and ciphertext, or None without a driver.

    Each sector's IV is its number in 32 bits, little endian, padded with zeros (dm-crypt.rst).
    """
    for driver in _SOFTWARE:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as transform,
        ):
            transform.bind(("skcipher", driver))
            transform.setsockopt(socket.SOL_ALG, socket.ALG_SET_KEY, key.buffer)
            sectors = range(len(text) // SECTOR_BYTES)
            return driver, b"".join(
                _encrypted(transform, text[n * SECTOR_BYTES :][:SECTOR_BYTES], at + n)
                for n in sectors
            )
    return None


def _encrypted(transform: socket.socket, sector: bytes, number: int) -> bytes:
    job, _ = transform.accept()
    with job:
        iv = struct.pack("<I12x", number)
        job.sendmsg_afalg([sector], op=socket.ALG_OP_ENCRYPT, iv=iv)
        return job.recv(len(sector))

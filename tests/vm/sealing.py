"""Blobs of mainline's kernels, made on the host as the simulated CAAM and the kernel make them.

With a key that the host knows, it can make a medium too. The CAAM's part is caam_sim/seal.c. A
key under a master follows security/keys/encrypted-keys/encrypted.c in the kernel.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM

_MODIFIER: Final = b"SECURE_KEY".ljust(16, b"\0")
"""Key modifier of trusted_caam.c."""
_MEMORY: Final = 1 << 31


def trusted_blob(key: bytes, otpmk: str) -> bytes:
    """Seal the key for the chip with this master key, in hex as `keyctl pipe` prints it."""
    kek = hashlib.sha256(bytes.fromhex(otpmk) + _MODIFIER + struct.pack("<I", _MEMORY)).digest()
    blob_key = os.urandom(32)
    wrap = Cipher(algorithms.AES(kek), modes.ECB()).encryptor()
    about = struct.pack("<II", _MEMORY, len(key))
    sealed = AESCCM(blob_key, tag_length=16).encrypt(bytes(13), key, about)
    return (wrap.update(blob_key) + sealed).hex().encode()


def encrypted_blob(key: bytes, master: bytes, name: str) -> bytes:
    """Seal the key under the trusted key with this name, as `keyctl pipe` prints it."""
    iv = os.urandom(16)
    encrypt = Cipher(algorithms.AES(_derived(b"ENC_KEY", master)), modes.CBC(iv)).encryptor()
    sealed = iv + b"\0" + encrypt.update(key.ljust((len(key) + 15) // 16 * 16, b"\0"))
    fields = [b"default", f"trusted:{name}".encode(), str(len(key)).encode()]
    record = b"\0".join([*fields, sealed])
    mac = hmac.digest(_derived(b"AUTH_KEY", master), record, "sha256")
    return b" ".join([*fields, (sealed + mac).hex().encode()])


def _derived(purpose: bytes, master: bytes) -> bytes:
    length = max(len(b"AUTH_KEY") + 1 + len(master), 32)
    return hashlib.sha256((purpose + b"\0" + master).ljust(length, b"\0")).digest()

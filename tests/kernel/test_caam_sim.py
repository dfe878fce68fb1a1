"""The simulated CAAM does what the hardware and NXP's kernel do. Runs in the guest, as root."""

from __future__ import annotations

import errno
import os
import random
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from witness import (
    BLOB_ROOM,
    CREATE,
    FOLDER,
    IMPORT,
    KEYGEN,
    PARAMETERS,
    UNTOUCHED,
    Answer,
    Board,
    Command,
    Medium,
    algorithm,
    attempt,
    create,
    crypt,
    import_blob,
    ioctl,
    kernel_log,
    left_behind,
    logon_key,
    loop_medium,
    read,
    run,
    write,
    written_text,
)

TAG = struct.Struct("=5I")
MAGIC = 0x5461674F
TYPES = {"ecb": 1, "ccm": 9}
FOREIGN = "0f" * 32
"""The OTPMK of another board."""
AES_BYTES = (16, 24, 32)
CBC, ECB = "tk(cbc(aes))", "tk(ecb(aes))"
DM_CBC = f"capi:{CBC}-plain"
PLAIN = random.Random(1).randbytes(64 << 10)
NOWHERE = 0x10
"""A page that no process has mapped."""
KERNEL_MEMORY = 0xFFFF_8880_0000_0000

both_coverings = pytest.mark.parametrize("enc", ["ecb", "ccm"])


@pytest.fixture(autouse=True)
def board() -> Iterator[Board]:
    """The chip, given back as it was; a test that leaves something behind fails."""
    before = left_behind()
    board = Board()
    try:
        yield board
    finally:
        board.restore()
    # A loop device that udev looks into is detached when udev closes it (losetup(8)).
    deadline = time.monotonic() + 10
    while left_behind() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind() == before


@pytest.fixture
def medium() -> Iterator[Medium]:
    """A medium of zeros."""
    with loop_medium(8 << 20) as made:
        yield made


@pytest.fixture
def keys() -> Iterator[Path]:
    """The folder of caam-keygen's files, without what the test put there."""
    there = set(FOLDER.iterdir()) if FOLDER.exists() else None
    yield FOLDER
    for file in set(FOLDER.iterdir()) - (there or set()) if FOLDER.exists() else ():
        file.unlink()
    if there is None and FOLDER.exists():
        FOLDER.rmdir()


def text_key(length: int) -> str:
    """A key of that many bytes that can be given as a text."""
    return "".join(chr(ord("0") + n % 75) for n in range(length))


def flipped(text: bytes, bit: int) -> bytes:
    """The bytes with one bit the other way."""
    changed = bytearray(text)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def key_bytes(enc: str, n: int) -> int:
    """How long a black key is, without its tag."""
    return -(-n // 8) * 8 + 12 if enc == "ccm" else -(-n // 16) * 16


# keygen: sizes and forms


@pytest.mark.parametrize(
    ("enc", "size", "key_file", "blob_file"),
    [("ecb", 16, 36, 96), ("ecb", 32, 52, 112), ("ccm", 32, 64, 112)],
)
def test_key_and_blob_files_have_the_sizes_known_from_boards(enc, size, key_file, blob_file):
    made = create(enc, "-s", str(size))
    assert (len(made.key), len(made.blob)) == (key_file, blob_file)


@both_coverings
@pytest.mark.parametrize("mode", ["-s", "-t"])
def test_every_key_size_from_16_to_64_has_a_tagged_key_and_a_tagged_blob(enc, mode):
    for n in range(16, 65):
        made = create(enc, mode, str(n) if mode == "-s" else text_key(n))
        sealed = -(-n // 8) * 8 + 12 + 48
        assert TAG.unpack_from(made.key) == (MAGIC, 0, TYPES[enc], n, key_bytes(enc, n))
        assert len(made.key) == TAG.size + key_bytes(enc, n)
        assert TAG.unpack_from(made.blob) == (MAGIC, 0, TYPES[enc], n, sealed)
        assert len(made.blob) == TAG.size + sealed
        assert len(import_blob(made.blob).key) == len(made.key)


def test_the_tag_starts_with_its_magic_as_it_lies_on_disk():
    assert create().key[:4] == create().blob[:4] == bytes.fromhex("4f 67 61 54")


def test_random_keys_differ():
    first, second = create(), create()
    assert first.key != second.key
    assert first.blob[TAG.size :] != second.blob[TAG.size :]


def test_one_text_gives_one_ecb_key_within_a_boot_but_never_the_same_blob_or_ccm_key():
    (first, second), (ccm, again) = (
        [create(enc, "-t", text_key(16)) for _ in range(2)] for enc in ("ecb", "ccm")
    )
    assert first.key == second.key == import_blob(first.blob).key
    assert ccm.key != again.key
    assert len({made.blob for made in (first, second, ccm, again)}) == 4


def test_neither_file_holds_the_key_in_the_clear():
    for enc in TYPES:
        made = create(enc, "-t", "sixteen byte key")
        assert b"sixteen" not in made.key + made.blob


def test_a_text_key_ends_at_its_first_nul():
    made = create("ecb", "-t", b"sixteen byte key\0and more")
    assert made.key == create("ecb", "-t", "sixteen byte key").key


def test_the_device_is_for_root_alone():
    status = os.stat(KEYGEN)
    assert stat.S_ISCHR(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600


# keygen: what a blob is bound to


@both_coverings
@pytest.mark.parametrize("size", [16, 20, 64])
def test_a_bit_flipped_anywhere_in_a_blob_is_refused(enc, size):
    """Of the tag header too: its fields must agree with each other, and those that still would
    (another covering, a length that rounds up to the same) are under the MAC."""
    blob = create(enc, "-s", str(size)).blob
    for bit in range(8 * len(blob)):
        answer = import_blob(flipped(blob, bit))
        in_tag = bit < 8 * TAG.size
        assert answer.errno in ({errno.EINVAL, errno.EBADMSG} if in_tag else {errno.EBADMSG}), bit
        assert set(answer.key_buffer) == {UNTOUCHED}, bit
    assert import_blob(blob).errno == 0


def test_a_blob_of_any_other_length_is_refused():
    blob = create("ccm", "-s", "64").blob
    assert len(blob) == BLOB_ROOM
    for length in range(1, len(blob)):
        assert import_blob(blob[:length]).errno == errno.EINVAL, length
    assert import_blob(blob + b"\0").errno == errno.EINVAL
    assert import_blob(create().blob + b"\0").errno == errno.EINVAL


@both_coverings
def test_a_blob_of_another_board_is_refused(board, enc):
    blob = create(enc).blob
    board.cold_boot(FOREIGN)
    assert import_blob(blob).errno == errno.EBADMSG
    board.cold_boot()
    assert import_blob(blob).errno == 0


def test_blobs_of_open_parts_open_on_each_other_and_on_no_closed_one(board):
    closed = create().blob
    board.cold_boot(secure=False)
    assert import_blob(closed).errno == errno.EBADMSG
    made_open = create("ecb", "-t", "sixteen byte key").blob
    board.cold_boot(FOREIGN, secure=False)
    assert import_blob(made_open).key == create("ecb", "-t", "sixteen byte key").key
    for otpmk in (board.otpmk, FOREIGN):
        board.cold_boot(otpmk)
        assert import_blob(made_open).errno == errno.EBADMSG


@pytest.mark.parametrize("secure", ["1", "0"])
@pytest.mark.parametrize(
    "otpmk", ["a1" * 31, "a1" * 31 + "a", "a1" * 33, "g1" * 32, "a1" * 31 + " a"]
)
def test_an_otpmk_that_is_not_64_hex_digits_is_refused(board, otpmk, secure):
    board.power_off()
    assert attempt("modprobe", "caam_sim", f"otpmk={otpmk}", f"secure={secure}").returncode != 0
    assert not PARAMETERS.exists()


def test_a_closed_part_needs_an_otpmk_and_an_open_one_does_not(board):
    board.power_off()
    assert attempt("modprobe", "caam_sim").returncode != 0
    run("modprobe", "caam_sim", "secure=0")
    assert create().errno == 0


# keygen: errors


@pytest.mark.parametrize(
    ("arguments", "fields", "says"),
    [
        (("xts", "-s", "16"), {}, "ecb or ccm"),
        (("", "-s", "16"), {}, "ecb or ccm"),
        (("ecbecbecb", "-s", "16"), {}, "ecb or ccm"),
        (("ecb", "-s", "16"), {"key_enc_len": 3}, "ecb or ccm"),
        (("ecb", "-h", "16"), {}, "-s or -t"),
        (("ecb", "", "16"), {}, "-s or -t"),
        (("ecb", "-ssssssss", "16"), {}, "-s or -t"),
        (("ecb", "-s", "16"), {"key_mode_len": 2}, "-s or -t"),
        (("ecb", "-s", "0"), {}, "16 to 64"),
        (("ecb", "-s", "15"), {}, "16 to 64"),
        (("ccm", "-s", "65"), {}, "16 to 64"),
        (("ecb", "-s", "-16"), {}, "number"),
        (("ecb", "-s", "99999999999999999999"), {}, "number"),
        (("ecb", "-s", "sixteen"), {}, "number"),
        (("ecb", "-t", text_key(15)), {}, "16 to 64"),
        (("ccm", "-t", text_key(65)), {}, "16 to 64"),
        (("ecb", "-t", text_key(65535)), {}, "16 to 64"),
    ],
)  # fmt: skip
def test_create_says_in_the_blob_buffer_which_argument_is_wrong(arguments, fields, says):
    answer = create(*arguments, **fields)
    assert answer.errno == errno.EINVAL
    assert says in answer.text
    assert set(answer.key_buffer) == {UNTOUCHED}


@pytest.mark.parametrize("pointer", [0, NOWHERE, KERNEL_MEMORY])
@pytest.mark.parametrize("field", ["key_enc", "key_mode", "key_value", "black_key", "blob"])
def test_create_with_a_bad_pointer_is_efault(field, pointer):
    answer = create(**{field: pointer})
    assert answer.errno == errno.EFAULT
    assert bool(answer.text) is (field in {"key_enc", "key_mode", "key_value"})


@pytest.mark.parametrize("field", ["key_enc_len", "key_mode_len", "key_value_len"])
def test_create_with_an_empty_argument_is_efault(field):
    assert create(**{field: 0}).errno == errno.EFAULT


def test_a_text_that_cannot_be_delivered_does_not_change_the_error():
    assert create("xts", blob=NOWHERE).errno == errno.EINVAL


@pytest.mark.parametrize("room", [0, 1, 2, 10])
def test_a_text_is_cut_to_the_room_that_the_blob_has(room):
    answer = create("xts", blob_room=room)
    said = create("xts").text.encode()
    expected = said[: room - 1] + b"\0" if room > 1 else b""
    assert answer.errno == errno.EINVAL
    assert answer.blob_buffer == expected.ljust(256, bytes([UNTOUCHED]))


@pytest.mark.parametrize("room", [0, 1, 35])
def test_too_little_room_for_the_key_is_einval_with_the_length_it_needs(room):
    answer = create(key_room=room)
    assert (answer.errno, answer.key_len) == (errno.EINVAL, 36)
    assert "black key" in answer.text
    assert set(answer.key_buffer) == {UNTOUCHED}


@pytest.mark.parametrize("room", [0, 1, 95])
def test_too_little_room_for_the_blob_is_einval_with_the_length_it_needs(room):
    answer = create(blob_room=room)
    assert (answer.errno, answer.blob_len) == (errno.EINVAL, 96)
    assert set(answer.blob_buffer[room:]) == {UNTOUCHED}


@pytest.mark.parametrize("room", [0, 1, 35])
def test_too_little_room_in_an_import_is_einval_and_costs_the_caller_its_blob(room):
    blob = create().blob
    answer = import_blob(blob, key_room=room)
    assert (answer.errno, answer.key_len) == (errno.EINVAL, 36)
    assert set(answer.key_buffer) == {UNTOUCHED}
    assert "black key" in answer.text
    assert import_blob(blob, key_room=answer.key_len).errno == 0


def test_lengths_that_come_back_are_those_of_what_was_written():
    answer = create("ecb", "-s", "16", key_room=200, blob_room=200)
    assert (answer.key_len, answer.blob_len) == (36, 96)
    assert set(answer.key_buffer[36:]) == set(answer.blob_buffer[96:]) == {UNTOUCHED}


@pytest.mark.parametrize("fields", [{"blob": 0}, {"blob": NOWHERE}, {"blob_len": 0}])
def test_import_says_in_the_key_buffer_that_it_cannot_read_the_blob(fields):
    answer = import_blob(create().blob, **fields)
    assert answer.errno == errno.EFAULT
    assert "blob" in written_text(answer.key_buffer)


@pytest.mark.parametrize("pointer", [0, NOWHERE, KERNEL_MEMORY])
def test_import_to_a_bad_pointer_is_efault(pointer):
    blob = create().blob
    assert import_blob(blob, black_key=pointer).errno == errno.EFAULT
    assert import_blob(blob, black_key=pointer, blob=NOWHERE).errno == errno.EFAULT


@pytest.mark.parametrize(
    ("bit", "number", "says"),
    [(0, errno.EINVAL, "not a tagged blob"), (8 * TAG.size, errno.EBADMSG, "blob refused")],
)
def test_what_is_wrong_with_a_blob_only_the_kernel_log_says(board, bit, number, says):
    board.cold_boot()  # the module says no more than ten lines in five seconds, from its loading on
    broken = flipped(create().blob, bit)
    with kernel_log() as lines:
        answer = import_blob(broken)
    assert answer.errno == number
    assert [line for line in lines if says in line]
    assert set(answer.key_buffer) == {UNTOUCHED}
    assert answer.blob_buffer[: len(broken)] == broken


def test_an_unknown_ioctl_is_enotty_and_a_bad_struct_efault():
    for request in (0xC0384B02, 0xC0304B00, 0x4B00):
        assert ioctl(request, Command()) == errno.ENOTTY
    for request in (CREATE, IMPORT):
        assert ioctl(request, NOWHERE) == errno.EFAULT


# tagged keys in ciphers


@pytest.mark.parametrize(("name", "driver"), [(CBC, "tk-cbc-aes-caam"), (ECB, "tk-ecb-aes-caam")])
def test_the_ciphers_are_known_to_the_kernel_by_their_names_on_boards(name, driver):
    entries = [
        dict(tuple(word.strip() for word in line.split(":", 1)) for line in entry.splitlines())
        for entry in Path("/proc/crypto").read_text().split("\n\n")
        if entry.strip()
    ]
    (entry,) = [entry for entry in entries if entry["driver"] == driver]
    assert entry["name"] == name
    assert entry["priority"] == "3000"
    assert entry["min keysize"] == "36"
    assert entry["ivsize"] == ("16" if name == CBC else "0")


@both_coverings
@pytest.mark.parametrize("mode", ["cbc", "ecb"])
def test_a_tagged_key_encrypts_as_the_key_itself_does(enc, mode):
    iv = bytes(range(16)) if mode == "cbc" else b""
    for size in AES_BYTES:
        key = text_key(size)
        tagged = create(enc, "-t", key).key
        expected = crypt(f"{mode}(aes)", key.encode(), PLAIN[:4096], iv=iv)
        assert crypt(f"tk({mode}(aes))", tagged, PLAIN[:4096], iv=iv) == expected
        assert crypt(f"tk({mode}(aes))", tagged, expected, iv=iv, decrypt=True) == PLAIN[:4096]


@both_coverings
@pytest.mark.parametrize("cipher", [CBC, ECB])
def test_a_black_key_of_a_size_that_aes_does_not_have_is_refused(enc, cipher):
    for size in range(16, 65):
        tagged = create(enc, "-s", str(size)).key
        try:
            with algorithm(cipher, tagged):
                accepted = True
        except OSError as error:
            assert error.errno == errno.EINVAL
            accepted = False
        assert accepted is (size in AES_BYTES), size


@both_coverings
@pytest.mark.parametrize("size", AES_BYTES)
def test_a_bit_flipped_in_the_tag_of_a_black_key_is_refused(enc, size):
    tagged = create(enc, "-s", str(size)).key
    for bit in range(8 * TAG.size):
        with pytest.raises(OSError, match="Invalid argument"), algorithm(CBC, flipped(tagged, bit)):
            pass


def test_a_key_that_is_not_as_long_as_its_tag_says_is_refused():
    for tagged in (create("ecb", "-s", "32").key, create("ccm", "-s", "32").key):
        for wrong in (tagged[:-1], tagged + b"\0", tagged[:16], tagged[TAG.size :]):
            with pytest.raises(OSError, match="Invalid argument"), algorithm(CBC, wrong):
                pass


def test_a_damaged_ccm_key_is_taken_and_fails_at_its_first_use():
    tagged = create("ccm").key
    for bit in range(8 * TAG.size, 8 * len(tagged)):
        with pytest.raises(OSError) as refused:
            crypt(CBC, flipped(tagged, bit), bytes(16), iv=bytes(16))
        assert refused.value.errno == errno.EIO


def test_a_damaged_ecb_key_is_taken_and_is_another_key():
    tagged = create("ecb").key
    right = crypt(CBC, tagged, bytes(16), iv=bytes(16))
    for bit in range(8 * TAG.size, 8 * len(tagged)):
        assert crypt(CBC, flipped(tagged, bit), bytes(16), iv=bytes(16)) != right


def test_a_transform_can_be_given_a_good_key_after_a_refused_one(board):
    stale, blob = create("ccm").key, create("ccm").blob
    board.cold_boot()
    with algorithm(CBC, stale) as transform:
        good = import_blob(blob).key
        transform.setsockopt(socket.SOL_ALG, socket.ALG_SET_KEY, good)
        job, _ = transform.accept()
        with job:
            job.sendmsg_afalg([bytes(16)], op=socket.ALG_OP_ENCRYPT, iv=bytes(16))
            assert job.recv(16) == crypt(CBC, good, bytes(16), iv=bytes(16))


# tagged keys in dm-crypt


@both_coverings
@pytest.mark.parametrize("size", AES_BYTES)
def test_dm_crypt_writes_with_a_tagged_key_what_aes_cbc_plain_writes(medium, enc, size):
    key = text_key(size)
    with (
        logon_key("witness:", create(enc, "-t", key).key) as tagged,
        medium.mapped(DM_CBC, tagged) as mapping,
    ):
        write(mapping, PLAIN)
    ciphertext = medium.file.read_bytes()
    with medium.mapped("aes-cbc-plain", key.encode().hex()) as mapping:
        assert read(mapping, len(PLAIN)) == PLAIN
    medium.file.write_bytes(bytes(len(ciphertext)))
    with medium.mapped("aes-cbc-plain", key.encode().hex()) as mapping:
        write(mapping, PLAIN)
    assert medium.file.read_bytes() == ciphertext
    assert ciphertext[: len(PLAIN)] != PLAIN


def test_dm_crypt_takes_the_ecb_cipher_too(medium):
    key = text_key(32)
    with (
        logon_key("witness:", create("ecb", "-t", key).key) as tagged,
        medium.mapped(f"capi:{ECB}", tagged) as mapping,
    ):
        write(mapping, PLAIN)
    assert medium.file.read_bytes()[:4096] == crypt("ecb(aes)", key.encode(), PLAIN[:4096])


def test_an_ecb_key_of_an_earlier_boot_maps_without_an_error_and_gives_noise(board, medium):
    made = create("ecb", "-s", "16")
    with logon_key("witness:", made.key) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        write(mapping, PLAIN)
    board.cold_boot()
    with logon_key("witness:", made.key) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        noise = read(mapping, len(PLAIN))
    assert not any(noise[at : at + 16] == PLAIN[at : at + 16] for at in range(0, len(PLAIN), 16))
    fresh = import_blob(made.blob).key
    with logon_key("witness:", fresh) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        assert read(mapping, len(PLAIN)) == PLAIN


def test_a_ccm_key_of_an_earlier_boot_maps_and_every_read_fails_with_eio(board, medium):
    made = create("ccm", "-s", "32")
    with logon_key("witness:", made.key) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        write(mapping, PLAIN)
    board.cold_boot()
    with (
        kernel_log() as lines,
        logon_key("witness:", made.key) as tagged,
        medium.mapped(DM_CBC, tagged) as mapping,
    ):
        with pytest.raises(OSError) as refused:
            read(mapping, 512)
        assert refused.value.errno == errno.EIO
    assert [line for line in lines if "job failed: ICV" in line]
    fresh = import_blob(made.blob).key
    with logon_key("witness:", fresh) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        assert read(mapping, len(PLAIN)) == PLAIN


def test_a_live_mapping_under_an_ecb_key_reads_and_writes_noise_in_a_new_session(board, medium):
    made = create("ecb", "-s", "16")
    with logon_key("witness:", made.key) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        write(mapping, PLAIN)
        board.new_session()
        run("blockdev", "--flushbufs", mapping)
        noise = read(mapping, 4096)
        write(mapping, PLAIN[:512])
    assert noise != PLAIN[:4096]
    fresh = import_blob(made.blob).key
    with logon_key("witness:", fresh) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        now = read(mapping, len(PLAIN))
    assert now[:512] != PLAIN[:512]
    assert now[4096:] == PLAIN[4096:]


def test_a_live_mapping_under_a_ccm_key_neither_reads_nor_writes_in_a_new_session(board, medium):
    made = create("ccm", "-s", "32")
    with logon_key("witness:", made.key) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        write(mapping, PLAIN)
        board.new_session()
        run("blockdev", "--flushbufs", mapping)
        for act in (lambda: read(mapping, 512), lambda: write(mapping, PLAIN[:512])):
            with pytest.raises(OSError) as refused:
                act()
            assert refused.value.errno == errno.EIO
    fresh = import_blob(made.blob).key
    with logon_key("witness:", fresh) as tagged, medium.mapped(DM_CBC, tagged) as mapping:
        assert read(mapping, len(PLAIN)) == PLAIN


@pytest.mark.parametrize(
    ("cipher", "size", "says"),
    [
        ("aes-cbc-plain", 16, "Invalid argument"),
        ("capi:cbc(aes)-plain", 16, "Invalid argument"),
        (DM_CBC, 20, "Invalid argument"),
        (DM_CBC, 64, "Invalid argument"),
    ],
)
def test_a_mapping_whose_cipher_and_key_do_not_fit_is_refused(medium, cipher, size, says):
    with logon_key("witness:", create("ecb", "-s", str(size)).key) as tagged:
        done = attempt("dmsetup", "create", "witness", "--table", medium.table(cipher, tagged))
    assert done.returncode != 0
    assert says in done.stderr


def test_the_module_cannot_be_unloaded_while_a_mapping_uses_it(medium):
    with (
        logon_key("witness:", create("ecb").key) as tagged,
        medium.mapped(DM_CBC, tagged) as mapping,
    ):
        done = attempt("rmmod", "caam_sim")
        assert done.returncode != 0
        assert "in use" in done.stderr
        write(mapping, PLAIN)
        assert read(mapping, len(PLAIN)) == PLAIN


def test_the_module_cannot_be_unloaded_while_its_device_is_open():
    file = os.open(KEYGEN, os.O_RDWR | os.O_CLOEXEC)
    try:
        assert "in use" in attempt("rmmod", "caam_sim").stderr
    finally:
        os.close(file)


# the board's own program


def test_caam_keygen_writes_key_and_blob_for_root_alone(keys):
    run("caam-keygen", "create", "witness", "ccm", "-s", "32")
    key, blob = keys / "witness", keys / "witness.bb"
    assert (key.stat().st_size, blob.stat().st_size) == (64, 112)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (key, blob)} == {0o600}
    run("caam-keygen", "import", str(blob), "witness-again")
    assert (keys / "witness-again").read_bytes()[: TAG.size] == key.read_bytes()[: TAG.size]
    assert stat.S_IMODE((keys / "witness-again").stat().st_mode) == 0o600


def test_caam_keygen_makes_its_folder(keys):
    aside = FOLDER.with_name("caam-aside")
    if FOLDER.exists():
        FOLDER.rename(aside)
    try:
        run("caam-keygen", "create", "witness", "ecb", "-t", "sixteen byte key")
        assert stat.S_IMODE(FOLDER.stat().st_mode) == 0o700
        assert (FOLDER / "witness").read_bytes() == create("ecb", "-t", "sixteen byte key").key
    finally:
        for file in FOLDER.iterdir():
            file.unlink()
        FOLDER.rmdir()
        if aside.exists():
            aside.rename(FOLDER)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("create", "witness", "xts", "-s", "16"), "ecb or ccm"),
        (("create", "witness", "ecb", "-h", "00"), "-s or -t"),
        (("create", "witness", "ecb", "-s", "15"), "16 to 64"),
        (("create", "witness", "ecb", "-t", ""), "Bad address"),
        (("import", "/nowhere/witness.bb", "witness"), "No such file"),
        (("import", "/proc/self/exe", "witness"), "File too large"),
        (("import", "/etc/hostname", "witness"), "Invalid argument"),
        (("import", "/dev/null", "witness"), "Bad address"),
        (("create",), "usage"),
        ((), "usage"),
    ],
)
def test_caam_keygen_returns_0_whatever_happens_and_says_why(keys, arguments, says):
    done = attempt("caam-keygen", *arguments)
    assert done.returncode == 0
    assert says in done.stderr
    assert not (keys / "witness").exists()


def test_caam_keygen_leaves_a_key_file_alone_when_the_import_fails(board, keys):
    run("caam-keygen", "create", "witness", "ecb", "-s", "16")
    before = (keys / "witness").read_bytes()
    board.cold_boot(FOREIGN)
    done = attempt("caam-keygen", "import", str(keys / "witness.bb"), "witness")
    assert (done.returncode, (keys / "witness").read_bytes()) == (0, before)
    assert "Bad message" in done.stderr


PROCEDURE = """
set -e
map() {
    keyctl padd logon logkey: @s <"/data/caam/$1"
    table="0 $(blockdev --getsz "$DEV") crypt capi:tk(cbc(aes))-plain :36:logon:logkey:"
    dmsetup create witness --table "$table 0 $DEV 0 1 sector_size:512"
}
leave() {
    umount "$MOUNT_POINT"
    dmsetup remove --retry witness
    keyctl clear @s
}
trap 'umount -q "$MOUNT_POINT" || true; dmsetup remove witness 2>/dev/null || true' EXIT
caam-keygen create witness ecb -s 16
map witness
mkfs.ext4 -q -L LABEL /dev/mapper/witness
mount /dev/mapper/witness "$MOUNT_POINT"
echo kept >"$MOUNT_POINT/file"
leave
rmmod caam_sim
modprobe caam_sim "otpmk=$OTPMK"
caam-keygen import /data/caam/witness.bb witness-imported
map witness-imported
mount /dev/mapper/witness "$MOUNT_POINT"
cat "$MOUNT_POINT/file"
leave
"""


def test_the_procedure_of_a_board_works_word_for_word(board, medium, keys, tmp_path):
    board.cold_boot()  # so that it is restored whatever the script leaves
    done = attempt(
        "env", f"DEV={medium.device}", f"MOUNT_POINT={tmp_path}", f"OTPMK={board.otpmk}",
        "keyctl", "session", "-", "bash", "-c", PROCEDURE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "kept"
    assert b"kept" not in medium.file.read_bytes()


def test_an_answer_is_complete():
    """The witness itself: what an ioctl did not write is not taken for an answer."""
    assert Answer(0, 2, 1, b"kk\xee", b"b\xee").key == b"kk"
    assert written_text(bytes([UNTOUCHED]) * 8) == ""

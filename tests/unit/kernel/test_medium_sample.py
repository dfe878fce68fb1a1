"""Two samples of a volume tell another key and another medium from what was written meanwhile."""

from __future__ import annotations

import pytest

from caam_hotplug.kernel.medium_sample import Ciphertexts, Outcome, Sample


def sample(medium: bytes, *pieces: tuple[int, int | None]) -> Sample:
    """Each piece: the digest of the ciphertext, and of the plaintext."""
    return Sample(tuple(p for _, p in pieces), Ciphertexts(medium, tuple(c for c, _ in pieces)))


BEFORE = sample(b"GUID", (1, 10), (2, 20), (3, None))


def test_a_sample_is_the_same_as_itself() -> None:
    assert BEFORE.compared(BEFORE) is Outcome.SAME


@pytest.mark.parametrize("plain", [11, None])
def test_ciphertext_that_gives_another_plaintext_or_none_is_under_another_key(
    plain: int | None,
) -> None:
    after = sample(b"GUID", (1, plain), (2, None), (3, 30))
    assert BEFORE.compared(after) is Outcome.OTHER_KEY


def test_one_piece_that_decrypts_as_before_proves_the_key() -> None:
    after = sample(b"GUID", (1, 11), (2, 20), (3, None))
    assert BEFORE.compared(after) is Outcome.SAME


def test_pieces_that_were_written_prove_nothing() -> None:
    after = sample(b"GUID", (101, 11), (102, 21), (103, 31))
    assert BEFORE.compared(after) is Outcome.UNKNOWN
    after = sample(b"GUID", (101, 11), (2, 21), (103, 31))
    assert BEFORE.compared(after) is Outcome.OTHER_KEY


def test_pieces_that_were_written_while_a_sample_was_taken_prove_nothing() -> None:
    written = Sample((11, 21, None), Ciphertexts(b"GUID", (None, None, 3)))
    for before, after in ((BEFORE, written), (written, BEFORE), (written, written)):
        assert before.compared(after) is Outcome.UNKNOWN


def test_pieces_that_could_not_be_read_before_prove_nothing() -> None:
    before = sample(b"GUID", (1, None), (2, None))
    assert before.compared(sample(b"GUID", (1, 10), (2, 20))) is Outcome.UNKNOWN
    assert before.compared(before) is Outcome.UNKNOWN


def test_another_partition_table_is_another_medium_even_under_the_same_key() -> None:
    assert (
        BEFORE.compared(Sample(BEFORE.plain, Ciphertexts(b"other", BEFORE.cipher.digests)))
        is Outcome.OTHER_MEDIUM
    )


def test_a_volume_too_small_for_a_sample_proves_nothing() -> None:
    assert sample(b"").compared(sample(b"")) is Outcome.UNKNOWN

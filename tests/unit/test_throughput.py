"""What `measure throughput` makes of /proc/crypto, and how it tells its figures."""

from __future__ import annotations

from typing import Any, Final

from measure.throughput.drivers import parsed, software, used
from measure.throughput.report import table
from measure.throughput.rows import COLUMNS

CRYPTO: Final = """\
name         : cbc(aes)
driver       : cbc-aes-caam
module       : caamalg
priority     : 3000
refcnt       : 2
selftest     : passed
internal     : no
type         : skcipher
async        : yes

name         : cbc(aes)
driver       : cbc-aes-ce
module       : aes_ce_blk
priority     : 300
refcnt       : 1
selftest     : passed
internal     : no
type         : skcipher

name         : cbc(aes)
driver       : cbc-aes-neonbs
module       : aes_neon_bs
priority     : 250
refcnt       : 1
selftest     : passed
internal     : yes
type         : skcipher

name         : aes
driver       : aes-generic
module       : kernel
priority     : 100
refcnt       : 1
selftest     : passed
internal     : no
type         : cipher
"""


def test_the_driver_is_the_one_that_has_got_a_user() -> None:
    before = parsed(CRYPTO)
    after = parsed(CRYPTO.replace("300\nrefcnt       : 1", "300\nrefcnt       : 2"))
    assert used(before, after, "cbc(aes)") == "cbc-aes-ce"


def test_a_driver_that_was_loaded_for_it_is_the_one() -> None:
    after = parsed(CRYPTO)
    assert used(after[1:], after, "cbc(aes)") == "cbc-aes-caam"


def test_if_no_user_tells_it_is_the_one_of_the_highest_priority() -> None:
    listed = parsed(CRYPTO)
    assert used(listed, listed, "cbc(aes)") == "cbc-aes-caam"
    assert used(listed, listed, "xts(aes)") == "unknown"


def test_the_reference_is_software_although_the_kernel_prefers_the_caam() -> None:
    listed = parsed(CRYPTO)
    assert software(listed, "cbc(aes)") == "cbc-aes-ce"
    assert software(listed[:1], "cbc(aes)") == "cbc(aes-generic)"


def figure(median: float, ratio: float | None) -> dict[str, Any]:
    return {"median": median, "min": median / 2, "max": median * 2, "ratio": ratio}


def test_the_table_has_medians_spread_and_ratios_and_says_what_failed() -> None:
    key = {"key": "tagged", "cipher": "capi:tk(cbc(aes))-plain", "driver": "tk-cbc-aes-caam"}
    row = {**key, "sector_size": 512, "flags": []}
    report = {
        "date": "2026-11-25T12:00:00+00:00", "kernel": "6.6.23", "machine": "NXP i.MX8MPlus EVK",
        "architecture": "aarch64", "cpus": 4, "governor": "performance", "rounds": 5,
        "size_mib": 32, "in_flight": 4, "reads": 500, "left_out": {"trusted": "none here"},
        "rows": [
            row | {column: figure(123.45, 0.5) for column in COLUMNS},
            row | {"sector_size": 4096, "flags": ["same_cpu_crypt"], "failed": "no such thing"},
        ],
    }  # fmt: skip
    lines = table(report).splitlines()
    assert lines[0] == "2026-11-25, NXP i.MX8MPlus EVK, Linux 6.6.23, 4 CPUs, governor performance"
    assert "left out: trusted: none here" in lines
    assert "tagged: capi:tk(cbc(aes))-plain, by tk-cbc-aes-caam" in lines
    assert lines[-2].split() == ["512", "none", *["123", "(61.7-247)", "x0.50"] * 3]
    assert lines[-1].split() == ["4096", "same_cpu_crypt", "failed:", "no", "such", "thing"]

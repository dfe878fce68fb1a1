"""When the self-test runs, and with which options."""

from __future__ import annotations

from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import KeySource, Rule
from caam_hotplug.doctor import self_test
from caam_hotplug.doctor.board import is_harmless
from caam_hotplug.doctor.result import Status
from unit.doctor.boards import BoardFiles


def test_without_a_caam_there_is_no_self_test(board: BoardFiles) -> None:
    assert board.status(self_test.round_trip) is Status.UNKNOWN


def test_a_trust_source_is_tested_with_the_options_that_rules_agree_on(board: BoardFiles) -> None:
    def agreed(*options: str) -> str | None:
        rules = tuple(Rule(name=f"{n}", key=KeySource(options=o)) for n, o in enumerate(options))
        return board.board(Config(rule=rules)).trust_options()

    assert agreed() == ""
    assert agreed("", "keyhandle=1", "keyhandle=1") == "keyhandle=1"
    assert agreed("keyhandle=1", "keyhandle=2") is None


def test_options_that_change_a_trust_source_or_guess_a_password_are_not_harmless() -> None:
    assert is_harmless("")
    assert is_harmless("keyhandle=0x81000001 hash=sha256")
    assert not is_harmless("keyhandle=0x81000001 blobauth=x")
    assert not is_harmless("keyhandle=0x81000001 pcrlock=16")
    assert not is_harmless("policyhandle=1")

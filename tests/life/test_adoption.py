"""A mapping of an earlier run is adopted if it leads to its medium, and released whatever it is."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings, OnBusy, OnStop, Rule
from caam_hotplug.config.templates import Template
from caam_hotplug.errors import DmError, RequestRefusedError, VolumeBusyError
from caam_hotplug.formats.crypt_table import Crypt
from caam_hotplug.formats.marks import Mark
from caam_hotplug.model import State, Volume, VolumeId
from fakes.bench import Bench
from fakes.kernel import FakeMapping, Fault
from life.test_fault_matrix import ERRNOS, error_of

(RULE,) = BUILT_IN
POINT = "/run/media/cartridge-01"
LOST = "its mapping led elsewhere; it was mounted read-write; what was written last may be lost"
ELSEWHERE = [
    "0 32768 crypt aes-xts-plain64 :36:logon:caam-hotplug:1-1 0 8:1 0",
    "0 32768 crypt capi:tk(cbc(aes))-plain :36:logon:caam-hotplug:1-1 0 8:2 0",
    "0 32768 crypt capi:tk(cbc(aes))-plain :36:logon:caam-hotplug:7-1 0 8:1 0",
    "0 32768 crypt capi:tk(cbc(aes))-plain 00000000000000000000000000000000 0 8:1 0",
    "0 32768 linear 8:1 0",
    "0 32768 zero",
    "0 32768 error",
]
"""Tables by which no write reaches the medium as its rule encrypts it."""


@pytest.fixture
def machine() -> Iterator[Bench]:
    """Bench that has nothing left at its end."""
    bench = Bench()
    bench.start()
    bench.settle()
    yield bench
    if bench.running:
        bench.stop()
    bench.kernel.close_holders()
    assert bench.kernel.leftovers() == []
    bench.close()


def killed(bench: Bench) -> Volume:
    volume = bench.insert()
    bench.settle()
    bench.kill()
    return volume


def restart(bench: Bench, *rules: Rule) -> None:
    bench.rules = rules or bench.rules
    bench.kernel.steps.clear()
    bench.start()
    bench.settle()


def has_table(bench: Bench, line: str) -> None:
    (mapping,) = bench.kernel.mappings.values()
    mapping.live = line


def resize(bench: Bench, by: int) -> None:
    medium = bench.kernel.media["sda1"]
    medium.volume = replace(medium.volume, size=medium.volume.size + by)


def grown(bench: Bench) -> None:
    resize(bench, 1 << 20)


def grown_past_what_the_cipher_can_count(bench: Bench) -> None:
    resize(bench, 1 << 33)


def nothing(_bench: Bench) -> None:
    """The rule differs, and nothing else."""


OTHER_CRYPT = [
    Crypt(sector_size=4096),
    Crypt(iv_offset=5),
    Crypt(flags=("allow_discards",)),
]


@pytest.mark.parametrize(
    ("change", "crypt"),
    [
        (grown, Crypt()),
        (grown_past_what_the_cipher_can_count, Crypt()),
        *((nothing, crypt) for crypt in OTHER_CRYPT),
    ],
)
def test_a_mapping_in_use_that_leads_to_its_medium_is_adopted_as_it_was_made(
    machine: Bench, change: Callable[[Bench], None], crypt: Crypt
) -> None:
    volume = killed(machine)
    change(machine)
    (before,) = (mapping.live for mapping in machine.kernel.mappings.values())
    restart(machine, replace(RULE, crypt=crypt))
    assert machine.state(volume) is State.MOUNTED
    assert [mapping.live for mapping in machine.kernel.mappings.values()] == [before]
    assert not {"mount", "unmount", "detach", "load_table"} & set(machine.kernel.steps)
    machine.answer("eject", volume)
    assert machine.state(volume) is State.EJECTED


def test_a_mapping_of_a_key_form_that_the_rule_does_not_allow_any_more_is_adopted(
    machine: Bench,
) -> None:
    volume = killed(machine)
    restart(machine, replace(RULE, key=replace(RULE.key, backend="trusted")))
    assert machine.state(volume) is State.MOUNTED


@pytest.mark.parametrize("crypt", OTHER_CRYPT)
def test_a_mapping_that_nobody_uses_is_made_anew_as_the_rule_says_now(
    machine: Bench, crypt: Crypt
) -> None:
    machine.reload_rules(replace(RULE, action=Action.UNLOCK))
    volume = killed(machine)
    (before,) = (mapping.live for mapping in machine.kernel.mappings.values())
    restart(machine, replace(RULE, action=Action.UNLOCK, crypt=crypt))
    assert machine.state(volume) is State.UNLOCKED
    assert [mapping.live for mapping in machine.kernel.mappings.values()] != [before]


def shrunk(bench: Bench) -> None:
    resize(bench, -1)


@pytest.mark.parametrize("verb", ["lock", "eject", "stop"])
@pytest.mark.parametrize(
    ("change", "crypt"),
    [(shrunk, Crypt()), (nothing, Crypt(offset=8)), (nothing, Crypt(offset=1 << 20))],
)
def test_a_mapping_on_its_medium_that_cannot_be_adopted_is_flushed_and_released(
    machine: Bench, change: Callable[[Bench], None], crypt: Crypt, verb: str
) -> None:
    volume = killed(machine)
    change(machine)
    restart(machine, replace(RULE, crypt=crypt))
    assert machine.state(volume) is State.FAILED
    assert len(machine.kernel.mounts) == 1
    if verb == "stop":
        machine.stop()
    else:
        machine.answer(verb, volume)
        assert machine.state(volume) is (State.LOCKED if verb == "lock" else State.EJECTED)
    assert machine.kernel.leftovers() == []
    steps = machine.kernel.steps
    assert steps.index("flush") < steps.index("unmount") < steps.index("remove_mapping")
    assert "load_error_table" not in steps


@pytest.mark.parametrize("verb", ["lock", "eject", "stop"])
@pytest.mark.parametrize("line", ELSEWHERE)
def test_nothing_is_flushed_through_a_table_that_leads_elsewhere_and_the_loss_is_said(
    machine: Bench, line: str, verb: str
) -> None:
    volume = killed(machine)
    has_table(machine, line)
    restart(machine)
    assert machine.state(volume) is State.FAILED
    assert "; it is left alone until that is restored, or `lock` releases it" in machine.reason(
        volume
    )
    assert not {"unmount", "detach", "remove_mapping", "load_error_table"} & set(
        machine.kernel.steps
    )
    if verb == "stop":
        machine.stop()
    elif verb == "lock":
        machine.answer("lock", volume)
        assert machine.reason(volume).endswith(LOST)
    else:
        with pytest.raises(RequestRefusedError, match=r"it is not safe to remove: .*may be lost"):
            machine.answer("eject", volume)
        assert machine.state(volume) is State.LOCKED
    assert machine.kernel.leftovers() == []
    steps = machine.kernel.steps
    assert steps.index("load_error_table") < steps.index("unmount")
    assert "flush" not in steps


def test_a_volume_locked_so_is_unlocked_again_and_flushed_at_its_next_release(
    machine: Bench,
) -> None:
    volume = killed(machine)
    has_table(machine, ELSEWHERE[0])
    restart(machine)
    machine.answer("lock", volume)
    machine.answer("unlock", volume)
    assert machine.state(volume) is State.MOUNTED
    machine.kernel.steps.clear()
    machine.answer("lock", volume)
    assert "flush" in machine.kernel.steps
    assert "load_error_table" not in machine.kernel.steps


def test_a_read_only_mount_over_a_table_that_leads_elsewhere_loses_nothing(machine: Bench) -> None:
    volume = machine.insert(read_only=True)
    machine.settle()
    machine.kill()
    has_table(machine, "0 32768 zero")
    restart(machine)
    machine.answer("eject", volume)
    assert machine.state(volume) is State.EJECTED


@pytest.mark.parametrize("line", ["", ELSEWHERE[0]])
def test_a_mapping_that_cannot_be_adopted_is_not_taken_from_its_users(
    machine: Bench, line: str
) -> None:
    volume = killed(machine)
    if line:
        has_table(machine, line)
    else:
        shrunk(machine)
    machine.kernel.users["cartridge-01"] = 1
    restart(machine)
    with pytest.raises(VolumeBusyError, match="pid 1 "):
        machine.answer("lock", volume)
    assert len(machine.kernel.mounts) == 1
    assert "load_error_table" not in machine.kernel.steps
    machine.kernel.users.clear()
    machine.answer("lock", volume)
    assert machine.state(volume) is State.LOCKED


@pytest.mark.parametrize("line", ["", ELSEWHERE[0]])
def test_a_suspended_mapping_is_released_at_once_only_if_nothing_is_flushed(
    machine: Bench, line: str
) -> None:
    volume = killed(machine)
    (mapping,) = machine.kernel.mappings.values()
    mapping.live, mapping.is_suspended = line or mapping.live, True
    shrunk(machine)
    restart(machine)
    if not line:
        with pytest.raises(RequestRefusedError, match=f"dmsetup resume {mapping.name}` ends"):
            machine.answer("lock", volume)
        mapping.is_suspended = False
    machine.answer("lock", volume)
    assert machine.state(volume) is State.LOCKED


def suspended_without_a_mount(bench: Bench) -> Volume:
    """Have an agent start that finds a suspended mapping, and no mount of it."""
    volume = killed(bench)
    bench.kernel.mounts.clear()
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.suspend(mapping)
    restart(bench)
    return volume


def test_a_suspended_mapping_is_left_alone_until_somebody_resumes_it(machine: Bench) -> None:
    volume = suspended_without_a_mount(machine)
    (mapping,) = machine.kernel.mappings.values()
    words = f"mapping {mapping.name} is suspended, and writes wait"
    assert machine.state(volume) is State.FAILED
    assert machine.reason(volume).startswith(words)
    assert not {"probe", "mount", "remove_mapping", "keep_mapping"} & set(machine.kernel.steps)
    assert machine.look(volume).state is State.FAILED
    with pytest.raises(RequestRefusedError, match=words):
        machine.answer("lock", volume)
    machine.by_hand.resume(mapping)
    machine.settle()
    assert machine.state(volume) is State.MOUNTED
    assert [mapping.name] == [*machine.kernel.mappings]


@pytest.mark.parametrize("turns", range(12))
def test_a_mapping_that_is_resumed_at_any_time_of_its_adoption_is_mounted(
    machine: Bench, turns: int
) -> None:
    volume = killed(machine)
    machine.kernel.mounts.clear()
    (mapping,) = machine.kernel.mappings.values()
    machine.by_hand.suspend(mapping)
    machine.start()
    machine.run_turns(turns)
    machine.by_hand.resume(mapping)
    machine.settle()
    assert machine.state(volume) is State.MOUNTED


@pytest.mark.parametrize("end", ["stop", "pull"])
def test_a_suspended_mapping_that_was_left_alone_is_released_at_its_end(
    machine: Bench, end: str
) -> None:
    suspended_without_a_mount(machine)
    getattr(machine, end)()
    machine.settle()
    assert machine.kernel.leftovers() == []


def test_a_suspended_mapping_with_its_mount_is_adopted_without_a_read_of_it(
    machine: Bench,
) -> None:
    volume = killed(machine)
    (mapping,) = machine.kernel.mappings.values()
    machine.by_hand.suspend(mapping)
    restart(machine)
    assert machine.state(volume) is State.MOUNTED
    assert "plaintexts" not in machine.kernel.steps
    assert "is suspended" in machine.look(volume).reason


@pytest.mark.parametrize("is_mounted", [False, True])
@pytest.mark.parametrize("turns", range(40))
def test_a_table_that_somebody_loads_at_any_time_of_an_adoption_is_found(
    is_mounted: bool, turns: int
) -> None:
    bench = Bench((replace(RULE, action=Action.MOUNT if is_mounted else Action.UNLOCK),))
    bench.start()
    volume = killed(bench)
    bench.start()
    bench.run_turns(turns)
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.load(mapping, "0 32768 linear 8:99 0")
    bench.by_hand.resume(mapping)
    bench.settle()
    is_left_alone = "it is left alone until that is restored" in bench.reason(volume)
    assert is_left_alone or (mapping.live, bench.state(volume)) == ("0 32768 error", State.LOCKED)
    assert "flush" not in bench.kernel.steps
    bench.kill()
    bench.close()


def under_another_name(bench: Bench) -> None:
    bench.rules = (replace(RULE, mount=MountSettings(name=Template("other"))),)


def also_under_another_name(bench: Bench) -> None:
    bench.by_hand.mount(bench.by_hand.mount_at(POINT), "/run/media/other")


def hidden_with_the_mount_root(bench: Bench) -> None:
    bench.by_hand.cover("/run/media")


@pytest.mark.parametrize(
    "is_mounted", [under_another_name, also_under_another_name, hidden_with_the_mount_root]
)
def test_a_suspended_mapping_that_is_not_mounted_just_as_its_rule_says_is_not_flushed_nor_read(
    machine: Bench, is_mounted: Callable[[Bench], None]
) -> None:
    volume = killed(machine)
    (mapping,) = machine.kernel.mappings.values()
    machine.by_hand.suspend(mapping)
    is_mounted(machine)
    machine.kernel.steps.clear()
    machine.start()
    machine.run_turns(200)
    steps, state = set(machine.kernel.steps), machine.state(volume)
    machine.by_hand.resume(mapping)
    machine.settle()
    assert not {"flush", "unmount", "probe"} & steps
    assert state is State.FAILED
    assert machine.state(volume) is State.MOUNTED
    machine.stop()
    machine.kernel.mounts[:] = [m for m in machine.kernel.mounts if m.point != "/run/media"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_its_users_are_ended_if_the_rule_says_so(machine: Bench, number: int) -> None:
    volume = killed(machine)
    shrunk(machine)
    machine.kernel.users["cartridge-01"] = 1
    machine.kernel.fatal_signals = {number}
    restart(machine, replace(RULE, on_busy=OnBusy.SIGNAL))
    machine.answer("lock", volume)
    assert machine.state(volume) is State.LOCKED


def test_its_mount_is_detached_from_its_users_if_the_rule_says_so(machine: Bench) -> None:
    volume = killed(machine)
    shrunk(machine)
    machine.kernel.users["cartridge-01"] = 1
    restart(machine, replace(RULE, on_busy=OnBusy.DETACH))
    with pytest.raises(RequestRefusedError, match="is held open"):
        machine.answer("lock", volume)
    assert machine.kernel.mounts == []


def test_a_table_that_cannot_be_replaced_by_the_error_table_is_left_as_it_is(
    machine: Bench,
) -> None:
    volume = killed(machine)
    has_table(machine, "0 32768 zero")
    restart(machine)
    error = DmError("load", "x", errno.ENOMEM)
    machine.kernel.faults.append(Fault("load_error_table", error, lasting=True))
    with pytest.raises(RequestRefusedError, match="Cannot allocate memory"):
        machine.answer("lock", volume)
    assert len(machine.kernel.mounts) == 1
    machine.kernel.faults.clear()
    machine.answer("lock", volume)
    assert machine.state(volume) is State.LOCKED


@pytest.mark.parametrize("line", [ELSEWHERE[0], "0 32768 zero"])
def test_a_stop_that_keeps_leaves_a_mapping_that_it_could_not_adopt(
    machine: Bench, line: str
) -> None:
    killed(machine)
    has_table(machine, line)
    restart(machine, replace(RULE, on_stop=OnStop.KEEP))
    machine.stop()
    assert len(machine.kernel.mounts) == 1
    restart(machine, RULE)


@pytest.mark.parametrize("uuid", ["CAAM-HOTPLUG-2-1-1", "CAAM-HOTPLUG-1-1-v2", "CAAM-HOTPLUG-x"])
def test_a_mapping_of_a_version_that_is_not_known_is_left_alone_and_said(
    machine: Bench, uuid: str, caplog: pytest.LogCaptureFixture
) -> None:
    volume = killed(machine)
    (mapping,) = machine.kernel.mappings.values()
    ours, mapping.uuid = mapping.uuid, uuid
    restart(machine)
    assert f"is left alone: DM-UUID {uuid}" in caplog.text
    assert machine.state(volume) is State.CONFLICT or machine.state(volume) is State.FAILED
    machine.stop()
    assert len(machine.kernel.mounts) == 1
    assert not {"load_error_table", "unmount", "detach", "remove_mapping"} & set(
        machine.kernel.steps
    )
    mapping.uuid = ours
    restart(machine)
    assert machine.state(volume) is State.MOUNTED


STEPS = [
    "find_mapping", "load_error_table", "holders", "mounts", "watch_writes", "flush", "unmount",
    "detach", "remove_mapping", "unlink_key",
]  # fmt: skip
"""But for the removal of the directory, which is harmless, and left to the next start."""
OTHERS = (errno.EMFILE, errno.EIO)
"""Error numbers of steps that the fault matrix does not have."""


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize(
    ("step", "number"), [(step, number) for step in STEPS for number in ERRNOS.get(step, OTHERS)]
)
@pytest.mark.parametrize("line", ["", ELSEWHERE[0]])
def test_a_release_that_fails_flushes_nothing_elsewhere_and_succeeds_when_it_is_asked_for_again(
    machine: Bench, line: str, step: str, number: int, lasting: bool
) -> None:
    volume = killed(machine)
    if line:
        has_table(machine, line)
    else:
        shrunk(machine)
    restart(machine)
    machine.kernel.faults.append(Fault(step, error_of(step, number), lasting=lasting))
    asked = machine.ask("lock", volume)
    machine.settle()
    assert machine.state(volume) in {State.FAILED, State.LOCKED}
    is_left = bool(machine.kernel.mounts or machine.kernel.mappings)
    assert asked.exception() is not None or not is_left
    machine.kernel.faults.clear()
    machine.answer("lock", volume)
    assert machine.state(volume) is State.LOCKED
    assert machine.kernel.leftovers() == []
    assert not (line and "flush" in machine.kernel.steps)


@pytest.mark.parametrize("step", [step for step in STEPS if step != "mounts"])
@pytest.mark.parametrize("line", ["", ELSEWHERE[0]])
def test_a_release_that_hangs_is_said_and_ends_when_the_call_does(
    machine: Bench, line: str, step: str
) -> None:
    volume = killed(machine)
    if line:
        has_table(machine, line)
    else:
        shrunk(machine)
    restart(machine)
    machine.kernel.faults.append(Fault(step, hangs_s=60.0))
    asked = machine.ask("lock", volume)
    machine.settle()
    machine.wait(60)
    machine.wait(60)
    assert asked.exception() is None
    assert machine.state(volume) is State.LOCKED
    machine.kernel.faults.clear()


def without_entry(volume: Volume) -> Volume:
    """Return the volume as udev reports it while table and kernel give it different sizes."""
    return replace(volume, partlabel=None, partuuid=None, parttype=None)


def mounted_without_entry(bench: Bench, *, on_disk: bool) -> Volume:
    """Mount a medium in use, kill the agent, and hide the entry from udev, or from the disk too."""
    volume = killed(bench)
    bench.kernel.users["cartridge-01"] = 1
    medium = bench.kernel.media["sda1"]
    medium.says = volume if on_disk else without_entry(volume)
    medium.volume = without_entry(volume)
    return volume


def test_a_medium_in_use_is_adopted_though_udev_does_not_find_its_entry(machine: Bench) -> None:
    volume = mounted_without_entry(machine, on_disk=True)
    restart(machine)
    assert machine.state(volume) is State.MOUNTED
    assert machine.entry(volume).volume.partlabel == "cartridge-01"
    assert not {"mount", "unmount", "detach", "load_table"} & set(machine.kernel.steps)


@pytest.mark.parametrize("verb", ["lock", "eject", "stop"])
def test_a_medium_in_use_whose_entry_nobody_finds_is_left_alone_until_somebody_asks(
    machine: Bench, verb: str
) -> None:
    volume = mounted_without_entry(machine, on_disk=False)
    restart(machine)
    assert machine.state(volume) is State.FAILED
    assert "not known without its partlabel, parttype, partuuid" in machine.reason(volume)
    assert len(machine.kernel.mounts) == 1
    if verb != "stop":
        with pytest.raises(RequestRefusedError, match="is in use"):
            machine.answer(verb, volume)
        machine.kernel.users.clear()
        machine.answer(verb, volume)
    else:
        machine.kernel.users.clear()
        machine.stop()
    assert machine.kernel.leftovers() == []


def test_a_medium_whose_entry_is_found_again_is_adopted(machine: Bench) -> None:
    volume = mounted_without_entry(machine, on_disk=False)
    restart(machine)
    machine.appear(volume)
    machine.settle()
    assert machine.state(volume) is State.MOUNTED
    assert not {"mount", "unmount", "detach", "load_table"} & set(machine.kernel.steps)


def test_a_medium_is_left_alone_while_its_disk_cannot_be_read_for_its_entry(
    machine: Bench,
) -> None:
    volume = mounted_without_entry(machine, on_disk=True)
    machine.kernel.fail_next("identify", errno.EIO)
    restart(machine)
    assert machine.state(volume) is State.FAILED
    assert len(machine.kernel.mounts) == 1
    machine.kernel.faults.clear()
    machine.answer("retry", volume)
    assert machine.state(volume) is State.MOUNTED


def test_a_medium_that_udev_does_not_report_is_left_alone_if_a_rule_asks_for_its_facts(
    machine: Bench,
) -> None:
    by_path = replace(RULE, match=replace(RULE.match, path="platform-*"))
    machine.reload_rules(by_path)
    volume = machine.insert(path="platform-1")
    machine.settle()
    machine.kill()
    medium = machine.kernel.media["sda1"]
    medium.volume = replace(volume, path=None, identified=False)
    restart(machine, by_path)
    assert machine.state(volume) is State.FAILED
    assert len(machine.kernel.mounts) == 1
    machine.appear(volume)
    machine.settle()
    assert machine.state(volume) is State.MOUNTED
    assert not {"mount", "unmount", "detach", "load_table"} & set(machine.kernel.steps)


@pytest.mark.parametrize(
    "facts", [{"removable": False}, {"partlabel": "other"}, {"header": "crypto_LUKS"}]
)
def test_a_medium_that_no_rule_can_match_is_released_whatever_is_not_known(
    machine: Bench, facts: dict[str, object]
) -> None:
    only = replace(RULE, match=replace(RULE.match, partlabel="cartridge-*"))
    volume = mounted_without_entry(machine, on_disk=False)
    medium = machine.kernel.media["sda1"]
    medium.volume = replace(medium.volume, **facts)  # type: ignore[arg-type]
    medium.says = replace(medium.on_disk, **facts)  # type: ignore[arg-type]
    restart(machine, only)
    machine.kernel.close_holders()
    machine.settle()
    assert machine.state(volume) is State.IGNORED
    assert machine.kernel.leftovers() == []


# What was being released.

HOW = ["hand_over", "kill", "stop"]


def detached(bench: Bench) -> Volume:
    """Have a volume unmounted by somebody else, while a program has a file open."""
    volume = bench.insert()
    bench.settle()
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount("/run/media/cartridge-01", lazily=True)
    bench.settle()
    return volume


def locked_in_use(bench: Bench) -> Volume:
    """Have a volume locked, while a program has a file open."""
    bench.reload_rules(replace(RULE, on_busy=OnBusy.DETACH))
    volume = bench.insert()
    bench.settle()
    bench.kernel.users["cartridge-01"] = 1
    with pytest.raises(RequestRefusedError, match="is held open"):
        bench.answer("lock", volume)
    return volume


RELEASES = {"unmounted by somebody else": detached, "lock asked for by uid 0": locked_in_use}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("words", RELEASES)
def test_a_volume_that_was_being_released_is_not_served_again_by_the_next_run(
    machine: Bench, words: str, how: str
) -> None:
    volume = RELEASES[words](machine)
    for _ in range(2):
        getattr(machine, how)()
        restart(machine)
        assert machine.state(volume) is State.FAILED
        assert machine.reason(volume) == (
            f"{words}; mapping caam-cartridge-01-1-1 is held open: "
            "pid 1 (program) has a file open; it goes when they close it"
        )
        assert "keep_mapping" not in machine.kernel.steps
    machine.appear(replace(volume, serial="another"))
    machine.settle()
    assert machine.kernel.mounts == []
    machine.kernel.close_holders()
    machine.settle()
    assert (machine.state(volume), machine.reason(volume)) == (State.LOCKED, words)
    assert machine.kernel.leftovers() == []


@pytest.mark.parametrize("how", HOW)
def test_a_locked_volume_whose_holder_is_not_found_has_failed_after_a_restart_too(
    machine: Bench, how: str
) -> None:
    machine.kernel.shows_holders = False
    volume = locked_in_use(machine)
    assert machine.state(volume) is State.FAILED
    getattr(machine, how)()
    restart(machine)
    assert machine.state(volume) is State.FAILED
    machine.kernel.close_holders()
    machine.settle()
    assert machine.state(volume) is State.LOCKED


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("words", RELEASES)
def test_a_volume_whose_holders_have_closed_it_between_two_runs_is_locked(
    machine: Bench, words: str, how: str
) -> None:
    volume = RELEASES[words](machine)
    getattr(machine, how)()
    machine.kernel.close_holders()
    restart(machine)
    assert (machine.state(volume), machine.reason(volume)) == (State.LOCKED, words)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("words", RELEASES)
def test_a_volume_that_was_being_released_is_served_by_the_run_after_an_unlock(
    machine: Bench, words: str, how: str
) -> None:
    volume = RELEASES[words](machine)
    machine.kill()
    restart(machine)
    machine.answer("unlock", volume)
    assert machine.state(volume) is State.MOUNTED
    getattr(machine, how)()
    restart(machine)
    assert machine.state(volume) is State.MOUNTED


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("verb", ["retry", "unlock"])
@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("words", RELEASES)
def test_a_request_at_any_turn_while_what_is_left_is_looked_at_makes_an_attempt(
    machine: Bench, words: str, verb: str, turns: int, *, restarts: bool
) -> None:
    volume = RELEASES[words](machine)
    if restarts:
        machine.kill()
        restart(machine)
    machine.wait(2)
    machine.answer_during_look(verb, volume, turns)
    assert machine.state(volume) is State.MOUNTED


@pytest.mark.parametrize("turns", range(30))
@pytest.mark.parametrize("words", RELEASES)
def test_an_unlock_at_any_turn_after_a_restart_makes_an_attempt(
    machine: Bench, words: str, turns: int
) -> None:
    volume = RELEASES[words](machine)
    machine.kill()
    machine.answer_at_start("unlock", volume, turns)
    assert machine.state(volume) is State.MOUNTED


@pytest.mark.parametrize("turns", range(30))
@pytest.mark.parametrize("verb", ["lock", "eject"])
@pytest.mark.parametrize("words", RELEASES)
def test_a_lock_at_any_turn_after_a_restart_does_not_end_the_release_that_goes_on(
    machine: Bench, words: str, verb: str, turns: int
) -> None:
    volume = RELEASES[words](machine)
    machine.kill()
    with pytest.raises(RequestRefusedError):
        machine.answer_at_start(verb, volume, turns)
    machine.settle()
    assert machine.state(volume) is State.FAILED
    machine.appear(replace(volume, serial="another"))
    machine.settle()
    assert machine.kernel.mounts == []
    machine.kernel.close_holders()
    machine.settle()
    assert machine.state(volume) is State.LOCKED
    machine.answer("lock", volume)


@pytest.mark.parametrize("turns", range(40))
@pytest.mark.parametrize("end", ["kill", "hand_over"])
def test_a_run_that_ends_while_somebody_elses_unmount_is_followed_is_not_undone(
    machine: Bench, turns: int, end: str
) -> None:
    volume = machine.insert()
    machine.settle()
    machine.kernel.users["cartridge-01"] = 1
    machine.by_hand.umount("/run/media/cartridge-01", lazily=True)
    machine.run_turns(turns + 2)  # the event has been read by then
    getattr(machine, end)()
    restart(machine)
    assert machine.state(volume) is State.FAILED
    assert machine.kernel.mounts == []


@pytest.mark.parametrize("turns", range(60))
def test_a_run_that_is_killed_at_any_turn_of_a_lock_undoes_no_unmount(
    machine: Bench, turns: int
) -> None:
    machine.reload_rules(replace(RULE, on_busy=OnBusy.DETACH))
    volume = machine.insert()
    machine.settle()
    machine.kernel.users["cartridge-01"] = 1
    machine.ask("lock", volume)
    machine.run_turns(turns)
    is_unmounted = machine.kernel.mounts == []
    machine.kill()
    restart(machine)
    assert machine.state(volume) is (State.FAILED if is_unmounted else State.MOUNTED)
    assert machine.kernel.marks.get(volume.id, "") != "" or not is_unmounted


def test_a_lock_that_is_refused_leaves_nothing_for_the_next_run(machine: Bench) -> None:
    volume = machine.insert()
    machine.settle()
    machine.kernel.users["cartridge-01"] = 1
    with pytest.raises(VolumeBusyError):
        machine.answer("lock", volume)
    assert machine.kernel.marks[volume.id] == ""
    machine.by_hand.umount(POINT, lazily=True)
    machine.settle()
    assert machine.reason(volume).startswith("unmounted by somebody else")


def test_a_run_that_is_killed_while_it_looks_for_who_is_in_the_way_of_a_lock_undoes_nothing(
    machine: Bench,
) -> None:
    machine.reload_rules(replace(RULE, action=Action.UNLOCK))
    volume = machine.insert()
    machine.settle()
    (mapping,) = machine.kernel.mappings.values()
    mapping.openers = 1
    machine.kernel.faults.append(Fault("holders", hangs_s=1))
    machine.ask("lock", volume)
    machine.settle()
    machine.kill()
    machine.kernel.faults.clear()
    restart(machine)
    assert machine.state(volume) is State.UNLOCKED
    assert not mapping.is_removed_at_last_close
    mapping.openers = 0


def test_a_volume_that_an_older_agent_has_served_since_its_release_stays_mounted(
    machine: Bench,
) -> None:
    volume = detached(machine)
    mark = machine.kernel.marks.pop(volume.id)  # which that agent does not know
    machine.kill()
    restart(machine)
    machine.kill()
    machine.kernel.marks[volume.id] = mark
    restart(machine)
    assert machine.state(volume) is State.MOUNTED
    assert machine.kernel.marks[volume.id] == ""


def test_what_a_holder_may_have_written_since_the_release_is_lost_with_its_medium(
    machine: Bench,
) -> None:
    volume = detached(machine)
    machine.kill()
    restart(machine)
    machine.pull()
    machine.settle()
    assert machine.state(volume) is State.REMOVED_UNSAFELY
    assert all(mapping.key is None for mapping in machine.kernel.mappings.values())


@pytest.mark.parametrize(
    "fault", [Fault("find_mapping", DmError("look", "x", errno.ENOMEM)),
              Fault("remove_mapping", DmError("remove", "x", errno.ENOMEM))]
)  # fmt: skip
def test_a_release_that_fails_is_gone_on_with_and_undone_neither_by_this_run_nor_the_next(
    machine: Bench, fault: Fault
) -> None:
    volume = machine.insert()
    machine.settle()
    machine.kernel.before = fail_once_unmounted(machine, fault)
    machine.by_hand.umount("/run/media/cartridge-01")
    machine.settle()
    machine.appear(replace(volume, serial="another"))
    machine.wait(5)
    assert (machine.state(volume), machine.kernel.mounts) == (State.LOCKED, [])


def fail_once_unmounted(bench: Bench, fault: Fault) -> Callable[[str], None]:
    """Return what has the call fail once, after the agent has noticed the unmount."""

    def before(step: str) -> None:
        if bench.kernel.marks.get(VolumeId(1, 1)) and step == fault.step:
            bench.kernel.before = lambda _: None
            bench.kernel.faults.append(fault)

    return before


def test_a_locked_volume_with_a_live_mapping_is_not_called_locked_before_that_has_gone(
    machine: Bench,
) -> None:
    volume = killed(machine)
    machine.kernel.marks[volume.id] = Mark(volume, State.LOCKED).to_text()
    machine.kernel.users["cartridge-01"] = 1
    restart(machine)
    assert machine.state(volume) is State.FAILED
    assert State.LOCKED not in [state for _, state, _ in machine.states]
    machine.kernel.close_holders()
    machine.settle()
    assert machine.state(volume) is State.LOCKED


def test_a_locked_volume_with_a_mount_is_not_served_by_it_though_a_read_fails_first(
    machine: Bench,
) -> None:
    volume = killed(machine)
    machine.kernel.marks[volume.id] = Mark(volume, State.LOCKED).to_text()
    machine.kernel.faults.append(Fault("find_mapping", DmError("look", "x", errno.ENOMEM)))
    restart(machine)
    machine.appear(replace(volume, serial="another"))
    machine.settle()
    assert (machine.state(volume), machine.kernel.mounts) == (State.LOCKED, [])
    assert machine.kernel.leftovers() == []


def foreign(bench: Bench) -> tuple[Volume, FakeMapping, str]:
    """Start with a mapping that somebody has given another table; return also its first one."""
    volume = killed(bench)
    (mapping,) = bench.kernel.mappings.values()
    before, mapping.live = mapping.live or "", "0 32768 error"
    restart(bench)
    assert "it is left alone until that is restored" in bench.reason(volume)
    return volume, mapping, before


def test_a_mapping_that_is_restored_is_adopted(machine: Bench) -> None:
    volume, mapping, before = foreign(machine)
    key = mapping.key
    machine.by_hand.load(mapping, before)
    machine.by_hand.resume(mapping)
    mapping.key = key
    machine.settle()
    assert machine.state(volume) is State.MOUNTED
    assert list(machine.kernel.mappings.values()) == [mapping]


def test_a_medium_whose_foreign_mapping_somebody_removes_is_served(machine: Bench) -> None:
    volume, mapping, _ = foreign(machine)
    machine.by_hand.umount("/run/media/cartridge-01")
    machine.by_hand.remove(mapping)
    machine.settle()
    assert machine.state(volume) is State.MOUNTED


def test_a_foreign_mapping_that_is_being_removed_is_not_said_to_be_left_alone(
    machine: Bench,
) -> None:
    volume = killed(machine)
    (mapping,) = machine.kernel.mappings.values()
    mapping.live, mapping.is_removed_at_last_close = "0 32768 error", True
    restart(machine)
    assert "it goes when it is closed, or `lock` releases it" in machine.reason(volume)
    machine.by_hand.umount("/run/media/cartridge-01")
    machine.settle()
    assert machine.state(volume) is State.MOUNTED


def test_the_state_of_a_foreign_mapping_is_as_old_as_its_last_read(machine: Bench) -> None:
    volume, _, _ = foreign(machine)
    before = machine.entry(volume).observed_at
    machine.wait(5)
    assert machine.look(volume).observed_at > before

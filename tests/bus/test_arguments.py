"""Anything that D-Bus can carry, as an argument."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import sdbus
from hypothesis import example, given
from hypothesis import strategies as st

from bus.agents import FakeAgent, FakeRegistry, mounted
from bus.conftest import folder_for_all
from bus.private import PrivateBus
from caam_hotplug import names
from caam_hotplug.dbus.connection import Connection
from caam_hotplug.dbus.error_names import ArgumentsError, error_text
from caam_hotplug.dbus.objects import power_off
from caam_hotplug.dbus.service import Service
from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.model import State, VolumeId
from unit.volumes import STICK, volume_ids, volumes

MANAGER = (names.BUS_NAME, names.BUS_PATH, names.BUS_MANAGER)
VOLUME = (names.BUS_NAME, names.bus_path(STICK.id), names.BUS_VOLUME)

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cn"]))
"""What a client may send as a string."""
attackers_texts = st.text(max_size=40)

_basic = st.one_of(
    st.tuples(st.just("b"), st.booleans()),
    st.tuples(st.just("y"), st.integers(0, 255)),
    st.tuples(st.just("i"), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just("t"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("d"), st.floats(allow_nan=False)),
    st.tuples(st.just("s"), texts),
    st.tuples(st.just("o"), st.just("/")),
    st.tuples(st.just("g"), st.sampled_from(["", "a{sv}", "(ii)"])),
)
variants = st.recursive(
    _basic,
    lambda inner: st.one_of(
        st.tuples(st.just("v"), inner),
        st.tuples(st.just("a{sv}"), st.dictionaries(texts, inner, max_size=2)),
        st.tuples(st.just("as"), st.lists(texts, max_size=3)),
        inner.map(lambda of: (f"({of[0]})", (of[1],))),
    ),
    max_leaves=4,
)
options = st.dictionaries(
    st.sampled_from(["power-off", "", "force", "Power-Off"]) | texts, variants
)

Ask = Callable[[Callable[[Connection], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture(scope="module")
def asked() -> Iterator[tuple[Ask, FakeAgent, FakeRegistry]]:
    """Return a function that runs work with a client, on a loop that all examples share."""
    registry = FakeRegistry()
    agent = FakeAgent(registry)
    with (
        folder_for_all() as folder,
        asyncio.Runner() as runner,
        pytest.MonkeyPatch.context() as env,
    ):
        bus = PrivateBus(folder)
        bus.start()
        env.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)

        async def begin() -> tuple[Service, Connection]:
            service = await Service(registry).__aenter__()
            service.accept(agent, agent)
            await service.first_attempt(30)
            mounted(registry)
            return service, Connection()

        async def end(service: Service, client: Connection) -> None:
            client.close()
            await service.__aexit__(None, None, None)

        service, client = runner.run(begin())
        yield (lambda work: runner.run(work(client))), agent, registry
        runner.run(end(service, client))
        bus.stop()


@given(options)
@example({"power-off": ("b", False)})
@example({"power-off": ("v", ("b", True))})
def test_any_options_of_eject_are_accepted_or_refused_by_name(
    asked: tuple[Ask, FakeAgent, FakeRegistry], given_options: dict[str, Any]
) -> None:
    ask, agent, _ = asked
    agent.asked.clear()

    async def eject(client: Connection) -> Any:
        return await client.call(VOLUME, "Eject", "a{sv}", given_options)

    valid = given_options.keys() <= {"power-off"} and all(
        signature == "b" for signature, _ in given_options.values()
    )
    if valid:
        assert ask(eject) == "cartridge: safe to remove"
        assert agent.asked[0][3] is given_options.get("power-off", ("b", True))[1]
    else:
        with pytest.raises(sdbus.DbusInvalidArgsError):
            ask(eject)
        assert agent.asked == []


@given(st.dictionaries(attackers_texts, st.tuples(attackers_texts, st.integers())))
def test_options_are_refused_in_printable_text(found: dict[str, Any]) -> None:
    try:
        assert power_off(found) is bool(found.get("power-off", ("b", True))[1])
    except ArgumentsError as error:
        assert error_text(error).isprintable()


@given(texts)
@example("")
@example("/dev/sdb1\n\x1b[2J")
@example("x" * 100_000)
def test_any_text_may_be_explained(asked: tuple[Ask, FakeAgent, FakeRegistry], device: str) -> None:
    ask, agent, _ = asked
    agent.asked.clear()

    async def explain(client: Connection) -> Any:
        return await client.call(MANAGER, "Explain", "s", device)

    result = ask(explain)
    assert agent.asked == [("explain", device)]
    assert all(line.isprintable() for line in result.split("\n"))


@given(volumes, attackers_texts, st.floats(), st.dictionaries(attackers_texts, st.floats()))
def test_a_volume_with_any_texts_can_be_read(
    asked: tuple[Ask, FakeAgent, FakeRegistry],
    volume: Any,
    text: str,
    since: float,
    steps: dict[str, float],
) -> None:
    ask, _, registry = asked
    path = names.bus_path(volume.id)

    async def read(client: Connection) -> Any:
        for state in (State.FAILED, State.STUCK):
            registry.publish(
                volume, state, text, rule=text, mount_point=text, mapping_node=text,
                mapping_name=text, filesystem=text, since=since, steps=steps,
            )  # fmt: skip
        target = (names.BUS_NAME, path, "org.freedesktop.DBus.Properties")
        try:
            return await client.call(target, "GetAll", "s", names.BUS_VOLUME)
        finally:
            registry.publish(volume, State.GONE)

    result = ask(read)
    assert result["StateReason"] == ("s", shown(text))
    assert result["Label"] == ("s", shown(volume.partlabel or ""))
    assert result["DiskSeq"] == ("t", volume.id.diskseq)
    assert len(result) == 16


@given(volume_ids, volume_ids)
@example(VolumeId(1, 11), VolumeId(11, 1))
def test_every_volume_has_a_valid_path_of_its_own(one: VolumeId, other: VolumeId) -> None:
    assert re.fullmatch(r"/org/caamhotplug1/volumes/[0-9]+_[0-9]+", names.bus_path(one))
    assert (names.bus_path(one) == names.bus_path(other)) == (one == other)


@given(st.lists(attackers_texts, min_size=1).map("\n".join))
def test_the_text_of_any_error_is_printable_lines(words: str) -> None:
    result = error_text(HotplugError(words))
    result.encode()
    assert "\0" not in result
    assert all(line.isprintable() for line in result.split("\n"))

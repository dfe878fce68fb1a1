"""The life of one volume, from arrival to departure: one coroutine, read from top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import (
    BlobMissingError,
    ForeignMappingError,
    HotplugError,
    MountPointOccupiedError,
    ReleaseError,
)
from caam_hotplug.lifecycle.claims import Claims
from caam_hotplug.lifecycle.host import Host
from caam_hotplug.lifecycle.lane import Lane, to_the_end
from caam_hotplug.lifecycle.leave import Leave, LeaveRequestedError, Reason
from caam_hotplug.lifecycle.resources import Wish, active_mapping, mounted
from caam_hotplug.lifecycle.steps import Steps
from caam_hotplug.lifecycle.sweep import release_left_behind
from caam_hotplug.model import State, Volume
from caam_hotplug.rules import Action, Admitted, OnStop, Refused, Rule, decide

log = logging.getLogger(__name__)

Publish = Callable[[Volume, State, str], None]
_LOST: Final = "it was mounted read-write; what was written last may be lost"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all lives share."""

    host: Host
    rules: tuple[Rule, ...]
    new_lane: Callable[[str], Lane]
    dm_lane: Lane
    """The one lane of all mappings."""
    claims: Claims
    publish: Publish


class Life:
    """One volume's life; `attend` is all of it. Synchronization: loop only."""

    def __init__(self, around: Surroundings, volume: Volume, *, inherits: bool = False) -> None:
        """`inherits`: an earlier run of the agent has left a mapping of this volume."""
        self._around = around
        self._host = around.host
        self.volume = volume
        self._inherits = inherits
        self._refuses = False
        self._news = False
        self._state: State | None = None
        self._said = ""
        self.leave = Leave()
        lane = around.new_lane(f"volume {volume.id}")
        self._steps = Steps(self._host, self.leave, lane, around.dm_lane, self._late)

    def update(self, volume: Volume) -> None:
        """The volume was seen again, perhaps with other facts."""
        if volume.identified >= self.volume.identified and volume != self.volume:
            self.volume = volume
            self._news = True
        if self._state in {State.WAITING, State.CONFLICT}:
            self._news = True
        self.leave.stir()

    def stop(self) -> None:
        """The agent stops: the volume is let go, or left mounted if its rule says so."""
        holds = self._inherits or self._state in {State.MOUNTED, State.UNLOCKED}
        match decide(self._around.rules, self.volume):
            case Admitted(rule=Rule(on_stop=OnStop.KEEP)) if holds:
                self.leave.ask(Reason.KEEP)
            case _:
                self.leave.ask(Reason.STOP)

    async def attend(self) -> None:
        """The volume has come and gone, and nothing of it is left that is ours to remove."""
        while not self.leave.asked:
            self._news = False
            await self._serve()
            await self.leave.until(lambda: self._news)
        await self._leave_nothing_inherited()
        # A release that failed has said so; only a medium that is gone overrules it.
        if self._state is State.REMOVED_UNSAFELY or self.leave.keeps:
            return
        if self.leave.gone or self._state is not State.FAILED:
            self._publish(State.GONE)

    async def _serve(self) -> None:
        """As far as the volume gets. The only place where the errors of a volume end."""
        self._refuses = False
        try:
            if not self.volume.identified:
                identify = self._host.identify
                found = await self._steps.call("identify", identify, self.volume)
                if not self.volume.identified:  # udev may have told of it meanwhile, and knows more
                    self.volume = found
            self.leave.check()
            match decide(self._around.rules, self.volume):
                case Refused() as refused:
                    await self._let_be(refused)
                case Admitted() as plan:
                    await self._hold(Wish(self.volume, plan))
        except LeaveRequestedError:
            pass
        except BlobMissingError as error:
            self._publish(State.WAITING, str(error))
        except MountPointOccupiedError as error:
            self._publish(State.CONFLICT, str(error))
        except ReleaseError as error:
            self._inherits = True
            before = error.__cause__ and error.__cause__.__context__
            cause = f"; before that: {before}" if isinstance(before, HotplugError) else ""
            self._publish_released_badly(f"{error}{cause}")
        except (HotplugError, OSError) as error:
            if self.leave.gone or not self._host.is_present(self.volume):
                # A medium that is pulled makes the step at hand fail; that is no fault of its.
                log.warning("%s: pulled meanwhile: %s", self.volume, error)
            else:
                self._refuses = isinstance(error, ForeignMappingError)
                self._publish(State.FAILED, str(error))

    def _publish_released_badly(self, words: str) -> None:
        # Without a medium the volume is not there to be `failed`; the remains are all there is.
        self._publish(State.REMOVED_UNSAFELY if self.leave.gone else State.FAILED, words)

    async def _let_be(self, refused: Refused) -> None:
        if self._inherits:
            log.warning("%s: no rule admits it any more; letting it go", self.volume)
            await self._release_inherited()
        self._publish(State.IGNORED, str(refused))

    async def _release_inherited(self) -> None:
        """Nothing is left of what an earlier run had made. Raises: ReleaseError."""
        self._inherits = False
        if self._state is None:
            self._publish(State.DETACHING, "an earlier run of the agent has left it")
        uuid = names.dm_uuid(self.volume.id)
        unsafe = await to_the_end(release_left_behind, self._steps, uuid)
        if unsafe and self.leave.gone:
            self._publish(State.REMOVED_UNSAFELY, _LOST)

    async def _leave_nothing_inherited(self) -> None:
        """What this life has not come to adopt, or could not let go before, is let go all the same.

        Not so a mapping that does something else than its rule asks for, as long as its medium is
        there: the volume has `failed`, and people decide.
        """
        refused = self._refuses and not self.leave.gone
        if self._inherits and not self.leave.keeps and not refused:
            try:
                await self._release_inherited()
            except ReleaseError as error:
                self._publish_released_badly(str(error))

    async def _hold(self, wish: Wish) -> None:
        name, claims, me = wish.plan.mount_name, self._around.claims, wish.volume.id
        with claims.queued(name, me, self.leave.stir):
            if claims.owner(name) != me:
                point = self._host.mount_root / name
                self._publish(State.CONFLICT, f"{point} belongs to volume {claims.owner(name)}")
                await self.leave.until(lambda: claims.owner(name) == me)
            self.leave.check()
            await self._unlock_and_mount(wish)

    async def _unlock_and_mount(self, wish: Wish) -> None:
        unsafe = False
        async with AsyncExitStack() as held:
            self._publish(State.UNLOCKING, f"with {self._host.blob_directory / wish.plan.blob}")
            mapping = await held.enter_async_context(active_mapping(self._steps, wish))
            if wish.plan.rule.action is Action.UNLOCK:
                self._publish(State.UNLOCKED, f"as {mapping.name}")
            else:
                self._publish(State.MOUNTING, f"from {mapping.node}")
                mount = await held.enter_async_context(mounted(self._steps, wish, mapping))
                unsafe = not mount.read_only
                access = "read-only" if mount.read_only else "read-write"
                self._publish(State.MOUNTED, f"at {mount.point}, {access}")
            await self.leave.until(lambda: False)
            if self.leave.keeps:
                self._inherits = True  # should its medium leave before this life has ended
            else:
                self._publish(State.DETACHING, self.leave.why)
        if unsafe and self.leave.gone:
            self._publish(State.REMOVED_UNSAFELY, _LOST)

    def _publish(self, state: State, reason: str = "") -> None:
        self._state, self._said = state, reason
        self._around.publish(self.volume, state, reason)

    def _late(self, why: str | None) -> None:
        if why is not None:
            self._around.publish(self.volume, State.STUCK, why)
        elif self._state is not None:
            self._around.publish(self.volume, self._state, self._said)

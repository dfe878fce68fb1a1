"""The life of one volume, from arrival to departure: one coroutine, read from top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from caam_hotplug import names
from caam_hotplug.config.match import ON_THE_TABLE
from caam_hotplug.config.rules import (
    Action,
    NeedsUdev,
    NoMatch,
    OnBusy,
    OnStop,
    Plan,
    Rule,
    match_rules,
)
from caam_hotplug.errors import (
    BlobError,
    BlobMissingError,
    BlobRejectedError,
    DeviceLockedError,
    ForeignMappingError,
    HotplugError,
    MasterKeyError,
    MountPointOccupiedError,
    NoFilesystemError,
    ReleaseError,
    RequestRefusedError,
)
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import Mapping, State, Volume
from caam_hotplug.volume.hooks import Units
from caam_hotplug.volume.leftovers import release_leftovers
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.requests import Ask, Request
from caam_hotplug.volume.resources import (
    Wish,
    active_mapping,
    backend_that_made,
    let_go,
    mounted,
    who_uses,
)
from caam_hotplug.volume.status import Publish, VolumeStatus
from caam_hotplug.volume.stop_signal import Reason, StopRequestedError, StopSignal
from caam_hotplug.volume.worker import Worker, to_the_end

log = logging.getLogger(__name__)

_OF_THE_BLOB: Final = (BlobError, BlobRejectedError, MasterKeyError, NoFilesystemError)
_LOST: Final = "it was mounted read-write; what was written last may be lost"


@dataclass(slots=True)
class Context:
    """What all lives share."""

    kernel: Kernel
    rules: tuple[Rule, ...]
    """Those in force; `Supervisor.renew` puts others in their place."""
    new_worker: Callable[[str], Worker]
    dm_worker: Worker
    """The one lane of all mappings."""
    mount_points: MountPoints
    publish: Publish
    units: Units


class VolumeLifecycle:
    """One volume's life; `attend` is all of it. Synchronization: loop only."""

    def __init__(
        self,
        context: Context,
        volume: Volume,
        *,
        inherits: bool = False,
        rests: Rest | None = None,
    ) -> None:
        """`inherits`: an earlier run of the agent has left a mapping of this volume.

        `rests`: it was let go on request, and until another one nothing is done with it.
        """
        self._context = context
        self._kernel = context.kernel
        self._inherits = inherits
        self._refuses = False
        self._blob_is_at_fault = False
        self._news = False
        self._renewal: Reevaluate | None = None
        self._rests: Rest | None = rests
        self._request: Request | None = None
        self._end_is_told = False
        self._plan: Plan | None = None
        """By which it is held; what is said of the volume meanwhile does not change it."""
        self._udev_has_told = volume.identified
        self._tried: Wish | None = None
        """As what it was, or was to be, held last."""
        self._is_broken = False
        self.status = VolumeStatus(volume, context.publish)
        if rests is not None:
            self.status.becomes(rests.state, rests.reason)
        self.stop_signal = StopSignal()
        worker = context.new_worker(f"volume {volume.id}")
        self._operations = Operations(
            self._kernel, self.stop_signal, worker, context.dm_worker, self.status.is_late
        )

    @property
    def volume(self) -> Volume:
        """The volume as it was seen last."""
        return self.status.volume

    def update(self, volume: Volume) -> None:
        """The volume was seen again, perhaps with other facts."""
        before, tells = self.volume, volume.identified
        if before.identified and not tells and (self._plan or not before.awaits_udev):
            # It is told of without udev, and was looked at before.
            volume = replace(before, awaits_udev=volume.awaits_udev)
        is_first_word = tells and not self._udev_has_told
        self._udev_has_told |= tells
        if is_first_word and before.identified:
            # What udev could not read, such as off a bad sector, contradicts nothing.
            read = {fact: getattr(before, fact) for fact in ON_THE_TABLE if not _has(volume, fact)}
            volume = replace(volume, **read)
        if volume != before:
            self.status.volume = volume
            if is_first_word and self._is_confirmed():
                return
            self._news = True
            if is_first_word:
                self._renewal = Reevaluate.BY_UDEV
        self.look_again()

    def _is_confirmed(self) -> bool:
        """Whether what was done before udev told is what is to be done now that it has.

        What has failed and might not have if it had waited is to be done once more.
        """
        if self.status.state is State.FAILED and not self._blob_is_at_fault:
            return False
        plan = match_rules(self._context.rules, self.volume)
        return self._tried is not None and self._goes_on(self._tried, plan)

    def _goes_on(self, wish: Wish, plan: Plan | NoMatch | NeedsUdev) -> bool:
        """Whether the plan asks for what the wish has; then it is by this plan that it is held."""
        if not (isinstance(plan, Plan) and plan.makes_the_same(wish.plan)):
            return False
        if wish.volume.read_only != self.volume.read_only:
            return False
        if self._plan is not None:
            self._plan = plan
        self.status.has(rule=plan.rule.name)
        return True

    def look_again(self) -> None:
        """What it waits for may have come."""
        if self.status.state in {State.WAITING, State.CONFLICT}:
            self._news = True
        self.stop_signal.stir()

    def blob_appeared(self, blob: str | None) -> None:
        """The blob of this file name is there, or any may be: it is looked for again.

        Also if it is being looked for just now, and was perhaps not there yet; or if it was not
        taken, and was perhaps only half written.
        """
        path = None if blob is None else str(self._kernel.blob_directory / blob)
        waits = self.status.state in {State.WAITING, State.UNLOCKING, State.CONFLICT}
        if (waits or self._blob_is_at_fault) and path in {None, self.status.blob}:
            self._news = True
            self.stop_signal.stir()

    @property
    def rests(self) -> Rest | None:
        """As what it was let go on request, if it was."""
        return self._rests

    def renew(self) -> None:
        """Other rules are in force."""
        self._renewal = self._renewal or Reevaluate.BY_RULES
        self.stop_signal.stir()

    def stop(self) -> None:
        """The agent stops: the volume is let go, or left mounted if its rule says so."""
        held = {State.MOUNTED, State.UNLOCKED, State.DETACHING}  # it may be in use, and stay
        holds = self._inherits or (self._plan is not None and self.status.state in held)
        match self._plan or match_rules(self._context.rules, self.volume):
            case Plan(rule=Rule(on_stop=OnStop.KEEP)) if holds:
                self.stop_signal.ask(Reason.KEEP)
            case _:
                self.stop_signal.ask(Reason.STOP)

    async def ask(self, request: Request) -> None:
        """What was asked has been done. Raises: RequestRefusedError."""
        why = self.why_not(request.ask)
        if why is not None:
            said = self._fields("request-refused", request, REASON=why)
            log.warning("%s: %s: refused: %s", self.volume, request.words, why, extra=said)
            raise RequestRefusedError(f"{request.ask.value} {self.volume}: {why}")
        log.info("%s: %s", self.volume, request.words, extra=self._fields("requested", request))
        self._request = request
        self.stop_signal.stir()
        await request.answer

    def _fields(self, event: str, request: Request, **more: str) -> dict[str, Any]:
        asked, by = request.ask.value, request.by
        return fields(event, REQUEST=asked, REQUESTED_BY=by, VOLUME=self.volume, **more)

    def why_not(self, ask: Ask) -> str | None:
        """Why this cannot be asked now, or None if it can."""
        why = None
        if self._is_broken:
            why = "a defect of the agent ended its service; pull it, or restart the agent"
        elif self.stop_signal.asked:
            why = f"it is being let go: {self.stop_signal.why}"
        elif self._request is not None:
            why = f"{self._request.ask.value} was asked for before and is not done yet"
        elif self.status.is_stuck:
            why = "the kernel does not answer; pull the medium, or wait"
        else:
            match self.status.state, ask:
                case State.IGNORED, _:
                    why = "no rule matches it, so the agent leaves it alone; `explain` says why"
                case (State.MOUNTED | State.UNLOCKED) as state, (Ask.UNLOCK | Ask.RETRY):
                    why = f"it is {state.value} already"
                case (State.LOCKED | State.EJECTED) as state, Ask.RETRY:
                    why = f"it is {state.value}, since that was asked for; unlock it"
        return why

    async def power_off(self) -> None:
        """Its medium is stopped. Raises: HotplugError if something else on it is in use."""
        await self._operations.call("power off", self._kernel.power_off, self.volume)

    async def run(self) -> None:
        """The volume has come and gone, and nothing of it is left that is ours to remove."""
        try:
            while not self.stop_signal.asked:
                self._news, self._renewal = False, None
                if not (self._rests or (self._request and self._request.releases)):
                    await self._serve()
                await self._answer()
                await self.stop_signal.until(self._has_to_act)
            await self._leave_nothing_inherited()
        finally:
            self._refuse_request(
                self.stop_signal.why or "a defect of the agent; its journal says more"
            )
        # A release that failed has said so; only a medium that is gone overrules it.
        if self.status.state is State.REMOVED_UNSAFELY or self.stop_signal.keeps:
            return
        if self.stop_signal.gone or self.status.state is not State.FAILED:
            self.status.becomes(State.GONE)

    def _has_to_act(self) -> bool:
        changed = self._news or self._renewal is not None
        return self._request is not None or (changed and self._rests is None)

    async def _answer(self) -> None:
        """A request that came while nothing was held has been answered, or sets out to be."""
        request = self._request
        if request is None or self.stop_signal.asked:
            return
        if not request.releases:
            if self._rests is not None:
                self._rests, self._news = None, True  # served next, and answered then
                self._kernel.remember(self.volume, "")
            elif not (self._news or self._renewal):  # else it is served once more before
                self._refuse_request(self.status.words)
        elif self._refuses:
            self._refuse_request(self.status.words)
        elif self._inherits:
            try:
                await self._release_inherited()
            except ReleaseError as error:
                self._inherits = True
                self._publish_released_badly(str(error))
                self._refuse_request(str(error))
            else:
                await self._let_go_for(request)
        else:
            self._rest(request)

    def _refuse_request(self, why: str) -> None:
        if self._request is not None:
            words = f"{self._request.ask.value} {self.volume}: {why}"
            self._answer_no(RequestRefusedError(words))

    def _answer_no(self, error: RequestRefusedError) -> None:
        request, self._request = self._request, None
        if request is not None:
            said = self._fields("request-refused", request, REASON=str(error))
            log.warning("%s: %s: refused: %s", self.volume, request.words, error, extra=said)
            request.refuse(error)

    def _rest(self, request: Request) -> None:
        """The volume is as was asked: let go, and safe to pull."""
        if request.ask is Ask.EJECT:
            self._rest_as(State.EJECTED, "safe to remove")
        elif self.status.state is not State.EJECTED:
            self._rest_as(State.LOCKED, request.words)
        self._grant()

    def _rest_as(self, state: State, reason: str) -> None:
        self._rests = Rest(state, reason)
        self._kernel.remember(self.volume, state.value)
        self.status.becomes(state, reason)

    def rest_instead(self, state: State, reason: str) -> None:
        """It was let go on request, and is in this state of rest now."""
        if self._rests is not None and not self.stop_signal.asked:
            self._rest_as(state, reason)

    async def _serve(self) -> None:
        """As far as the volume gets. The only place where the errors of a volume end."""
        self._refuses = self._blob_is_at_fault = False
        had_told = self._udev_has_told
        try:
            while not self.volume.identified:
                asked = self.volume
                found = await self._operations.call("identify", self._kernel.identify, asked)
                if self.volume == asked:  # else udev has told of it meanwhile, or will not any more
                    self.status.volume = found
            self.stop_signal.check()
            match match_rules(self._context.rules, self.volume):
                case NeedsUdev() | NoMatch() if self.volume.awaits_udev:
                    pass  # whatever is said of it is said when udev has told
                case NoMatch() as refused:
                    await self._let_be(refused)
                case Plan() as plan:
                    self._tried = Wish(self.volume, plan)
                    await self._hold(self._tried)
        except (StopRequestedError, DeviceLockedError):
            pass
        except BlobMissingError as error:
            self.status.becomes(State.WAITING, str(error))
        except MountPointOccupiedError as error:
            self.status.becomes(State.CONFLICT, str(error))
        except ReleaseError as error:
            self._inherits = True
            before = error.__cause__ and error.__cause__.__context__
            cause = f"; before that: {before}" if isinstance(before, HotplugError) else ""
            self._publish_released_badly(f"{error}{cause}")
        except (HotplugError, OSError) as error:
            self._fail(error)
            if self._udev_has_told and not (had_told or self._blob_is_at_fault):
                self._news = True  # it might not have failed if it had waited for that

    def _fail(self, error: Exception) -> None:
        if self.stop_signal.gone or not self._kernel.is_present(self.volume):
            # A medium that is pulled makes the step at hand fail; that is no fault of its.
            log.warning("%s: pulled meanwhile: %s", self.volume, error)
        else:
            self._refuses = isinstance(error, ForeignMappingError)
            self._blob_is_at_fault = isinstance(error, _OF_THE_BLOB)
            self.status.becomes(State.FAILED, str(error))

    def _publish_released_badly(self, words: str) -> None:
        # Without a medium the volume is not there to be `failed`; the remains are all there is.
        self.status.becomes(
            State.REMOVED_UNSAFELY if self.stop_signal.gone else State.FAILED, words
        )

    async def _let_be(self, refused: NoMatch) -> None:
        if self._inherits:
            log.warning("%s: no rule matches it any more; letting it go", self.volume)
            await self._release_inherited()
        self.status.becomes(State.IGNORED, str(refused), rule="", blob="")

    async def _release_inherited(self) -> None:
        """Nothing is left of what an earlier run had made. Raises: ReleaseError."""
        self._inherits = False
        if self.status.state is None:
            self.status.becomes(State.DETACHING, "an earlier run of the agent has left it")
        uuid = names.dm_uuid(self.volume.id)
        unsafe = await to_the_end(release_leftovers, self._operations, uuid)
        if unsafe and self.stop_signal.gone:
            self.status.becomes(State.REMOVED_UNSAFELY, _LOST)

    async def _leave_nothing_inherited(self) -> None:
        """What this life has not come to adopt, or could not let go before, is let go all the same.

        Not so a mapping that does something else than its rule asks for, as long as its medium is
        there: the volume has `failed`, and people decide.
        """
        refused = self._refuses and not self.stop_signal.gone
        if self._inherits and not self.stop_signal.keeps and not refused:
            try:
                await self._release_inherited()
            except ReleaseError as error:
                self._publish_released_badly(str(error))

    async def _hold(self, wish: Wish) -> None:
        name, mount_points, me = wish.plan.mount_name, self._context.mount_points, wish.volume.id
        facts = {"rule": wish.plan.rule.name, "blob": str(self._blob_of(wish))}
        with mount_points.queued(name, me, self.stop_signal.stir):
            while mount_points.owner(name) != me:
                point = self._kernel.mount_root / name
                words = f"{point} belongs to volume {mount_points.owner(name)}"
                self.status.becomes(State.CONFLICT, words, **facts)
                await self.stop_signal.until(
                    lambda: mount_points.owner(name) == me or self._is_called_away()
                )
                self.stop_signal.check()
                if self._request is not None and not self._request.releases:
                    self._refuse_request(self.status.words)  # and keeps its place in the queue
                elif self._request is not None or self._why_another(wish) is not None:
                    self._news = True
                    return
            if wish.volume != self.volume:
                self._news = True  # other facts were told while it waited, and may change all
                return
            self.stop_signal.check()
            self.status.becomes(State.UNLOCKING, f"with {facts['blob']}", **facts)
            try:
                await self._unlock_and_mount(wish)
            finally:
                if (
                    self.stop_signal.asked
                ):  # what an earlier run has mounted keeps its place until then
                    await self._leave_nothing_inherited()

    def _is_called_away(self) -> bool:
        return self._renewal is not None or self._request is not None

    def _blob_of(self, wish: Wish) -> Path:
        return self._kernel.blob_directory / wish.plan.blob

    async def _unlock_and_mount(self, wish: Wish) -> None:
        unsafe, let_go_for, self._operations.took, self._plan = False, None, {}, wish.plan
        try:
            async with AsyncExitStack() as held:
                mapping = await held.enter_async_context(active_mapping(self._operations, wish))
                live = {"mapping_name": mapping.name, "mapping_node": mapping.node}
                by = f", by its {backend_that_made(mapping)} key"
                if wish.plan.rule.action is Action.UNLOCK:
                    self._publish_served(State.UNLOCKED, f"as {mapping.name}{by}", **live)
                elif self._why_another(wish) is not None:
                    self._news = True
                    return
                else:
                    self.status.becomes(State.MOUNTING, f"from {mapping.node}{by}", **live)
                    mount = await held.enter_async_context(mounted(self._operations, wish, mapping))
                    unsafe = not mount.read_only
                    access = "read-only" if mount.read_only else "read-write"
                    self._publish_served(
                        State.MOUNTED, f"at {mount.point}, {access}", mount_point=mount.point,
                        filesystem=mount.filesystem, read_only=mount.read_only,
                    )  # fmt: skip
                    self._tell_of_the_beginning(wish)
                let_go_for = await self._until_let_go(wish, mapping)
                if let_go_for is not None:
                    unsafe &= self.stop_signal.gone  # else it was flushed and unmounted before
                elif self.stop_signal.keeps:
                    self._inherits = True  # should its medium leave before this life has ended
                else:
                    self.status.becomes(State.DETACHING, self.stop_signal.why)
                    await self._tell_of_the_end(wish)
        finally:
            self.status.holds_nothing()
            self._plan = None
        if unsafe and self.stop_signal.gone:
            self.status.becomes(State.REMOVED_UNSAFELY, _LOST)
        elif let_go_for is not None and not self.stop_signal.asked:
            await self._let_go_for(let_go_for)

    def _publish_served(self, state: State, reason: str, **facts: Any) -> None:
        self.status.becomes(state, reason, steps=dict(self._operations.took), **facts)
        if self._request is not None and not self._request.releases:
            self._grant()

    def _grant(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.grant()

    async def _until_let_go(self, wish: Wish, mapping: Mapping) -> Request | Reevaluate | None:
        """Somebody wants it let go and nobody uses it any more, or else its life is to end."""
        while True:
            await self.stop_signal.until(self._is_called_away)
            if self.stop_signal.asked:
                return None
            wanted: Request | Reevaluate
            if self._request is not None:
                wanted = self._request
                if not wanted.releases:  # it came while other rules wanted it let go, in vain
                    self._grant()
                    continue
            elif (renewal := self._why_another(wish)) is not None:
                wanted = renewal
            else:
                continue
            if await self._is_let_go(wish, mapping, wanted):
                return wanted

    def _why_another(self, wish: Wish) -> Reevaluate | None:
        """What has changed, if rules and facts now ask for something else than what is held."""
        # Whoever is told to let go looks at the rules anew; whoever is in use stays as he is.
        renewal, self._renewal = self._renewal, None
        if renewal is None:
            return None
        plan = match_rules(self._context.rules, self.volume)
        if self._goes_on(wish, plan) or isinstance(plan, NeedsUdev):
            return None
        return renewal

    async def _is_let_go(self, wish: Wish, mapping: Mapping, wanted: Request | Reevaluate) -> bool:
        state, reason = self.status.state or State.MOUNTED, self.status.reason
        self.status.becomes(State.DETACHING, wanted.words)
        await self._tell_of_the_end(wish)
        if self.stop_signal.gone or self.stop_signal.keeps:
            return False
        try:
            on_busy = (self._plan or wish.plan).rule.on_busy
            if isinstance(wanted, Reevaluate):
                on_busy = wanted.on_busy
            await let_go(self._operations, wish, mapping, on_busy)
        except (HotplugError, OSError) as error:
            if wanted is Reevaluate.BY_UDEV:  # it goes all the same, as when it is released
                log.warning("%s: %s: %s", self.volume, wanted.words, error)
                return True
            if not self.stop_signal.asked:
                self.status.becomes(state, reason)
                self._tell_of_the_beginning(wish)
                self._refuse(wanted, error)
            return False
        return True

    def _refuse(self, wanted: Request | Reevaluate, error: Exception) -> None:
        if not isinstance(wanted, Request):
            log.warning("%s: %s: %s", self.volume, wanted.words, error)
        elif isinstance(error, RequestRefusedError):
            self._answer_no(error)
        else:
            self._refuse_request(str(error))

    async def _let_go_for(self, wanted: Request | Reevaluate) -> None:
        """Whoever wanted it let go is told; what is still held by others has failed."""
        uuid = names.dm_uuid(self.volume.id)
        try:
            left = await self._operations.dm(
                "look for the mapping", self._kernel.find_mapping, uuid
            )
        except (HotplugError, OSError) as error:  # it may be there
            self._inherits = True
            self.status.becomes(State.FAILED, str(error))
            self._refuse_request(str(error))
            return
        if left is not None:
            self._inherits = True
            self._news = False  # what is new was for the volume as it was held
            others = "; ".join(await who_uses(self._operations, left)) or "others"
            words = f"mapping {left.name} is held open: {others}; it goes when they close it"
            self.status.becomes(State.FAILED, words)
            self._refuse_request(words)
        elif isinstance(wanted, Request):
            self._rest(wanted)
        else:
            self._news = True

    def _tell_of_the_beginning(self, wish: Wish) -> None:
        self._end_is_told = False
        plan = self._plan or wish.plan
        if plan.on_mount is not None and plan.rule.action is Action.MOUNT:
            self._context.units.start(plan.on_mount)

    async def _tell_of_the_end(self, wish: Wish) -> None:
        """The rule's unit has done what it does before an unmount; without a medium none is due."""
        plan, units = self._plan or wish.plan, self._context.units
        unit = plan.on_unmount
        if unit is None or self._end_is_told or plan.rule.action is Action.UNLOCK:
            return
        self._end_is_told = True
        if self.stop_signal.gone:
            units.start(unit)
        else:
            await self.stop_signal.unless_gone(units.finish(unit, plan.rule.unit_within_s))

    def publish_defect(self, state: State, words: str) -> None:
        """The volume's state is this, since the agent itself is at fault."""
        self._is_broken = True
        self.status.holds_nothing()
        self.status.becomes(state, words)


@dataclass(frozen=True, slots=True)
class Rest:
    """How a volume was let go on request."""

    state: State
    reason: str


def _has(volume: Volume, fact: str) -> bool:
    return getattr(volume, fact) is not None


class Reevaluate(Enum):
    """Why a volume is to be let go, and served anew."""

    BY_RULES = ("other rules ask for something else", OnBusy.REFUSE)
    """Nobody has asked to take it from its users."""
    BY_UDEV = ("udev tells something else of it than was known", OnBusy.DETACH)
    """It was served before udev had told of it, and should not have been."""

    def __init__(self, words: str, on_busy: OnBusy) -> None:
        self.words = words
        self.on_busy = on_busy

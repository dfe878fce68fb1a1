"""Every kernel step fails, hangs and answers late, at every moment in which the agent takes it.

The combinations come from tables: the moments (MOMENTS), the errors of a step (ERRNOS), and the
kinds of fault (failures_of, hangs_of). The calls of a moment are not written down. They are
recorded from an undisturbed run, so that a new call is tried from its first day.

Three volumes take part: the target of the fault, a neighbour that is mounted before, and a volume
that is plugged while the fault lasts.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from caam_hotplug import names
from caam_hotplug.errors import (
    BlobError,
    BlobMissingError,
    BlobRejectedError,
    CaamError,
    DeviceInUseError,
    DmError,
    FlushError,
    HotplugError,
    KernelError,
    KeyringError,
    MappingBusyError,
    MasterKeyError,
    MountBusyError,
    MountError,
    UnknownError,
)
from caam_hotplug.formats.blobs import Backend
from caam_hotplug.model import State, Volume
from fakes.bench import LATE_AFTER_S, Bench
from fakes.kernel import KEY, Fault

LABEL: Final = "cartridge-01"
HANGS_S: Final = 5.0

NOT_KNOWN: Final = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.EINTR,
)  # fmt: skip

# fmt: off
ERRNOS: Final[dict[str, tuple[int, ...]]] = {
    # open(2) and read(2) of a device node: the medium leaves, is unreadable, has no medium in it;
    # too many open files, no memory.
    "identify": (errno.ENOENT, errno.ENXIO, errno.EIO, errno.ENOMEDIUM, errno.EMFILE, errno.ENOMEM),
    # open(2) with O_EXCL: in use; the node or the medium gone, too many open files, no memory.
    "require_unused": (errno.EBUSY, errno.ENOENT, errno.ENXIO, errno.EMFILE, errno.ENOMEM),
    # BLKGETDISKSEQ: another medium has its place.
    "require_same": (errno.ENODEV,),
    # open(2) with O_NOFOLLOW, read(2): no blob, a link, not allowed (a security module), a sick
    # filesystem, too many open files.
    "read_blob": (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EIO, errno.EMFILE),
    # caamkeygen.c, caamkeyblob.c (linux-imx): refused (EBADMSG from the CAAM's own check, EINVAL
    # for its form), a job that failed, no job ring, no memory; open(2) where no driver is there.
    "import_blob": (
        errno.EBADMSG,
        errno.EINVAL,
        errno.EIO,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOMEM,
        errno.ENOENT,
    ),
    # add_key(2): quota, memory, a session keyring that is revoked, expired or not writable.
    "add_key": (
        errno.EDQUOT,
        errno.ENOMEM,
        errno.EKEYREVOKED,
        errno.EKEYEXPIRED,
        errno.EACCES,
        errno.EINVAL,
    ),
    # add_key(2) again, and trusted_core.c: refused by the trust source (EBADMSG, EINVAL), none
    # there, a job that failed.
    "load_trusted_key": (
        errno.EBADMSG,
        errno.EINVAL,
        errno.ENODEV,
        errno.EIO,
        errno.EDQUOT,
        errno.ENOMEM,
        errno.EKEYREVOKED,
    ),
    # encrypted.c: the master missing or another board's, the blob of another master, and the same.
    "load_encrypted_key": (
        errno.ENOENT,
        errno.EBADMSG,
        errno.EINVAL,
        errno.ENODEV,
        errno.EDQUOT,
        errno.ENOMEM,
        errno.EKEYREVOKED,
    ),
    # keyctl_search(3), keyctl_unlink(3). No such key is no error here (keyring.py).
    "unlink_key": (errno.EACCES, errno.ENOMEM, errno.EKEYREVOKED),
    # dm-ioctl.c: ctl_ioctl (EPERM without CAP_SYS_ADMIN, ENOMEM in copy_params); EIO is what
    # devmapper.py says where libdevmapper kept the errno to itself. ENXIO is "none".
    "find_mapping": (errno.ENOMEM, errno.EPERM, errno.EIO),
    "our_mappings": (errno.ENOMEM, errno.EPERM, errno.EIO, errno.ENODEV),
    # dm_hash_insert: the name or UUID is taken; dm_create: no minor, no memory.
    "create_mapping": (errno.EBUSY, errno.ENXIO, errno.ENOMEM, errno.EINVAL),
    # crypt_ctr and crypt_set_keyring_key in dm-crypt.c, dm_get_device: a bad line or key size, no
    # such cipher, no key, a revoked or expired one, the device gone, in use, write-protected, no
    # memory, the cipher's hardware refuses the key.
    "load_table": (
        errno.EINVAL,
        errno.ENOENT,
        errno.ENOKEY,
        errno.EKEYREVOKED,
        errno.EKEYEXPIRED,
        errno.ENXIO,
        errno.EBUSY,
        errno.EACCES,
        errno.ENOMEM,
        errno.EIO,
    ),
    # do_resume in dm-ioctl.c: the mapping gone, a table that does not fit its queue, no memory.
    "activate_mapping": (errno.ENXIO, errno.EINVAL, errno.ENOMEM),
    # table_load and do_resume again: no memory, a signal while it waits for what is in flight
    # (dm_wait_for_completion); open(2): too many open files. ENXIO is "none".
    "load_error_table": (errno.ENOMEM, errno.EINTR, errno.EMFILE),
    # find_device and copy_params in dm-ioctl.c: it has gone; no memory.
    "has_error_table": (errno.ENXIO, errno.ENOMEM),
    # table_clear and do_resume: it has gone; a signal while it waits, no memory.
    "resume_mapping": (errno.ENXIO, *NOT_KNOWN),
    # dev_remove: ENXIO is "gone" and a holder only defers it, so the ioctl itself is what fails.
    "remove_mapping": (errno.ENOMEM, errno.EPERM, errno.EIO),
    # target_message, dm_cancel_deferred_remove: it has gone, or is being deleted right now.
    "keep_mapping": (errno.ENXIO, errno.EBUSY, errno.ENOMEM),
    # open(2), read(2) past the cache: the node or the medium gone, bad sectors, no memory.
    "plaintexts": (errno.ENOENT, errno.ENXIO, errno.EIO, errno.EMFILE, errno.ENOMEM),
    "ciphertexts": (errno.ENOENT, errno.ENXIO, errno.EIO, errno.EMFILE, errno.ENOMEM),
    "sample": (errno.ENOENT, errno.ENXIO, errno.EIO, errno.EMFILE, errno.ENOMEM),
    # open(2), read(2) in blkid_do_safeprobe: bad sectors, the node or the medium gone.
    "probe": (errno.EIO, errno.ENOENT, errno.ENXIO, errno.EMFILE, errno.ENOMEM),
    # fsconfig(2), mount(2), ext4_fill_super and its kin: a bad superblock or option, corruption,
    # bad sectors, a journal on a write-protected medium, in use, no such filesystem, no memory,
    # no such device, a bad checksum; ENOSPC, EMFILE: mkdir(2), open(2) of the mount point.
    "mount": (
        errno.EINVAL,
        errno.EUCLEAN,
        errno.EIO,
        errno.EROFS,
        errno.EBUSY,
        errno.ENODEV,
        errno.ENOMEM,
        errno.ENXIO,
        errno.EBADMSG,
        errno.EACCES,
        errno.ENOSPC,
        errno.EMFILE,
    ),
    # open(2) of the mapping's node.
    "watch_writes": (errno.ENOENT, errno.ENXIO, *NOT_KNOWN),
    # open(2) of the mount root.
    "keep_place": (errno.ELOOP, *NOT_KNOWN),
    # open(2), read(2) of /proc/self/mountinfo; EACCES is a security module's, ENOENT where /proc is
    # unmounted or covered.
    "mounts": (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EIO,
        errno.EACCES,
        errno.EINTR,
        errno.ENOENT,
    ),
    # openat(2), read(2) of files of sysfs: too many open files, no memory, a security module.
    "look": NOT_KNOWN,
    "is_offline": NOT_KNOWN,
    # syncfs(2): what was written could not be; open(2): too many open files.
    "flush": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE),
    # umount2(2). EINVAL and ENOENT are "nothing is mounted there" (filesystem.py).
    "unmount": (errno.EBUSY, errno.EIO, errno.ENOMEM, errno.EPERM),
    "detach": (errno.EIO, errno.ENOMEM, errno.EPERM),
    # rmdir(2). ENOENT, EBUSY and ENOTEMPTY are no errors here (paths.py): then it is not ours.
    "remove_mount_point": (errno.EROFS, errno.EACCES, errno.EIO, errno.ENOMEM, errno.EMFILE),
    # open(2) of a reader's disk: no card, the reader gone, a sick one, too many open files.
    "read_table": (errno.ENOMEDIUM, errno.ENXIO, errno.ENOENT, errno.EIO, errno.EMFILE),
    # open(2), readdir(3) of the mount root or a mount point: a link on its way, not allowed, sick,
    # too many files.
    "why_occupied": NOT_KNOWN,
    # inotify_init1(2), inotify_add_watch(2): no watch, no instance, no memory.
    "watch_mount_point": (errno.ENOSPC, *NOT_KNOWN),
    "our_mount_points": (errno.ELOOP, errno.EACCES, errno.EIO, errno.EMFILE),
}
# fmt: on

DM_STEPS: Final = {
    "find_mapping", "our_mappings", "create_mapping", "load_table", "activate_mapping",
    "load_error_table", "remove_mapping", "keep_mapping", "require_same",
    "resume_mapping",
}  # fmt: skip
"""Steps of the mappings' worker; the last is one of a device, and waits for nothing."""
GLOBAL: Final = {"mounts"}
"""Steps that name no volume, so that a fault cannot be aimed at one of several. The mount table is
read from memory on the loop and cannot hang; volume/mount_table.py says why.
"""
ON_LOOP: Final = {*GLOBAL, "has_error_table"}
"""Steps that cannot hang: what is asked for is in memory."""
HARMS: Final = {
    "flush", "unmount", "detach", "remove_mount_point", "load_error_table", "remove_mapping",
}  # fmt: skip
LOADS: Final = {"load_trusted_key", "load_encrypted_key"}
LISTS: Final = {"our_mappings", "our_mount_points"}
"""Steps of the agent before it serves a volume."""


REFUSED: Final = {errno.EBADMSG, errno.EINVAL}
"""Error numbers of a driver that does not take the blob."""


PLAIN: Final = {
    "ciphertexts", "identify", "plaintexts", "probe", "read_table", "require_same",
    "require_unused", "sample", "watch_writes",
}  # fmt: skip


def error_of(step: str, number: int) -> HotplugError:
    """Return the error that `kernel.linux.LinuxKernel` raises for an errno in a step."""
    words = ("take the step", f"of {step}", number)
    match step, number:
        case (("import_blob" | "load_trusted_key" | "load_encrypted_key"), number) if (
            number in REFUSED
        ):
            return BlobRejectedError("the blob was refused")
        case "read_blob", errno.ENOENT:
            return BlobMissingError(f"no blob /data/caam/{LABEL}.bb")
        case "read_blob", _:
            return BlobError(f"read blob /data/caam/{LABEL}.bb: {os.strerror(number)}")
        case "import_blob", _:
            return CaamError(*words)
        case "load_encrypted_key", errno.ENOENT:
            return MasterKeyError("load the master key master: no blob /data/caam/master.bb")
        case "add_key" | "unlink_key" | "load_trusted_key" | "load_encrypted_key", _:
            return KeyringError(*words)
        case "require_unused", errno.EBUSY:
            return DeviceInUseError("use /dev/sda1: it is in use: swap space")
        case "flush" | "look", _:
            return FlushError(*words)
        case _ if step in PLAIN:
            return KernelError(*words)
        case "mounts" | "holders" | "watch_mount_point" | "is_offline", _:
            return UnknownError(*words)
        case ("unmount", errno.EBUSY):
            return MountBusyError(*words)
        case _ if step in DM_STEPS:
            return (MappingBusyError if number == errno.EBUSY else DmError)(*words)
    return MountError(*words)


# moments


@dataclass
class Scene:
    """A bench with a target volume and its neighbours."""

    bench: Bench
    target: Volume
    neighbour: Volume | None
    """Volume that is mounted before; None where a fault cannot be aimed at the target alone."""

    def subjects(self) -> frozenset[str]:
        """Return the kernel steps' names for the target and for the objects made for it."""
        which = self.target.id
        return frozenset({
            "", LABEL, "stale", self.target.name, f"{LABEL}.bb", KEY.decode(),
            names.key_description(which), names.dm_uuid(which), names.dm_name(which, LABEL),
            f"/dev/disk-{self.target.number}",
        })  # fmt: skip

    def published(self) -> tuple[State, str]:
        """Return the state and reason that were published last for the target."""
        published = [
            (s, why) for volume, s, why in self.bench.states if volume.id == self.target.id
        ]
        return published[-1] if published else (self.bench.state(self.target), "")

    def was_mounted(self) -> bool:
        """Whether the target was ever published as mounted."""
        return any(v.id == self.target.id and s is State.MOUNTED for v, s, _ in self.bench.states)

    def plug_another(self) -> Volume:
        """Plug a neighbour."""
        later = self.bench.insert("later", "sdc1", key=b"later".ljust(36))
        self.bench.settle()
        return later

    def is_served(self, volume: Volume) -> bool:
        """Whether the volume is mounted and published as mounted."""
        points = [mount.point for mount in self.bench.kernel.mounts]
        is_there = points.count(f"/run/media/{volume.partlabel}") == 1
        return is_there and self.bench.state(volume) is State.MOUNTED

    def steps_against_the_neighbour(self) -> set[str]:
        """Return the steps taken against the neighbour that was mounted before."""
        kernel = self.bench.kernel
        noted = zip(kernel.steps, kernel.subjects, strict=True)
        return {step for step, subject in noted if "neighbour" in subject} & HARMS

    def end(self, *, restart: bool) -> None:
        """End the fault, pull all media, close all holders, and check that nothing is left.

        With `restart`, leftovers may remain until the agent has been started again.
        """
        bench = self.bench
        bench.kernel.faults.clear()
        for name in list(bench.kernel.media):
            bench.pull(name)
        bench.settle()
        bench.kernel.close_holders()
        if bench.running:
            bench.cancel()
        if restart:
            bench.start()
            bench.settle()
            bench.stop()
        assert bench.kernel.leftovers() == []
        bench.close()


@dataclass(frozen=True, eq=False)
class Moment:
    """Something that happens to a volume, and its state afterwards if nothing fails."""

    name: str
    before: Callable[[Scene], None]
    act: Callable[[Scene], None]
    ends_in: State
    held: bool = False
    read_only: bool = False
    identified: bool = True
    is_early: bool = False
    backend: Backend = "tagged"

    def scene(self, *, alone: bool = False) -> Scene:
        """Prepare a bench for the moment."""
        bench = Bench()
        bench.kernel.backend = self.backend
        bench.start()
        key = b"neighbour".ljust(36)
        neighbour = None if alone else bench.insert("neighbour", "sdb1", key=key)
        bench.settle()
        facts = {"read_only": self.read_only, "identified": self.identified}
        scene = Scene(bench, bench.kernel.insert(LABEL, "sda1", **facts), neighbour)
        self.before(scene)
        if self.held:
            bench.kernel.users[LABEL] = 1
        bench.kernel.steps.clear()
        bench.kernel.subjects.clear()
        bench.kernel.faulted_calls = 0
        bench.states.clear()
        return scene


def unreported(_scene: Scene) -> None:
    """Leave the target present and unreported."""


def mounted(scene: Scene) -> None:
    """Mount the target."""
    scene.bench.appear(scene.target)
    scene.bench.settle()
    assert scene.is_served(scene.target)


def suspended(scene: Scene) -> None:
    """Mount the target, and have somebody suspend its mapping."""
    mounted(scene)
    by_hand, kernel = scene.bench.by_hand, scene.bench.kernel
    by_hand.suspend(next(m for m in kernel.mappings.values() if LABEL in m.name))


def in_conflict(scene: Scene) -> None:
    """Let a program have the target's mount point, and wait until the agent has looked at it."""
    scene.bench.kernel.directories[LABEL] = "content"
    scene.bench.appear(scene.target)
    scene.bench.wait(2)


def crashed(scene: Scene) -> None:
    """Mount the target and kill the agent."""
    mounted(scene)
    scene.bench.kill()


def without_table(scene: Scene) -> None:
    """Kill the agent while the target's mapping has no table yet."""
    scene.bench.kernel.faults.append(Fault("load_table", hangs_s=1.0))
    scene.bench.appear(scene.target)
    scene.bench.settle()
    scene.bench.kill()


def orphaned(scene: Scene) -> None:
    """Kill the agent, then pull the target; leave an unused mount point behind."""
    crashed(scene)
    scene.bench.kernel.pull("sda1")
    scene.bench.kernel.directories["stale"] = "ours"


def arrive(scene: Scene) -> None:
    """Report the target to the agent."""
    scene.bench.appear(scene.target)


def announced(scene: Scene) -> None:
    """Report the target to the agent as the kernel does, before udev."""
    scene.bench.announce(scene.target)


def give_back(scene: Scene) -> None:
    """Empty the target's mount point."""
    scene.bench.kernel.free_mount_point(LABEL)


def read(scene: Scene) -> None:
    """Read the target's state, which has it looked at."""
    scene.bench.look(scene.target)


def pull(scene: Scene) -> None:
    """Pull the target's medium."""
    scene.bench.pull("sda1")


def change(scene: Scene) -> None:
    """Change the target's card in its reader."""
    scene.bench.kernel.change("another")
    scene.bench.report_absent()


def stop(scene: Scene) -> None:
    """Ask the agent to stop."""
    scene.bench.begin_stop()


def start(scene: Scene) -> None:
    """Start an agent while the target is present."""
    scene.bench.start()


def find_leftovers(scene: Scene) -> None:
    """Start an agent after the target has left."""
    scene.bench.start()


MOMENTS: Final = (
    Moment("arrival", unreported, arrive, State.MOUNTED),
    Moment("arrival without udevd", unreported, arrive, State.MOUNTED, identified=False),
    Moment("arrival before udev", unreported, announced, State.MOUNTED, is_early=True),
    Moment("arrival with a trusted key", unreported, arrive, State.MOUNTED, backend="trusted"),
    Moment("arrival with an encrypted key", unreported, arrive, State.MOUNTED, backend="encrypted"),
    Moment("recovery", without_table, start, State.MOUNTED),
    Moment("adoption", crashed, start, State.MOUNTED),
    Moment("adoption while in use", crashed, start, State.MOUNTED, held=True),
    Moment("end of a conflict", in_conflict, give_back, State.MOUNTED),
    Moment("read of its state", mounted, read, State.MOUNTED),
    Moment("pull", mounted, pull, State.REMOVED_UNSAFELY),
    Moment("pull while in use", mounted, pull, State.REMOVED_UNSAFELY, held=True),
    Moment("pull of a read-only medium", mounted, pull, State.GONE, read_only=True),
    Moment("change of cards", mounted, change, State.REMOVED_UNSAFELY),
    Moment("stop", mounted, stop, State.GONE),
    Moment("stop while in use", mounted, stop, State.GONE, held=True),
    Moment("stop while suspended", suspended, stop, State.GONE),
    Moment("release of leftovers", orphaned, find_leftovers, State.GONE),
    Moment("release of leftovers while in use", orphaned, find_leftovers, State.GONE, held=True),
)
DEPARTS: Final = {pull, change}
UNLOCKS: Final = {arrive, announced, start, give_back}
STARTS: Final = [moment for moment in MOMENTS if moment.act in {start, find_leftovers}]


# combinations

tried: Final[Counter[str]] = Counter()
"""Number of combinations that were tried, for the summary of a test run."""


@dataclass(frozen=True)
class Combination:
    """One call of one moment, and its fault."""

    moment: Moment
    step: str
    nth: int
    """Number of the call among the moment's calls of this step."""
    number: int = 0
    """Errno of the failure; 0 for a call that hangs."""
    lasting: bool = False
    acts_first: bool = False

    def __str__(self) -> str:
        if self.number:
            fault = f"{errno.errorcode[self.number]} {'always' if self.lasting else 'once'}"
        else:
            fault = "acts, answers late" if self.acts_first else "hangs, then acts"
        return f"{self.moment.name}: {self.step} {self.nth + 1}: {fault}"

    @property
    def error(self) -> HotplugError:
        """Error that the call raises."""
        return error_of(self.step, self.number)

    @property
    def precedes_service(self) -> bool:
        """Whether a starting agent makes this call before it serves a volume."""
        stale = (
            self.moment.act is find_leftovers
            and self.step == "remove_mount_point"
            and self.nth == 0
        )
        return stale or self.step in LISTS

    @property
    def is_taken_by_the_dm_worker(self) -> bool:
        """Whether others wait behind the call: the load of a table also unlinks its key."""
        loads = self.moment.act in UNLOCKS and self.step == "unlink_key"
        return self.step in DM_STEPS - {"load_error_table"} or loads

    @property
    def state_after_failure(self) -> State:
        """State of the target after the call has failed."""
        act = self.moment.act
        # A detach follows; it is only listed; it is tried again; it comes after the target's life;
        # only a later sleep needs it, or what somebody mounts over the mount root.
        harmless = {
            "unmount", "our_mount_points", "load_error_table", "has_error_table", "read_table",
            "plaintexts", "ciphertexts", "sample", "why_occupied", "keep_place", "look",
            "is_offline", "resume_mapping",
        }  # fmt: skip
        if act is give_back and self.step == "mounts" and not self.nth and not self.lasting:
            return self.moment.ends_in  # an attempt follows a check without an answer
        if act in {find_leftovers, read} or self.step in harmless:
            return self.moment.ends_in
        is_look = self.step in {"find_mapping", "mounts"} and self.nth == 0
        if is_look and act is stop and not self.lasting:
            return self.moment.ends_in  # what is seen by it is in the way of nothing
        if self.step == "watch_writes" and self.moment.before is crashed:
            return self.moment.ends_in  # what is mounted already stays so
        if self.step == "read_blob" and self.number == errno.ENOENT:
            return State.WAITING
        return State.REMOVED_UNSAFELY if act in DEPARTS else State.FAILED

    @property
    def may_leave_something(self) -> bool:
        """Whether the release itself fails, so that only the next start releases everything.

        A lifecycle retries once at its end, except for the directory, which is harmless. The
        release of leftovers, and a lifecycle under a lasting fault, leave the rest to the next
        start.
        """
        once_more = not self.lasting and self.moment.act in {*DEPARTS, stop}
        releases = self.moment.act in {*DEPARTS, stop, find_leftovers}
        return releases and not (once_more and self.step != "remove_mount_point")

    @contextmanager
    def under_way(self) -> Iterator[Scene]:
        """Start the moment until the fault has hit; check afterwards that nothing is left."""
        scene = self.moment.scene(alone=self.step in GLOBAL)
        scene.bench.kernel.faults.append(
            Fault(
                self.step,
                self.error if self.number else None,
                hangs_s=0.0 if self.number else HANGS_S,
                acts_first=self.acts_first,
                after=self.nth,
                lasting=self.lasting,
                about=scene.subjects(),
            )
        )
        tried["fails" if self.number else "hangs"] += 1
        try:
            self.moment.act(scene)
            scene.bench.settle()
            assert scene.bench.kernel.faulted_calls
            yield scene
            scene.end(restart=self.number != 0 and self.may_leave_something)
        except BaseException as error:
            error.add_note(f"combination: {self}")
            raise

    def assert_stuck(self, scene: Scene) -> None:
        """Check that the target is published as stuck; a leftover and a disk have no state."""
        state, reason = scene.published()
        if self.moment.act is not find_leftovers and self.step != "read_table":
            assert state is State.STUCK
            assert reason.endswith(": the kernel has not answered for 3 s; still waiting")

    def assert_waiting(self, scene: Scene, other: Volume) -> None:
        """Check that the other volume's state says that it waits behind the target's step."""
        assert scene.bench.state(other) is State.STUCK
        assert "it waits for its turn behind another volume's call" in scene.bench.reason(other)


def calls_of(moment: Moment, *, alone: bool) -> Counter[str]:
    """Count the target's calls of each step in an undisturbed moment."""
    scene = moment.scene(alone=alone)
    moment.act(scene)
    scene.bench.settle()
    subjects, kernel = scene.subjects(), scene.bench.kernel
    noted = zip(kernel.steps, kernel.subjects, strict=True)
    counts = Counter(step for step, subject in noted if subject in subjects)
    scene.end(restart=False)
    return Counter({step: n for step, n in counts.items() if (step in GLOBAL) is alone})


Call = tuple[Moment, str, int]
"""A step's n-th call in a moment, from 0."""
CALLS: Final[list[Call]] = [
    (moment, step, nth)
    for moment in MOMENTS
    for alone in (False, True)
    for step, count in calls_of(moment, alone=alone).items()
    if (moment.identified and not moment.is_early) or step == "identify"  # otherwise as with udev
    if moment.backend == "tagged" or step in LOADS  # otherwise as with a tagged key
    for nth in range(count)
]
THAT_FAIL: Final = [call for call in CALLS if call[1] != "our_mappings"]  # has its own test
THAT_HANG: Final = [call for call in CALLS if call[1] not in ON_LOOP]
THAT_HANG_WITH_MEDIUM: Final = [
    call for call in THAT_HANG if call[0].act not in {*DEPARTS, find_leftovers}
]


def name_of(call: Call) -> str:
    """Describe the call."""
    moment, step, nth = call
    return f"{moment.name}: {step} {nth + 1}"


def failures_of(call: Call) -> list[Combination]:
    """Return all failures of the call."""
    numbers = ERRNOS[call[1]]
    return [Combination(*call, n, lasting) for n in numbers for lasting in (False, True)]


def hangs_of(call: Call) -> list[Combination]:
    """Return both ways in which the call can hang."""
    return [Combination(*call, acts_first=acts_first) for acts_first in (False, True)]


# outcomes


@pytest.mark.parametrize("call", THAT_FAIL, ids=name_of)
def test_a_step_that_fails_is_published_is_undone_and_disturbs_no_other_volume(call: Call) -> None:
    for case in failures_of(call):
        with case.under_way() as scene:
            state, reason = scene.published()
            assert state is case.state_after_failure
            assert str(case.error) in reason or state is case.moment.ends_in
            if scene.neighbour is not None and case.moment.act is not stop:
                assert not case.lasting or scene.is_served(scene.plug_another())
                assert scene.is_served(scene.neighbour)
                assert scene.steps_against_the_neighbour() == set()


@pytest.mark.parametrize("call", THAT_HANG, ids=name_of)
def test_a_step_that_hangs_is_published_as_stuck_delays_no_other_volume_and_continues(
    call: Call,
) -> None:
    for case in hangs_of(call):
        with case.under_way() as scene:
            stopping = case.moment.act is stop
            assert scene.neighbour is not None
            other = scene.neighbour if stopping else scene.plug_another()
            scene.bench.wait(LATE_AFTER_S + 1)
            assert scene.bench.serving is not case.precedes_service
            if scene.bench.serving:
                case.assert_stuck(scene)
                if not stopping and case.is_taken_by_the_dm_worker:
                    case.assert_waiting(scene, other)
                elif not stopping:
                    assert scene.is_served(other)
            scene.bench.wait(HANGS_S)
            assert scene.published()[0] is case.moment.ends_in
            if stopping:
                assert scene.bench.registry.entries() == []
            else:
                assert scene.is_served(other)
                assert scene.is_served(scene.neighbour)
                assert scene.steps_against_the_neighbour() == set()


@pytest.mark.parametrize("call", THAT_HANG_WITH_MEDIUM, ids=name_of)
def test_a_step_that_ends_after_its_medium_was_pulled_leaves_nothing(call: Call) -> None:
    for case in hangs_of(call):
        with case.under_way() as scene:
            scene.bench.wait(1)
            scene.bench.pull("sda1")
            scene.bench.wait(HANGS_S)
            had_mount = (
                case.moment.before in {mounted, suspended, crashed} and not case.precedes_service
            )
            unsafe = had_mount or scene.was_mounted()
            assert scene.published()[0] is (State.REMOVED_UNSAFELY if unsafe else State.GONE)
            if case.moment.act is not stop:
                assert scene.neighbour is not None
                assert scene.is_served(scene.neighbour)


@pytest.mark.parametrize("call", THAT_HANG, ids=name_of)
def test_a_medium_put_back_while_a_step_of_its_first_insertion_hangs_is_served(call: Call) -> None:
    for case in hangs_of(call):
        with case.under_way() as scene:
            bench = scene.bench
            bench.wait(1)
            if "sda1" in bench.kernel.media:
                bench.pull("sda1")
            again = bench.insert(LABEL, "sda1")
            bench.wait(HANGS_S)
            if case.moment.act is stop:
                bench.cancel()
                bench.start()
                bench.settle()
            assert scene.is_served(again)


@pytest.mark.parametrize("moment", STARTS, ids=lambda moment: moment.name)
def test_an_agent_that_cannot_list_its_mappings_does_not_start_and_touches_nothing(
    moment: Moment,
) -> None:
    for number in ERRNOS["our_mappings"]:
        with Combination(moment, "our_mappings", 0, number).under_way() as scene:
            bench = scene.bench
            assert str(bench.take_error()) == str(error_of("our_mappings", number))
            assert set(bench.kernel.steps) == {"our_mappings"}
            bench.start()
            bench.settle()
            assert scene.published()[0] is moment.ends_in


# what cannot be seen


def reported_again(scene: Scene) -> None:
    """Report the target once more."""
    scene.bench.appear(scene.target)


def events_lost(scene: Scene) -> None:
    """Have the agent look at all media."""
    scene.bench.lose_events()


def rules_read_again(scene: Scene) -> None:
    """Put the same rules into force."""
    scene.bench.reload_rules(*scene.bench.rules)


def asked_to(verb: str) -> Callable[[Scene], None]:
    """Return an act that asks for this of the target, and goes on whatever the answer is."""

    def ask(scene: Scene) -> None:
        scene.bench.ask(verb, scene.target)

    ask.__name__ = verb
    return ask


STAYS: Final = (
    (unreported, arrive),
    (without_table, start),
    (crashed, start),
    (mounted, reported_again),
    (mounted, events_lost),
    (mounted, read),
    (mounted, rules_read_again),
    (mounted, asked_to("lock")),
    (mounted, asked_to("eject")),
    (mounted, asked_to("retry")),
)
"""Moments of a medium that stays in its socket and in use."""
SEEN_BY: Final = ("mounts", "holders", "is_offline", "look")
"""Steps that read /proc and sysfs."""


@pytest.mark.parametrize("step", SEEN_BY)
@pytest.mark.parametrize(
    ("before", "act"), STAYS, ids=[f"{b.__name__}, {a.__name__}" for b, a in STAYS]
)
def test_what_cannot_be_seen_takes_no_medium_in_use_and_is_served_afterwards(
    before: Callable[[Scene], None], act: Callable[[Scene], None], step: str
) -> None:
    for nth in range(4):
        for number in ERRNOS["mounts"][nth::4]:
            moment = Moment("in use", before, act, State.MOUNTED, held=before is not unreported)
            scene = moment.scene()
            kernel = scene.bench.kernel
            was_mounted = [m.point for m in kernel.mounts]
            kernel.faults.append(Fault(step, error_of(step, number), after=nth, lasting=True))
            act(scene)
            scene.bench.settle()
            assert set(was_mounted) <= {mount.point for mount in kernel.mounts}
            assert "load_error_table" not in kernel.steps
            assert scene.bench.state(scene.target) in {State.MOUNTED, State.FAILED}
            kernel.faults.clear()
            scene.bench.wait(60)
            assert scene.is_served(scene.target), (nth, errno.errorcode[number])
            scene.end(restart=False)


@pytest.mark.parametrize("held", [False, True], ids=["not used", "in use"])
def test_a_departed_medium_whose_mount_cannot_be_seen_is_released_once_it_can(held: bool) -> None:
    scene = Moment("pull", mounted, pull, State.REMOVED_UNSAFELY, held=held).scene()
    bench = scene.bench
    failure = error_of("mounts", errno.EMFILE)
    bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
    bench.pull("sda1")
    bench.settle()
    again = bench.insert(LABEL, "sda1")
    bench.settle()
    assert bench.state(again) is State.CONFLICT
    bench.kernel.faults.clear()
    bench.wait(60)
    assert scene.is_served(again)
    assert scene.published()[0] is State.REMOVED_UNSAFELY
    scene.end(restart=False)


def test_an_agent_that_stops_does_not_wait_for_a_mount_that_cannot_be_seen() -> None:
    scene = Moment("pull", mounted, pull, State.REMOVED_UNSAFELY).scene()
    failure = error_of("mounts", errno.EMFILE)
    scene.bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
    scene.bench.pull("sda1")
    scene.bench.begin_stop()
    scene.bench.wait(60)
    assert scene.bench.registry.entries() == [] or not scene.is_served(scene.target)
    scene.end(restart=True)

from __future__ import annotations

import errno

import pytest

from caam_hotplug.formats.mount_options import leaves_journal, may_lack_replay, without_replay


@pytest.mark.parametrize(
    ("filesystem", "given", "then"),
    [
        ("ext4", ("errors=remount-ro",), ("errors=remount-ro", "noload")),
        ("ext4", ("commit=7", "data=journal", "noload", "acl"), ("noload", "acl")),
        ("ext4", ("journal_checksum", "journal_async_commit"), ("noload",)),
        ("xfs", ("nouuid", "logbsize=32k"), ("nouuid", "logbsize=32k", "norecovery")),
        ("btrfs", ("commit=7",), ("commit=7", "rescue=nologreplay")),
        ("f2fs", (), ("norecovery",)),
        ("vfat", ("utf8",), ("utf8",)),
    ],
)
def test_options_against_a_replay_are_added_and_those_about_the_journal_left_out(
    filesystem: str, given: tuple[str, ...], then: tuple[str, ...]
) -> None:
    assert without_replay(filesystem, given) == then


@pytest.mark.parametrize(
    ("filesystem", "refusal", "may"),
    [
        ("ext4", errno.EROFS, True),
        ("ext4", errno.EIO, False),
        ("btrfs", errno.EIO, True),
        ("btrfs", errno.EROFS, False),
        ("vfat", errno.EROFS, False),
        ("xfs", None, False),
    ],
)
def test_each_filesystem_has_an_error_of_its_own(
    filesystem: str, refusal: int | None, *, may: bool
) -> None:
    assert may_lack_replay(filesystem, refusal) is may


@pytest.mark.parametrize(
    ("shown", "leaves"),
    [
        ("ro,norecovery", True),
        ("ro,noload", True),
        ("ro,rescue=nologreplay,space_cache=v2", True),
        ("ro,rescue=usebackuproot:nologreplay", True),
        ("rw,relatime", False),
        ("", False),
    ],
)
def test_the_options_of_a_mount_say_so(shown: str, *, leaves: bool) -> None:
    assert leaves_journal(shown.split(",")) is leaves

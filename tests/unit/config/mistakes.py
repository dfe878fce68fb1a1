"""Configurations with one mistake, and the fault that names it."""

from __future__ import annotations

FILE_FAULTS = [
    ("mount_rot = 1", "mount_rot: is not a key here; did you mean 'mount_root'?"),
    (
        "xyzzy = 1",
        "xyzzy: is not a key here; known are source, await_udev, blob_directory, "
        "mount_root, log_level, stuck_after_s, stop_within_s, rule",
    ),
    (
        'source = "udve"',
        "source: expected auto, udev, kernel; found 'udve'; did you mean 'udev'?",
    ),
    ("log_level = {}", "log_level: expected debug, info, warning, error; found a table"),
    ('mount_root = "media"', "mount_root: expected an absolute path without .., found 'media'"),
    (
        'blob_directory = "/data/../etc"',
        "blob_directory: expected an absolute path without .., found '/data/../etc'",
    ),
    ("blob_directory = true", "blob_directory: expected a text, found true"),
    (
        'mount_root = "//run/media"',
        "mount_root: expected an absolute path without .., found '//run/media'",
    ),
    ('stuck_after_s = "10"', "stuck_after_s: expected a number, found '10'"),
    ('log_level = "INFO"',
     "log_level: expected debug, info, warning, error; found 'INFO'; did you mean 'info'?"),
    ("stuck_after_s = 0", "stuck_after_s: expected seconds above 0, found 0.0"),
    ("stuck_after_s = nan", "stuck_after_s: expected seconds above 0, found nan"),
    ("rule = 3", "rule: expected tables [[rule]], found 3"),
    ("rule = [3]", "rule[1]: expected a table, found 3"),
    ("[rule]", "rule: expected tables [[rule]], found a table"),
    ("[[rule]]", "rule[1]: needs the key 'name'"),
]  # fmt: skip
"""Pairs of a text and its fault."""


RULE_FAULTS = [
    ("matsch = {}", "matsch: is not a key here; did you mean 'match'?"),
    ("match = 3", "match: expected a table, found 3"),
    ("match.partlable = 'x'", "match.partlable: is not a key here; did you mean 'partlabel'?"),
    (
        "match.bus = ['usb', 'mcm']",
        "match.bus: expected usb, mmc, scsi, ata, nvme, virtio, loop, other; found 'mcm'; "
        "did you mean 'mmc'?",
    ),
    ("match.devtype = 'disc'",
     "match.devtype: expected partition, disk; found 'disc'; did you mean 'disk'?"),
    (
        "match.min_size = '64MB'",
        "match.min_size: expected a size such as 512MiB or 64GiB, found '64MB'",
    ),
    ("action = 'ignroe'",
     "action: expected mount, unlock, ignore; found 'ignroe'; did you mean 'ignore'?"),
    ("on_stop = 1", "on_stop: expected lock, keep; found 1"),
    (
        "key.backend = 'truste'",
        "key.backend: expected auto, tagged, trusted, encrypted; found 'truste'; did you mean "
        "'trusted'?",
    ),
    (
        "key.options = 'blobauth=sword.fish'",  # which is not repeated
        "key.options: expected options such as keyhandle=0x81000001, with values of "
        "A-Z a-z 0-9 : _ - and one space between two of them",
    ),
    ("key.length = 8", "key.length: expected bytes from 16 to 128, or 0, found 8"),
    (
        "key.blob = '../{partlabel}'",
        "key.blob: '../{partlabel}' names a path; expected one file name",
    ),
    ("key.blob = 3", "key.blob: expected a text, found 3"),
    ("crypt.sector_size = 513", "crypt.sector_size: expected 512, 1024, 2048, 4096; found 513"),
    (
        "crypt.sector_size = '512'",
        "crypt.sector_size: expected 512, 1024, 2048, 4096; found '512'",
    ),
    ("match.partlabel = 5", "match.partlabel: expected a text or a list of texts, found 5"),
    ("match.partlabel = []", "match.partlabel: expected at least one entry in the list"),
    ("match.removable = 'yes'", "match.removable: expected true or false, found 'yes'"),
    ("mount.filesystems = []", "mount.filesystems: expected at least one entry in the list"),
    ("crypt.offset = -1", "crypt.offset: expected sectors from 0 on, found -1"),
    ("crypt.iv_offset = -8", "crypt.iv_offset: expected sectors from 0 on, found -8"),
    (
        "crypt.cipher = 'aes xts'",
        "crypt.cipher: expected a cipher such as capi:tk(cbc(aes))-plain, found 'aes xts'",
    ),
    ("mount.path = 3", "mount.path: expected a text, found 3"),
    (
        "mount.path = 'srv/recorder'",
        "mount.path: 'srv/recorder': expected an absolute path such as /srv/recorder",
    ),
    (
        "mount.path = '/srv/../etc'",
        "mount.path: '/srv/../etc': '..': a name must not be empty or start with . or -",
    ),
    (
        "mount.options = 'noexec'",
        "mount.options: expected a list of nosuid, nodev, noexec, nosymfollow, noatime, "
        "nodiratime, relatime, strictatime; found 'noexec'",
    ),
    (
        "mount.filesystems = ['ext4', 'exfta']",
        "mount.filesystems: expected a list of ext4, xfs, btrfs, f2fs, vfat, exfat; found "
        "'exfta'; did you mean 'exfat'?",
    ),
]  # fmt: skip
"""Pairs of a line of a rule and its fault."""

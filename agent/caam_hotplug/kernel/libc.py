"""The functions of the C library and the system calls that Python does not have."""

from __future__ import annotations

from ctypes import (
    c_char_p,
    c_int,
    c_int64,
    c_long,
    c_size_t,
    c_ssize_t,
    c_uint,
    c_uint32,
    c_ulong,
    c_void_p,
)

from caam_hotplug.kernel.ctypes_lib import Function, Library, SystemCall, minus_one


class Libc(Library, soname="libc.so.6", package="libc6"):
    """Another C library with the same interface may lack what is GNU's: see `Function.exists`."""

    epoll_wait = Function(c_int, c_int, c_void_p, c_int, c_int, failure=minus_one)
    free = Function(None, c_void_p)
    fstatfs = Function(c_int, c_int, c_void_p, failure=minus_one)
    getpid = Function(c_int)
    getrandom = Function(c_ssize_t, c_void_p, c_size_t, c_uint, failure=minus_one)
    inotify_add_watch = Function(c_int, c_int, c_char_p, c_uint32, failure=minus_one)
    inotify_init1 = Function(c_int, c_int, failure=minus_one)
    inotify_rm_watch = Function(c_int, c_int, c_int, failure=minus_one)
    mallopt = Function(c_int, c_int, c_int)
    mlock = Function(c_int, c_void_p, c_size_t, failure=minus_one)
    munlock = Function(c_int, c_void_p, c_size_t, failure=minus_one)
    prctl = Function(c_int, c_int, c_ulong, c_ulong, c_ulong, c_ulong, failure=minus_one)
    renameat2 = Function(c_int, c_int, c_char_p, c_int, c_char_p, c_uint, failure=minus_one)
    statx = Function(c_int, c_int, c_char_p, c_int, c_uint, c_void_p, failure=minus_one)
    sync_file_range = Function(c_int, c_int, c_int64, c_int64, c_uint, failure=minus_one)
    syncfs = Function(c_int, c_int, failure=minus_one)
    timerfd_create = Function(c_int, c_int, c_int, failure=minus_one)
    timerfd_settime = Function(c_int, c_int, c_int, c_void_p, c_void_p, failure=minus_one)
    umount2 = Function(c_int, c_char_p, c_int, failure=minus_one)

    # The numbers are the same on every architecture (asm-generic/unistd.h).
    open_tree = SystemCall(428, c_long, c_char_p, c_long)
    move_mount = SystemCall(429, c_long, c_char_p, c_long, c_char_p, c_long)
    fsopen = SystemCall(430, c_char_p, c_long)
    fsconfig = SystemCall(431, c_long, c_long, c_char_p, c_char_p, c_long)
    fsmount = SystemCall(432, c_long, c_long, c_long)
    mount_setattr = SystemCall(442, c_long, c_char_p, c_long, c_void_p, c_size_t)

# SPDX-License-Identifier: Apache-2.0
"""Hearing that a file was touched, from the kernel, without polling: inotify(7) on asyncio.

The *directory* is watched and events are filtered by the file's name, so that a file that is replaced, or
that does not exist yet, is heard of as well.
"""

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_init1.argtypes = [ctypes.c_int]
_libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]

# <sys/inotify.h>
_IN_ATTRIB = 0x4
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_ONLYDIR = 0x01000000
_EVENTS = _IN_ATTRIB | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR

#: struct inotify_event: int wd; uint32_t mask, cookie, len; then *len* bytes of name, padded with zeros.
_EVENT = struct.Struct("=iIII")
_BUFFER_BYTES = 16_384


class FileWatch:
    """Calls back, in the running event loop, whenever one file is touched, made, moved or removed.

    It does not block. The caller closes it, in the loop that it was made in.

    Args:
        path: the file; its directory must exist.
        notify: called without arguments; several events may make one call.

    Raises:
        OSError: no directory, or no inotify instance left (``fs.inotify.max_user_instances``).
    """

    def __init__(self, path: Path, notify: Callable[[], None]) -> None:
        self._name = os.fsencode(path.name)
        self._notify = notify
        self._fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), "inotify_init1")
        try:
            _checked(
                _libc.inotify_add_watch(self._fd, os.fsencode(path.parent), _EVENTS), f"watch {path.parent}"
            )
        except OSError:
            os.close(self._fd)
            raise
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _read(self) -> None:
        try:
            events = os.read(self._fd, _BUFFER_BYTES)
        except BlockingIOError:
            return
        if any(name in (self._name, b"") for name in _names(events)):
            self._notify()


def _names(events: bytes) -> list[bytes]:
    """The file each event is about; empty for those about the directory, or for lost ones (IN_Q_OVERFLOW)."""
    names = []
    offset = 0
    while offset < len(events):
        _, _, _, length = _EVENT.unpack_from(events, offset)
        offset += _EVENT.size
        names.append(events[offset : offset + length].rstrip(b"\0"))
        offset += length
    return names


def _checked(result: int, what: str) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result

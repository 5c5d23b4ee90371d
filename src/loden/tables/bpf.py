# SPDX-License-Identifier: Apache-2.0
"""eBPF programs and maps, loaded through libbpf: the one module that calls bpf(2).

libbpf is there wherever iproute2 is. It is called through ctypes, so that a host needs no compiler for this.

::

    struct bpf_object_open_opts { size_t sz; char *object_name; bool relaxed_maps;
                                  char *pin_root_path; u32 :32; char *kconfig;
                                  char *btf_custom_path; char *kernel_log_buf;
                                  size_t kernel_log_size; u32 kernel_log_level; };
    struct bpf_prog_info        { u32 type, id; ... };
"""

import ctypes
import errno as errnos
import functools
import os
import struct
import sys
from collections.abc import Iterator

import msgspec

from loden.errors import KernelError, NotSupported

_LIBRARY = "libbpf.so.1"
_LOG_BYTES = 1 << 18
_BATCH = 1024

#: EI_DATA of <elf.h>: where an object file says which byte order it is for, and how.
_ORDER_PLACE, _ORDERS = 5, {1: "little", 2: "big"}

_Pointer = ctypes.c_void_p


class _OpenOptions(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("object_name", ctypes.c_char_p),
        ("relaxed_maps", ctypes.c_bool),
        ("pin_root_path", ctypes.c_char_p),
        ("unused", ctypes.c_uint32),
        ("kconfig", ctypes.c_char_p),
        ("btf_custom_path", ctypes.c_char_p),
        ("kernel_log_buf", ctypes.c_void_p),
        ("kernel_log_size", ctypes.c_size_t),
        ("kernel_log_level", ctypes.c_uint32),
    )


class _TestRunOptions(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_char_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_char_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
    )


_INT, _U32, _SIZE, _BYTES = ctypes.c_int, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_char_p
#: Function → its result and its arguments. ctypes takes any of them for an int else.
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "bpf_object__open_mem": (_Pointer, _BYTES, _SIZE, _Pointer),
    "bpf_object__load": (_INT, _Pointer),
    "bpf_object__close": (None, _Pointer),
    "bpf_object__next_map": (_Pointer, _Pointer, _Pointer),
    "bpf_object__next_program": (_Pointer, _Pointer, _Pointer),
    "bpf_map__name": (_BYTES, _Pointer),
    "bpf_map__fd": (_INT, _Pointer),
    "bpf_map__type": (_INT, _Pointer),
    "bpf_map__key_size": (_U32, _Pointer),
    "bpf_map__value_size": (_U32, _Pointer),
    "bpf_map__set_initial_value": (_INT, _Pointer, _BYTES, _SIZE),
    "bpf_program__name": (_BYTES, _Pointer),
    "bpf_program__fd": (_INT, _Pointer),
    "bpf_map_update_elem": (_INT, _INT, _BYTES, _BYTES, ctypes.c_uint64),
    "bpf_map_delete_elem": (_INT, _INT, _BYTES),
    "bpf_map_lookup_elem": (_INT, _INT, _BYTES, _Pointer),
    "bpf_map_get_next_key": (_INT, _INT, _BYTES, _Pointer),
    "bpf_map_lookup_batch": (_INT, _INT, _Pointer, _Pointer, _Pointer, _Pointer, _Pointer, _Pointer),
    "bpf_obj_get_info_by_fd": (_INT, _INT, _Pointer, _Pointer),
    "bpf_prog_test_run_opts": (_INT, _INT, _Pointer),
    "libbpf_num_possible_cpus": (_INT,),
    "libbpf_set_print": (_Pointer, _Pointer),
}
_SETTINGS = ".rodata.settings"
_PER_CPU_ARRAY = 6  # BPF_MAP_TYPE_PERCPU_ARRAY


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY, use_errno=True)
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise NotSupported(
            "load", _LIBRARY, errnos.ENOENT, detail=str(error), hint="install libbpf 1.0 or newer (libbpf1)"
        ) from error
    library.libbpf_set_print(None)  # what it has to say comes back as an error, with the verifier's words
    return library


class Program(msgspec.Struct, frozen=True):
    """A loaded program.

    Args:
        fd: a file descriptor, the object's to close.
        number: the kernel's own (``bpf_prog_info.id``).
    """

    fd: int
    number: int


class Map:
    """A loaded map: keys and values are bytes, laid out as the C source has them.

    Args:
        name: for messages.
        fd: a file descriptor, the object's to close.
        kind: ``BPF_MAP_TYPE_*``.
        key_size, value_size: bytes; of a value per CPU, the whole.
    """

    def __init__(self, name: str, *, fd: int, kind: int, key_size: int, value_size: int) -> None:
        self._name = name
        self._fd = fd
        self._key_size = key_size
        self._value_size = value_size
        if kind == _PER_CPU_ARRAY:
            self._value_size = -(-value_size // 8) * 8 * int(_library().libbpf_num_possible_cpus())

    def put(self, key: bytes, value: bytes) -> None:
        """Write an element, new or not.

        Raises:
            KernelError: E2BIG where the map is full.
        """
        if _library().bpf_map_update_elem(self._fd, key, value, 0):
            raise self._error("write to")

    def delete(self, key: bytes) -> None:
        """Remove an element; one that is not there counts as removed.

        Raises:
            KernelError: the kernel refused.
        """
        if _library().bpf_map_delete_elem(self._fd, key) and ctypes.get_errno() != errnos.ENOENT:
            raise self._error("delete from")

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None where there is none.

        Raises:
            KernelError: the kernel refused.
        """
        value = ctypes.create_string_buffer(self._value_size)
        if not _library().bpf_map_lookup_elem(self._fd, key, value):
            return value.raw
        if ctypes.get_errno() == errnos.ENOENT:
            return None
        raise self._error("read")

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every element. One that is written meanwhile may be among them or not.

        Raises:
            KernelError: the kernel refused.
        """
        keys = ctypes.create_string_buffer(_BATCH * self._key_size)
        values = ctypes.create_string_buffer(_BATCH * self._value_size)
        cursor = ctypes.create_string_buffer(max(self._key_size, 8))
        count = ctypes.c_uint32()
        is_first = True
        while True:
            count.value = _BATCH
            start = None if is_first else cursor
            failed = _library().bpf_map_lookup_batch(
                self._fd, start, cursor, keys, values, ctypes.byref(count), None
            )
            is_last = bool(failed) and ctypes.get_errno() == errnos.ENOENT
            if failed and not is_last:
                raise self._error("read")
            raw_keys, raw_values = keys.raw, values.raw
            for place in range(count.value):
                yield (
                    raw_keys[place * self._key_size : (place + 1) * self._key_size],
                    raw_values[place * self._value_size : (place + 1) * self._value_size],
                )
            if is_last:
                return
            is_first = False

    def _error(self, verb: str) -> KernelError:
        number = ctypes.get_errno()
        hint = (
            "the map is full: the host knows more peers than it has room for"
            if number == errnos.E2BIG
            else ""
        )
        return KernelError(verb, f"eBPF map {self._name}", number, hint=hint)


class Object:
    """The programs and the maps of one object file, loaded. They stay as long as somebody uses them.

    Args:
        image: the object file.
        settings: what its section ``.rodata.settings`` shall hold.

    Raises:
        NotSupported: there is no libbpf, or the object is for processors of the other byte order.
        KernelError: the kernel refused the programs; with the line that the verifier stumbled over.
    """

    def __init__(self, image: bytes, settings: bytes) -> None:
        _require_byte_order(image)
        library = _library()
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = _OpenOptions(
            sz=ctypes.sizeof(_OpenOptions),
            object_name=b"loden",
            kernel_log_buf=ctypes.addressof(log),
            kernel_log_size=_LOG_BYTES,
        )
        self._handle = library.bpf_object__open_mem(image, len(image), ctypes.byref(options))
        if not self._handle:
            raise KernelError("open", "eBPF object", ctypes.get_errno() or errnos.EINVAL)
        try:
            self._load(settings, log)
            self.maps = {name: self._map(name, one) for name, one in self._all("map")}
            self.programs = {name: self._program(name, one) for name, one in self._all("program")}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it; idempotent. Programs that are attached somewhere stay, and their maps."""
        if self._handle:
            _library().bpf_object__close(self._handle)
            self._handle = None

    def _load(self, settings: bytes, log: "ctypes.Array[ctypes.c_char]") -> None:
        library = _library()
        for name, one in self._all("map"):
            if name == _SETTINGS and library.bpf_map__set_initial_value(one, settings, len(settings)):
                raise KernelError("set", f"eBPF settings of {len(settings)} bytes", ctypes.get_errno())
        failed = library.bpf_object__load(self._handle)
        if failed:
            raise KernelError(
                "load", "eBPF programs", -failed, detail=verdict(log.value), hint=_hint(-failed)
            )

    def _all(self, kind: str) -> Iterator[tuple[str, int]]:
        library = _library()
        following = getattr(library, f"bpf_object__next_{kind}")
        name = getattr(library, f"bpf_{kind}__name")
        one = following(self._handle, None)
        while one:
            yield name(one).decode(), one
            one = following(self._handle, one)

    def _map(self, name: str, one: int) -> Map:
        library = _library()
        return Map(
            name,
            fd=library.bpf_map__fd(one),
            kind=library.bpf_map__type(one),
            key_size=library.bpf_map__key_size(one),
            value_size=library.bpf_map__value_size(one),
        )

    def _program(self, name: str, one: int) -> Program:
        library = _library()
        fd = library.bpf_program__fd(one)
        info, size = ctypes.create_string_buffer(256), ctypes.c_uint32(256)
        if library.bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size)):
            raise KernelError("read", f"eBPF program {name}", ctypes.get_errno())
        _type, number = struct.unpack_from("=II", info.raw)
        return Program(fd, number)


def _require_byte_order(image: bytes) -> None:
    """libbpf refuses as well, with a number of its own that says nothing."""
    order = _ORDERS.get(image[_ORDER_PLACE], "no")
    if order != sys.byteorder:
        detail = f"they are compiled for {order}-endian processors, and this one is {sys.byteorder}-endian"
        raise NotSupported("load", "eBPF programs", errnos.ENOEXEC, detail=detail)


def run_once(program: Program, packet: bytes, *, context: bytes = b"") -> tuple[int, bytes]:
    """What a program makes of one packet, without any device (``BPF_PROG_TEST_RUN``).

    Args:
        program: of the type ``sched_cls``.
        packet: from its Ethernet header on.
        context: a ``struct __sk_buff`` to begin with; may be empty.

    Returns:
        the verdict (``TC_ACT_*``, unsigned), and the packet as the program left it.

    Raises:
        KernelError: the kernel cannot run it on that.
    """
    out = ctypes.create_string_buffer(1 << 17)
    options = _TestRunOptions(
        sz=ctypes.sizeof(_TestRunOptions),
        data_in=packet,
        data_size_in=len(packet),
        data_out=ctypes.addressof(out),
        data_size_out=len(out),
        ctx_in=context or None,
        ctx_size_in=len(context),
        repeat=1,
    )
    failed = _library().bpf_prog_test_run_opts(program.fd, ctypes.byref(options))
    if failed:
        raise KernelError("run", "eBPF program", -failed if failed < 0 else ctypes.get_errno())
    return options.retval, out.raw[: options.data_size_out]


def verdict(log: bytes) -> str:
    """The one line of a verifier's log that says what it did not like."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines()]
    telling = [line for line in lines if line and not line.startswith(("processed ", "verification time"))]
    return telling[-1] if telling else ""


def _hint(number: int) -> str:
    if number in (errnos.EPERM, errnos.EACCES):
        return "give the process CAP_BPF and CAP_NET_ADMIN in the machine's own user namespace; " + (
            "a kernel in lockdown allows it to nobody" if os.geteuid() == 0 else "or run it as root"
        )
    return ""

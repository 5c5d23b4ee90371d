# SPDX-License-Identifier: Apache-2.0
"""Ways to speak to etcd from asyncio: what each costs in memory and time (docs/adr/0001-etcd-client.md).

Each runs in a process of its own against one etcd: it is imported, lists many keys, and hears a watch. What
is not installed is said to be missing. ``h2`` is what the store does.
"""

import argparse
import asyncio
import base64
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from bench._common import Arguments, Figure, figure, median, percentile, run, scratch

_PREFIX, _END = b"/coreos.com/network/loden/holders/", b"/coreos.com/network/subnett"


class Client(Protocol):
    """What is compared."""

    async def list(self) -> int:
        """Read every key of the store with its value, turned into values; how many."""
        ...

    async def put(self, key: bytes, value: bytes) -> None: ...

    def watch(self, key: bytes) -> AsyncIterator[object]:
        """One item a message, the first when the watch stands."""
        ...


class H2:
    """The store's own client."""

    def __init__(self, endpoint: str) -> None:
        from loden.stores.access import Access
        from loden.stores.etcd.client import Client
        from loden.stores.etcd.place import parse_location

        self._client = Client(parse_location(endpoint), Access())

    async def list(self) -> int:
        from loden.stores.etcd import messages

        answer = await self._client.call(messages.RANGE, messages.get(_PREFIX, _END), reads=True)
        return len(messages.read_range(answer).found)

    async def put(self, key: bytes, value: bytes) -> None:
        from loden.stores.etcd import messages

        await self._client.call(messages.TXN, messages.txn((), [messages.op_put(key, value)]))

    async def watch(self, key: bytes) -> AsyncIterator[object]:
        from loden.stores.etcd import messages

        async with self._client.stream(messages.WATCH, messages.watch(key, since=0)) as call:
            while (data := await call.receive()) is not None:
                yield messages.read_news(data)


class Grpcio:
    """gRPC's own library, in C++, with the store's messages."""

    def __init__(self, endpoint: str) -> None:
        grpc = importlib.import_module("grpc.aio")
        options = [("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel(endpoint, options=options)

    async def list(self) -> int:
        from loden.stores.etcd import messages

        answer: bytes = await self._channel.unary_unary(messages.RANGE)(messages.get(_PREFIX, _END))
        return len(messages.read_range(answer).found)

    async def put(self, key: bytes, value: bytes) -> None:
        from loden.stores.etcd import messages

        await self._channel.unary_unary(messages.TXN)(messages.txn((), [messages.op_put(key, value)]))

    async def watch(self, key: bytes) -> AsyncIterator[object]:
        from loden.stores.etcd import messages

        call = self._channel.stream_stream(messages.WATCH)()
        await call.write(messages.watch(key, since=0))
        while data := await call.read():
            yield messages.read_news(data)


class GrpcioProtobuf(Grpcio):
    """The same with Google's protobuf, as generated stubs would use it."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._range = _protobuf()

    async def list(self) -> int:
        from loden.stores.etcd import messages

        call = self._channel.unary_unary(messages.RANGE, response_deserializer=self._range.FromString)
        answer = await call(messages.get(_PREFIX, _END))
        return len([(kv.key, kv.value, kv.mod_revision, kv.lease) for kv in answer.kvs])


class Grpclib:
    """gRPC in Python on h2, with Google's protobuf."""

    def __init__(self, endpoint: str) -> None:
        client = importlib.import_module("grpclib.client")
        self._codec = _RawCodec(_protobuf())
        host, _, port = endpoint.partition(":")
        self._channel = client.Channel(host, int(port), codec=self._codec)
        self._methods = client

    async def list(self) -> int:
        from loden.stores.etcd import messages

        method = self._methods.UnaryUnaryMethod(self._channel, messages.RANGE, bytes, self._codec.range)
        answer = await method(messages.get(_PREFIX, _END))
        return len([(kv.key, kv.value, kv.mod_revision, kv.lease) for kv in answer.kvs])

    async def put(self, key: bytes, value: bytes) -> None:
        from loden.stores.etcd import messages

        method = self._methods.UnaryUnaryMethod(self._channel, messages.TXN, bytes, bytes)
        await method(messages.txn((), [messages.op_put(key, value)]))

    async def watch(self, key: bytes) -> AsyncIterator[object]:
        from loden.stores.etcd import messages

        method = self._methods.StreamStreamMethod(self._channel, messages.WATCH, bytes, bytes)
        async with method.open() as stream:
            await stream.send_message(messages.watch(key, since=0))
            async for data in stream:
                yield messages.read_news(data)


class _RawCodec:
    """Requests as they are; answers as they are, or as protobuf where that is asked for."""

    __content_subtype__ = "proto"

    def __init__(self, range_: Any) -> None:
        self.range = range_

    def encode(self, message: bytes, message_type: Any) -> bytes:
        del message_type
        return message

    def decode(self, data: bytes, message_type: Any) -> Any:
        return data if message_type is bytes else message_type.FromString(data)


class Gateway:
    """etcd's JSON gateway, over a small HTTP/1.1 client."""

    def __init__(self, endpoint: str) -> None:
        self._host, _, port = endpoint.partition(":")
        self._port = int(port)
        self._wire: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def _ask(
        self, path: str, body: dict[str, Any]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._wire is None:
            self._wire = await asyncio.open_connection(self._host, self._port, limit=1 << 26)
        reader, writer = self._wire
        text = json.dumps(body).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: e\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text
        )
        return reader, writer

    async def _call(self, path: str, body: dict[str, Any]) -> bytes:
        reader, _ = await self._ask(path, body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"content-length: " in head:
            return await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
        return b"".join([chunk async for chunk in self._chunks(reader)])

    async def _chunks(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while size := int(await reader.readline(), 16):
            yield await reader.readexactly(size)
            await reader.readline()
        await reader.readline()

    async def list(self) -> int:
        import msgspec

        body = {"key": _text(_PREFIX), "range_end": _text(_END)}
        answer = msgspec.json.decode(await self._call("/v3/kv/range", body))
        found = [
            (
                base64.b64decode(kv["key"]),
                base64.b64decode(kv["value"]),
                int(kv["mod_revision"]),
                kv.get("lease"),
            )
            for kv in answer["kvs"]
        ]
        return len(found)

    async def put(self, key: bytes, value: bytes) -> None:
        await self._call("/v3/kv/put", {"key": _text(key), "value": _text(value)})

    async def watch(self, key: bytes) -> AsyncIterator[object]:
        import msgspec

        other = Gateway(f"{self._host}:{self._port}")
        reader, writer = await other._ask("/v3/watch", {"create_request": {"key": _text(key)}})
        await reader.readuntil(b"\r\n\r\n")
        try:
            async for chunk in self._chunks(reader):
                yield msgspec.json.decode(chunk)
        finally:
            writer.close()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _protobuf() -> Any:
    """``RangeResponse`` as protobuf's own class."""
    descriptor = importlib.import_module("google.protobuf.descriptor_pb2")
    pool = importlib.import_module("google.protobuf.descriptor_pool").DescriptorPool()
    factory = importlib.import_module("google.protobuf.message_factory")
    kinds = {"bytes": 12, "int64": 3, "uint64": 4, "bool": 8}
    file = descriptor.FileDescriptorProto(name="etcd.proto", package="e", syntax="proto3")
    for name, fields in {
        "Header": "cluster_id:uint64 member_id:uint64 revision:int64 raft_term:uint64",
        "KeyValue": "key:bytes created:int64 mod_revision:int64 version:int64 value:bytes lease:int64",
        "RangeResponse": "header:Header kvs:*KeyValue more:bool count:int64",
    }.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields.split(), start=1):
            title, _, kind = field.partition(":")
            many, kind = kind.startswith("*"), kind.lstrip("*")
            one = message.field.add(
                name=title, number=number, label=3 if many else 1, type=kinds.get(kind, 11)
            )
            if kind not in kinds:
                one.type_name = f".e.{kind}"
    pool.Add(file)
    return factory.GetMessageClass(pool.FindMessageTypeByName("e.RangeResponse"))


CLIENTS: dict[str, tuple[Callable[[str], Client], tuple[str, ...]]] = {
    "h2": (H2, ("h2.connection", "loden.stores.etcd.client")),
    "grpcio": (Grpcio, ("grpc.aio",)),
    "grpcio+protobuf": (GrpcioProtobuf, ("grpc.aio", "google.protobuf.descriptor_pb2")),
    "grpclib+protobuf": (Grpclib, ("grpclib.client", "google.protobuf.descriptor_pb2")),
    "JSON gateway": (Gateway, ()),
}  # fmt: skip


def measure(arguments: Arguments) -> Iterator[Figure]:
    from bench._etcd import etcd_site  # a child must not have what it measures already
    from loden.lab import namespaces

    with scratch() as directory, etcd_site(Path(directory)) as here:
        here.fill(arguments.leases)
        endpoint = here.url.removeprefix("etcd://").partition("/")[0]
        switch = here.site.state.load().switch
        for name, (_, modules) in CLIENTS.items():
            if missing := [one for one in modules if not _is_installed(one)]:
                yield figure(f"{name}: {missing[0].partition('.')[0]} is not installed", None, "")
                continue
            command = [
                sys.executable,
                "-m",
                "bench.etcd_client",
                "--one",
                name,
                endpoint,
                str(arguments.writes),
            ]
            found = json.loads(
                namespaces.inside(switch, lambda it=command: subprocess.check_output(it, env=os.environ))  # type: ignore[misc]
            )
            for what, (value, unit) in found.items():
                yield figure(f"{name}, {what}", value, unit)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _rss_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("Rss:"))) / 1024


async def _measure_one(name: str, endpoint: str, writes: int) -> dict[str, tuple[float, str]]:
    """In a process of its own."""
    make, modules = CLIENTS[name]
    bare_mb, began = _rss_mb(), time.process_time()
    for module in modules:
        importlib.import_module(module)
    imported_ms, imported_mb = 1000 * (time.process_time() - began), _rss_mb() - bare_mb
    client = make(endpoint)
    took = []
    for _ in range(4):
        began, cpu = time.perf_counter(), time.process_time()
        count = await client.list()
        took.append((time.process_time() - cpu, time.perf_counter() - began))
    listed_mb = _rss_mb() - bare_mb
    heard: list[float] = []
    watch = client.watch(b"/watched")
    await anext(watch)
    for number in range(writes):
        wrote = time.perf_counter()
        await client.put(b"/watched", b"%d" % number)
        await anext(watch)
        heard.append(1000 * (time.perf_counter() - wrote))
    return {
        "import, processor time": (round(imported_ms, 1), "ms"),
        "import, memory": (round(imported_mb, 1), "MB"),
        f"list {count:,} keys, processor time": (round(1000 * min(cpu for cpu, _ in took)), "ms"),
        f"list {count:,} keys, memory with the import": (round(listed_mb, 1), "MB"),
        "put to event, median": (round(median(heard), 2), "ms"),
        "put to event, 90th percentile": (round(percentile(heard, 90), 2), "ms"),
    }


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--leases", type=int, default=10_000, help="two keys each [10000]")
    parser.add_argument("--writes", type=int, default=300, help="heard by a watch [300]")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(asyncio.run(_measure_one(sys.argv[2], sys.argv[3], int(sys.argv[4])))))
        os._exit(0)
    run(measure, about=__doc__, options=_options)

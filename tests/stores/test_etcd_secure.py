# SPDX-License-Identifier: Apache-2.0
"""TLS, users, and whoever answers without being an etcd."""

import asyncio
import logging
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from loden.cli.main import main
from loden.errors import StoreError, StoreUnavailable, StoreUnusable
from loden.options import build_store
from loden.secret import Secret
from loden.stores import open_store
from loden.stores.access import Access
from tests.contract.store import holder, lease, run
from tests.stores.etcd_cluster import Cluster, needs_etcd

pytestmark = [
    needs_etcd,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]

PASSWORD = "geheim-und-lang"


class Authority:
    """Certificates, made in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self._openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca "
            "-keyout ca.key -out ca.crt"
        )

    @property
    def ca(self) -> str:
        return str(self.directory / "ca.crt")

    def issue(self, name: str, *, days: int = 2) -> tuple[str, str]:
        """A certificate for the loopback, and its key; of no day at all, it has expired when it is made."""
        (self.directory / "san").write_text("subjectAltName=IP:127.0.0.1\n")
        self._openssl(
            f"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} "
            f"-keyout {name}.key -out {name}.csr"
        )
        self._openssl(
            f"x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days {days} -extfile san "
            f"-out {name}.crt"
        )
        return str(self.directory / f"{name}.crt"), str(self.directory / f"{name}.key")

    def _openssl(self, command: str) -> None:
        words = ["openssl", *command.split()]
        subprocess.run(words, cwd=self.directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Iterator[Cluster]:
    cert, key = authority.issue("server")
    with Cluster(1, "--cert-file", cert, "--key-file", key, scheme="https") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def users() -> Iterator[Cluster]:
    """An etcd that asks who we are, and forgets within seconds."""
    with Cluster(1, "--auth-token-ttl", "1") as cluster:
        for command in (
            f"user add root:{PASSWORD}",
            f"user add flannel:{PASSWORD}",
            f"user add other:{PASSWORD}",
            "role add flannel",
            "role grant-permission flannel --prefix=true readwrite /coreos.com/network/",
            "user grant-role flannel flannel",
            "user grant-role root root",
            "auth enable",
        ):
            cluster.ctl(*command.split())
        yield cluster


def use(url: str, access: Access) -> None:
    """Write and read with a store, as any host would."""

    async def do() -> None:
        store = open_store(url, access=access)
        try:
            record = await store.create(lease(), holder=holder("a"))
            assert (await store.snapshot()).records[record.key].holder == holder("a")
            await store.delete(await store.replace(record))
        finally:
            await store.close()

    run(do)


def test_authority_alone_is_enough(tls: Cluster, authority: Authority) -> None:
    """W39: flannel takes no authority without a certificate of its own."""
    use(tls.url(), Access(ca_file=authority.ca))
    use(tls.url().replace("etcds://", "etcd://"), Access(ca_file=authority.ca))


def test_member_of_an_unknown_authority_is_not_trusted(tls: Cluster) -> None:
    with pytest.raises(StoreUnavailable, match=r"certificate is not accepted: .*--etcd-cafile"):
        use(tls.url(), Access())


def test_plain_text_to_a_member_that_speaks_tls_is_explained(tls: Cluster) -> None:
    with pytest.raises(StoreUnavailable, match="etcds://"):
        use(tls.url().replace("etcds://", "etcd://"), Access())


def test_tls_to_a_member_that_does_not_is_explained(etcd: Cluster) -> None:
    with pytest.raises(StoreUnavailable, match=r"(at once|does not speak TLS).*etcd://"):
        use(etcd.url().replace("etcd://", "etcds://"), Access())


def test_certificate_of_ours_is_shown_where_it_is_asked_for(authority: Authority) -> None:
    cert, key = authority.issue("server2")
    mine, mine_key = authority.issue("client")
    flags = ("--cert-file", cert, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", authority.ca)
    with Cluster(1, *flags, scheme="https") as cluster:
        use(cluster.url(), Access(ca_file=authority.ca, cert_file=mine, key_file=mine_key))
        with pytest.raises(StoreUnavailable, match="--etcd-certfile"):
            use(cluster.url(), Access(ca_file=authority.ca))


def test_certificate_that_has_expired_is_named(authority: Authority) -> None:
    cert, key = authority.issue("expired", days=0)
    flags = ("--cert-file", cert, "--key-file", key)
    says = r"certificate has expired.*renew it"
    with Cluster(1, *flags, scheme="https") as cluster, pytest.raises(StoreUnavailable, match=says):
        use(cluster.url(), Access(ca_file=authority.ca))


@pytest.mark.parametrize("text", [None, "no PEM at all"])
def test_file_that_cannot_be_used_is_named(tls: Cluster, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StoreUnusable, match=r"ca\.pem: (No such file|no usable PEM).*--etcd-cafile"):
        use(tls.url(), Access(ca_file=str(path)))


def test_user_writes_reads_and_watches_while_tokens_come_and_go(users: Cluster) -> None:
    """etcd forgets a token after a second here; each is replaced without anybody noticing."""

    async def work() -> None:
        access = Access(username="flannel", password=Secret(PASSWORD))
        store, other = (open_store(users.url(), access=access) for _ in range(2))
        try:
            held = await store.create(lease(), holder=holder("a"))
            async with aclosing(other.watch(held.revision)) as events:
                for number in range(2):
                    await asyncio.sleep(2.5)  # twice a token's life
                    held = await store.replace(held)
                    record = lease(f"10.5.{number + 1}.0/24", public=f"192.0.2.{number + 9}")
                    await store.create(record, holder=holder("b"))
                    event = await anext(events)
                    assert event.revision > held.revision
            snapshot = await other.snapshot()
            assert len(snapshot.records) == 3
            for one in (store, other):  # all at once find their token stale
                one._client._token = "stale"  # type: ignore[attr-defined]
                found = await asyncio.gather(*(one.snapshot() for _ in range(5)))
                assert all(it.records.keys() == snapshot.records.keys() for it in found)
            async with aclosing(other.watch(snapshot.revision)) as events:  # with a token long forgotten
                await store.delete(held)
                assert (await anext(events)).revision > snapshot.revision
        finally:
            await store.close()
            await other.close()

    run(work)


@pytest.mark.parametrize(
    ("access", "says"),
    [
        (Access(username="flannel", password=Secret("falsch-falsch")), "invalid user ID or password"),
        (Access(username="nobody", password=Secret(PASSWORD)), "invalid user ID or password"),
        (Access(), "user name is empty"),
        (
            Access(username="other", password=Secret(PASSWORD)),
            r"permission denied.*grant-permission.*/coreos\.com",
        ),
    ],
    ids=["password", "user", "none", "rights"],
)
def test_user_who_may_not_is_told_what_to_change(users: Cluster, access: Access, says: str) -> None:
    with pytest.raises(StoreUnavailable, match=says) as caught:
        use(users.url(), access)
    assert caught.value.hint

    async def watch() -> None:
        store = open_store(users.url(), access=access)
        try:
            async with aclosing(store.watch(1)) as events:
                with pytest.raises(StoreUnavailable, match=says):
                    await anext(events)
        finally:
            await store.close()

    run(watch)


def test_user_where_nobody_is_asked_for_one_is_let_in(etcd: Cluster) -> None:
    use(etcd.url("/user/network"), Access(username="flannel", password=Secret("any")))


def test_password_is_in_no_message(
    users: Cluster, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    access = Access(username="flannel", password=Secret("falsch-falsch"))
    with pytest.raises(StoreError) as caught:
        use(users.url(), access)
    error: BaseException | None = caught.value
    while error is not None:
        assert "falsch-falsch" not in f"{error!r} {error} {getattr(error, '__dict__', '')}"
        error = error.__cause__ or error.__context__
    options = build_store({"etcd-endpoints": [users.endpoints], "etcd-password": ["falsch-falsch"]})
    words = ["--etcd-endpoints", users.endpoints, "--etcd-username", "flannel"]
    assert main(["lease", "list", *words, "--etcd-password", "falsch-falsch"]) == 1
    said = capsys.readouterr()
    for text in (repr(access), str(access), repr(options), caplog.text, said.out, said.err):
        assert "falsch-falsch" not in text
    assert "invalid user ID or password" in said.err


@asynccontextmanager
async def stranger(answer: bytes | None) -> AsyncIterator[str]:
    """The address of somebody who is no etcd: says this to whatever comes, or nothing at all."""
    ended = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1)
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            ended.set()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield f"{host}:{port}"
        await ended.wait()
    finally:
        server.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", r"answers in HTTP/1.*client port"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", r"does not speak HTTP/2.*client port"),
        (b"", r"closed the connection at once.*client port"),
        (b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\xff" * 64, r"HTTP/2|closed|broke"),
    ],
    ids=["http", "ssh", "silent end", "noise"],
)
def test_endpoint_that_is_no_etcd_is_named(answer: bytes, says: str) -> None:
    async def work() -> None:
        async with stranger(answer) as address:
            store = open_store(f"etcd://{address}")
            with pytest.raises(StoreUnavailable, match=says) as caught:
                await store.get_network()
            assert address in str(caught.value)
            await store.close()

    run(work)


def test_endpoint_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loden.stores.etcd.client.CONNECT_S", 0.2)

    async def work() -> None:
        async with stranger(None) as address:
            store = open_store(f"etcd://{address}")
            with pytest.raises(StoreUnavailable, match=r"no answer within 0\.2 s"):
                await store.get_network()
            await store.close()

    run(work)

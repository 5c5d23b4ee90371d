# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

from loden.errors import ConfigError
from loden.stores import SCHEMES, open_store
from tests.contract.store import lease, run


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("etcdd://host", "etcd://, etcds://, memory://, sqlite://"),
        ("/var/lib/loden/loden.db", "etcd://, etcds://, memory://, sqlite://"),
        ("", "begins with one of"),
        ("memory://x?ttl=0", "'0' is no time"),
        ("memory://x?ttl=-5", "is no time"),
        ("memory://x?ttl=inf", "is no time"),
        ("memory://x?ttl=nan", "is no time"),
        ("memory://x?ttl=soon", "is no time"),
        ("memory://x?tll=5", "unknown option 'tll'"),
        ("sqlite://relative.db", "absolute path"),
        ("sqlite:///", "absolute path"),
        ("etcd://", "names no host"),
        ("etcd:///coreos.com/network", "names no host"),
        ("etcd://host:0", "'host:0' is no host and port"),
        ("etcd://host:99999", "is no host and port"),
        ("etcd://fd00::1:2379", "is no host and port"),
        ("etcd://host?tls=yes", "unknown option 'tls'"),
        ("etcds://root:geheim@host:2379", "LODEN_ETCD_PASSWORD"),
        ("etcd://root:geheim@host:2379?tll=5", "a URL with a user in it has the unknown option 'tll'"),
        ("ectd://root:geheim@host:2379", "a URL with a user in it names no kind of store"),
    ],
)
def test_open_store_says_what_is_wrong_with_a_url(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_store(url)
    assert "geheim" not in str(caught.value)


def test_open_store_takes_the_time_of_leases() -> None:
    assert open_store("memory://x").ttl_s == 86_400
    assert open_store("memory://x?ttl=12.5").ttl_s == 12.5


@pytest.mark.parametrize("slashes", ["//", "///"])
def test_open_store_takes_three_or_four_slashes(tmp_path: Path, slashes: str) -> None:
    path = tmp_path / "50% off #1" / "loden.db"

    async def work() -> None:
        store = open_store(f"sqlite:{slashes}{path}")
        try:
            await store.create(lease(), holder=None)
        finally:
            await store.close()

    run(work)
    assert path.exists()


def test_every_scheme_has_its_module() -> None:
    for scheme, module in SCHEMES.items():
        open_store(f"{scheme}://{'' if scheme == 'sqlite' else 'no.where'}/nowhere")
        assert module in sys.modules

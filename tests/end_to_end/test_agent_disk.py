# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or not writable, stores that break: what stood stands, and mending them is enough."""

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from loden.stores.base import Store
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import VXLAN, wait_until


@contextmanager
def mounted(path: Path, *options: str) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(("mode=0755", *options)), "tmpfs", path], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_full_disk_keeps_the_old_file_and_the_data_path(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    one, two = hosts
    with mounted(one.subnet_file.parent, "size=16k"):
        agent, other = hosts.up()
        before = one.subnet_file.read_text()
        agent.kill()
        other.kill()
        filler = one.subnet_file.with_name("filler")
        fill(filler)
        agent = one.start("--iface", "eth0", "--healthz-port", "8081")
        said = agent.wait_line("ERROR", "writing the subnet file fails, trying again")
        assert f"write {one.subnet_file}: No space left on device" in said
        assert "--subnet-file" in said
        assert (one.get("/healthz", 8081), one.get("/readyz", 8081)) == (200, 503)
        assert "READY" not in agent.told
        assert one.subnet_file.read_text() == before
        # Meanwhile a peer moves, and is followed.
        fresh = two.start("--iface", "eth0", "--public-ip", "198.18.0.200").wait_ready()
        wait_until("the moved peer", lambda: any("198.18.0.200" in line for line in one.fdb()))
        fresh.stop()
        two.start().wait_ready()
        wait_until("the peer back again", lambda: any(two.address in line for line in one.fdb()))
        assert len(agent.lines("ERROR")) == 1
        filler.unlink()
        agent.wait_ready()
        wait_until("the firewall's rules stand", lambda: one.get("/readyz", 8081) == 200)
        assert one.subnet_file.read_text() == before
        assert sorted(os.listdir(one.subnet_file.parent)) == [one.subnet_file.name]
        hosts.require_all_reached()
        agent.kill()
        two.agents[-1].kill()


def test_corrupt_store_at_start_is_said(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.store_file.parent.mkdir()
    hosts.store_file.write_bytes(b"not a database, whatever it was" * 200)
    agent = host.start()
    assert agent.process.wait(10) == 1
    assert f"loden: use store {hosts.store_file}: file is not a database" in agent.log
    assert "hint: name another file with --store, or" in agent.log
    assert "Traceback" not in agent.log


def test_store_that_cannot_be_written_at_start_is_said(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    with mounted(hosts.store_file.parent):
        hosts.put_network(VXLAN)
        subprocess.run(["mount", "-o", "remount,bind,ro", hosts.store_file.parent], check=True)
        agent = host.start()
        assert agent.process.wait(10) == 1
        assert str(hosts.store_file) in agent.log
        assert "hint: " in agent.log
        assert "Traceback" not in agent.log


def test_store_on_a_full_disk_is_waited_for(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(ttl_s=4.0)
    with mounted(hosts.store_file.parent, "size=1m"):
        agents = hosts.up()
        before = [host.state() for host in hosts]
        filler = hosts.store_file.with_name("filler")
        fill(filler)
        for agent in agents:
            said = agent.wait_line("ERROR", "keeping the lease fails, trying again", "the disk is full")
            assert f"free some space on the file system of {hosts.store_file}" in said
        assert [host.state() for host in hosts] == before
        hosts.require_all_reached()
        filler.unlink()
        for agent in agents:
            agent.wait_line("keeping the lease works again")
            assert len(agent.lines("ERROR", "keeping the lease")) == 1
        wait_until("all as before", lambda: [host.state() for host in hosts] == before)
        hosts.require_all_reached()
        for agent in agents:
            agent.kill()


def test_store_that_turns_corrupt_is_waited_for(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(ttl_s=6.0)
    agents = hosts.up()
    before = [host.state() for host in hosts]
    image = backup(hosts.store_file)
    broken = hosts.store_file.with_name("broken")
    broken.write_bytes(b"rubbish" * 1000)
    replace(broken, hosts.store_file)
    for agent in agents:
        agent.wait_line("ERROR", "watching the leases fails, trying again", "not a database")
    assert [host.state() for host in hosts] == before
    hosts.require_all_reached()
    good = hosts.store_file.with_name("good")
    good.write_bytes(image)
    replace(good, hosts.store_file)
    for agent in agents:
        agent.wait_line("watching the leases works again")
        assert len(agent.lines("ERROR", "watching the leases")) == 1
    wait_until("all as before", lambda: [host.state() for host in hosts] == before)
    hosts.require_all_reached()

    async def touch(store: Store) -> None:
        await store.put_network(VXLAN.encode())

    hosts.with_store(touch)


def backup(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.read_bytes()


def replace(source: Path, target: Path) -> None:
    for name in (f"{target.name}-wal", f"{target.name}-shm"):
        target.with_name(name).unlink(missing_ok=True)
    source.replace(target)

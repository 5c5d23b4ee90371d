# SPDX-License-Identifier: Apache-2.0
"""The own lease of a running agent: renewed, reserved, released, stolen."""

import re
import signal
import time

import msgspec

from loden.address import Family, Prefix, parse_address
from loden.lease import Lease, Leg
from loden.stores.base import Holder, Record, Store
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import VXLAN, wait_until


def test_renewal_keeps_the_lease_and_its_holder(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(ttl_s=1.0)
    agents = hosts.up()
    before = {key: (one.holder, one.lease) for key, one in hosts.leases().items()}
    for agent in agents:
        agent.wait_lines(3, "lease renewed")
    assert {key: (one.holder, one.lease) for key, one in hosts.leases().items()} == before
    assert not [line for agent in agents for line in agent.lines("ERROR")]
    hosts.require_all_reached()


def test_reservation_of_a_living_lease_stays_one(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=1, ttl_s=1.0)
    (agent,) = hosts.up(containers=False)
    agent.wait_line("lease renewed")

    async def reserve(store: Store) -> Record:
        (record,) = (await store.snapshot()).records.values()
        return await store.replace(msgspec.structs.replace(record, expires=None))

    reserved = hosts.with_store(reserve)
    renewals = len(agent.lines("lease renewed"))
    time.sleep(2.0)  # twice its time: it would have been renewed, or have ended
    assert len(agent.lines("lease renewed")) <= renewals + 1
    assert hosts.leases()[hosts[0].subnet] == reserved
    assert not agent.lines("ERROR")
    agent.kill()
    hosts[0].start().wait_ready()
    (record,) = hosts.leases().values()
    assert record.is_reservation
    assert record.key == reserved.key


def test_released_lease_is_taken_again_at_once(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    one, two = hosts
    agent, _ = hosts.up()
    before, was = one.subnet, hosts.leases()[one.subnet]

    async def release(store: Store) -> None:
        await store.delete(was)

    hosts.with_store(release)
    agent.wait_line("ERROR", f"lease lost subnet={before}: it was released or ran out; taking it again")
    agent.wait_line("lease taken again", before)
    assert hosts.leases()[before].lease == was.lease
    assert one.subnet == before
    wait_until("the route to it", lambda: len(two.routes()) == 1)
    hosts.require_all_reached()


def test_lease_stolen_while_suspended_makes_way_for_another(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=3, ttl_s=3.0)
    one, two, _ = hosts
    agent, other, third = hosts.up()
    third.stop()
    lost = one.subnet
    agent.process.send_signal(signal.SIGSTOP)
    wait_until("the lease ran out", lambda: lost not in hosts.leases())

    async def steal(store: Store) -> Record:
        legs = {
            Family.IPV4: Leg(
                Prefix.parse(lost),
                parse_address("198.18.0.99"),
                b'{"VNI":1,"VtepMAC":"02:00:00:00:00:63"}',
            )
        }
        return await store.create(Lease.make(legs, "vxlan"), holder=Holder("thief", "thief"), reserve=True)

    hosts.with_store(steal)
    agent.process.send_signal(signal.SIGCONT)
    agent.wait_line("ERROR", f"lease lost subnet={lost}", "host 'thief' took it", "suspended")
    said = agent.wait_line("ERROR", f"subnet changed old={lost}", "start them again")
    new = re.search(r"new=(\S+):", said)
    assert new is not None
    wait_until("subnet.env", lambda: one.subnet == new[1])
    old_base, new_base = (f"inet {subnet.partition('/')[0]}/32" for subnet in (lost, new[1]))
    wait_until("the address", lambda: old_base not in one.ip("addr show flannel.1"))
    assert new_base in one.ip("addr show flannel.1")
    one.ip("link delete cni0")  # whose subnet is the thief's now
    wait_until("the thief is a peer", lambda: any(lost in route for route in one.routes()))
    wait_until("the peer follows", lambda: any(new[1] in route for route in two.routes()))
    wait_until(
        "the peer goes to the thief",
        lambda: "02:00:00:00:00:63 dst 198.18.0.99" in two.fdb(),
    )
    assert not other.lines("ERROR")
    assert len(agent.lines("lease lost")) == 1


def test_lost_lease_is_kept_looking_for_while_the_range_is_full(make_hosts: MakeHosts) -> None:
    narrow = '{"Network": "10.5.0.0/24", "SubnetLen": 26}'
    hosts = make_hosts(count=2, ttl_s=600.0)
    one, two = hosts
    agent, _ = hosts.up(narrow)
    was = hosts.leases()[one.subnet]

    async def give_away(store: Store) -> list[Record]:
        await store.delete(was)
        taken = []
        for base in ("10.5.0.64", "10.5.0.128", "10.5.0.192"):
            prefix = Prefix.parse(f"{base}/26")
            if str(prefix) != two.subnet:
                legs = {Family.IPV4: Leg(prefix)}
                taken.append(await store.create(Lease.make(legs), holder=None, reserve=True))
        return taken

    agent.process.send_signal(signal.SIGSTOP)
    taken = hosts.with_store(give_away)
    agent.process.send_signal(signal.SIGCONT)
    agent.wait_line("ERROR", "lease lost")
    agent.wait_line("ERROR", "keeping the lease fails", "10.5.0.0/24")
    agent.wait_line("ERROR", f"lease let go subnet={was.lease}: it is not ours")
    wait_until("nothing is sent to the network", lambda: one.state() == ([], [], []))
    assert "flannel.1" not in one.ip("-o link")
    assert one.subnet == str(was.lease)
    ours = next(record for record in taken if str(record.lease) == str(was.lease))

    async def give_back(store: Store) -> None:
        await store.delete(ours)

    hosts.with_store(give_back)
    agent.wait_line("lease taken again")
    assert len(agent.lines("ERROR")) == 3
    hosts.require_all_reached()


def test_subnet_is_let_go_before_its_lease_ends_and_held_again_after(make_hosts: MakeHosts) -> None:
    """The store is away for too long, and nobody can say to whom the subnet belongs then."""
    hosts = make_hosts(count=2, ttl_s=3.0)
    one, two = hosts
    agents = hosts.up()
    subnets = {host.name: host.subnet for host in hosts}
    with hosts.locked_store():
        for agent in agents:
            agent.wait_line("ERROR", "lease let go", "it could not be renewed before its end")
        for host in hosts:
            wait_until("nothing is sent", lambda host=host: host.state() == ([], [], []))  # type: ignore[misc]
            assert "flannel.1" not in host.ip("-o link")
            assert host.subnet == subnets[host.name]
    for agent in agents:
        agent.wait_line("loden.keeper: lease", " again subnet=")
    wait_until("they are back", lambda: all(host.routes() for host in hosts))
    assert {host.name: host.subnet for host in hosts} == subnets
    hosts.require_all_reached(one, two)


def test_short_lease_survives_without_gap(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(ttl_s=1.0)
    hosts.up(VXLAN)
    seen = {len(hosts.leases()) for _ in range(40)}
    assert seen == {2}

# SPDX-License-Identifier: Apache-2.0
"""A host comes to its route, keeps it, and costs the cloud little: each call, in order, with what it says."""

import pytest

from loden.address import Prefix
from loden.stores.memory import MemoryStore
from tests.clouds.agents import Agent, run
from tests.clouds.site import AlibabaSite, AwsSite, GoogleSite, Site, subnet

OWN = subnet(1)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(request.node.nodeid, ttl_s=86_400.0)


async def started(site: Site, store: MemoryStore, number: int = 1, **options: object) -> Agent:
    agent = Agent(site, number, options)
    await agent.join(store, subnet(number))
    await agent.look()
    return agent


async def again(agent: Agent, store: MemoryStore) -> Agent:
    """The same host after its agent was killed and started again."""
    for record in (await store.snapshot()).records.values():
        if record.holder is not None and record.holder.id == f"host-{agent.number}":
            await store.delete(record)
    fresh = Agent(agent.site, agent.number)
    await fresh.join(store, subnet(agent.number))
    return fresh


class TestEveryCloud:
    def test_first_start_makes_the_route_and_what_it_needs(self, site: Site, store: MemoryStore) -> None:
        async def work() -> None:
            agent = await started(site, store)
            assert agent.failures == []
            assert agent.routes.is_standing

        run(work())
        assert site.routes() == {str(OWN): site.target(1)}
        assert site.machines[0].address in site.double.view().free

    def test_restart_with_everything_in_place_writes_nothing(self, site: Site, store: MemoryStore) -> None:
        """COMPAT §8.1: flannel deletes and creates its route at each start, which stops packets."""

        async def work() -> None:
            agent = await started(site, store)
            fresh = await again(agent, store)
            site.journal.clear()
            await fresh.look()
            assert fresh.routes.is_standing

        run(work())
        assert site.journal.writes == []
        assert len(site.journal.calls) <= 4

    def test_steady_state_is_one_listing_an_interval(self, site: Site, store: MemoryStore) -> None:
        async def work() -> None:
            agent = await started(site, store)
            site.journal.clear()
            for _ in range(3):
                await agent.look()
                await agent.settle()

        run(work())
        assert site.journal.writes == []
        assert len(site.calls(site.LIST)) == 3
        assert len(site.journal.calls) == 6  # beside each listing, one question about this instance

    def test_start_with_one_change_takes_five_calls_at_most(self, site: Site, store: MemoryStore) -> None:
        async def work() -> None:
            agent = await started(site, store)
            fresh = await again(agent, store)
            remove(site, OWN)
            site.journal.clear()
            await fresh.look()
            assert fresh.routes.is_standing

        run(work())
        assert [call.action for call in site.journal.writes] == [site.ADD]
        assert len(site.journal.calls) <= 5

    def test_route_that_somebody_removed_is_put_back(self, site: Site, store: MemoryStore) -> None:
        async def work() -> None:
            agent = await started(site, store)
            remove(site, OWN)
            await agent.look()
            assert agent.routes._reconciler.statistics.drifted == 1

        run(work())
        assert site.routes() == {str(OWN): site.target(1)}

    def test_another_subnet_is_added_before_the_old_one_goes(self, site: Site, store: MemoryStore) -> None:
        async def work() -> None:
            agent = await started(site, store)
            site.journal.clear()
            moved = Agent(site, 1)
            record = await moved.join(store, subnet(77))
            agent.stand(record)
            await agent.settle()
            assert agent.failures == []

        run(work())
        assert site.routes() == {str(subnet(77)): site.target(1)}
        assert [call.action for call in site.journal.writes] == [site.ADD, site.REMOVE]

    def test_route_of_a_host_before_us_is_replaced_without_a_gap(
        self, site: Site, store: MemoryStore
    ) -> None:
        site.put_fabric(OWN, 2)
        seen: list[bool] = []
        for action in {site.ADD, site.REMOVE, site.REPLACE}:
            site.journal.before(action, lambda: seen.append(str(OWN) in site.routes()))

        async def work() -> None:
            agent = await started(site, store)
            assert agent.failures == []

        run(work())
        assert site.routes() == {str(OWN): site.target(1)}
        assert seen
        assert all(seen)
        if not isinstance(site, GoogleSite):  # which has nothing like it
            assert len(site.calls(site.REPLACE)) == 1
            assert site.calls(site.ADD) == site.calls(site.REMOVE) == []

    def test_foreign_route_is_named_and_left_and_everything_else_goes_on(
        self, site: Site, store: MemoryStore
    ) -> None:
        name = site.put_foreign(OWN)
        before = site.double.view()

        async def work() -> None:
            agent = await started(site, store)
            assert len(agent.failures) == 1
            assert name in agent.failures[0]
            assert "somebody else's" in agent.failures[0]
            assert "remove that route" in agent.failures[0]
            assert not agent.routes.is_standing
            assert agent.failures[0] == agent.routes.problem

        run(work())
        assert site.calls(site.ADD) == site.calls(site.REMOVE) == []
        assert site.double.view().routes == before.routes
        assert site.machines[0].address in site.double.view().free

    def test_routes_of_others_are_never_touched(self, site: Site, store: MemoryStore) -> None:
        """COMPAT §8.3: flannel deleted every entry that led to its instance."""
        site.put_foreign(Prefix.parse("10.77.0.0/16"))
        site.put_fabric(subnet(2), 2)
        before = site.routes()

        async def work() -> None:
            agent = await started(site, store)
            neighbour = Agent(site, 2)
            await neighbour.join(store, subnet(2))
            await agent.look()

        run(work())
        assert {dst: hop for dst, hop in site.routes().items() if dst != str(OWN)} == before
        assert site.calls(site.REMOVE) == []

    def test_hosts_side_by_side_have_one_route_each(self, site: Site, store: MemoryStore) -> None:
        async def work() -> None:
            agents = [await started(site, store, number) for number in (1, 2, 3)]
            for agent in agents:
                await agent.look()
                assert agent.failures == []

        run(work())
        assert site.routes() == {str(subnet(number)): site.target(number) for number in (1, 2, 3)}
        assert len(site.calls(site.ADD)) == 3

    def test_dead_hosts_route_goes_after_the_grace_period(self, site: Site, store: MemoryStore) -> None:
        """The instance is gone: a blackhole at Amazon, a warning at Google, a dead next hop at Alibaba."""

        async def work() -> None:
            agents = [await started(site, store, number, GracePeriod=100) for number in (1, 2, 3)]
            for key in [key for key in (await store.snapshot()).records if "10.5.3." in key]:
                await store.delete((await store.snapshot()).records[key])
            site.double.terminate("h3")
            site.journal.clear()
            for now_s in range(0, 300, 50):
                for agent in agents[:2]:
                    agent.now_s = now_s
                    await agent.look()
                assert (str(subnet(3)) in site.routes()) is (now_s < 100)

        run(work())
        assert len(site.calls(site.REMOVE)) == 1


def remove(site: Site, dst: Prefix) -> None:
    """As somebody would."""
    match site:
        case AwsSite():
            table = site.double.main_table
            site.double.call("DeleteRoute", RouteTableId=table, DestinationCidrBlock=str(dst))
        case GoogleSite():
            routes = site.double.routes
            for name in [name for name, route in routes.items() if route["destRange"] == str(dst)]:
                del routes[name]
        case AlibabaSite():
            del site.double.tables[site.double.main_table]["entries"][str(dst)]


class TestAws:
    def test_calls_are_these(self, aws: AwsSite, store: MemoryStore) -> None:
        run(started(aws, store))
        assert aws.journal.actions == [
            "DescribeRouteTables",
            "CreateRoute",
            "DescribeNetworkInterfaces",
            "ModifyNetworkInterfaceAttribute",
            "CreateTags",
        ]
        assert aws.calls("DescribeRouteTables")[0].parameters == {
            "Filter.1.Name": "vpc-id",
            "Filter.1.Value.1": aws.double.vpc,
        }
        assert aws.calls("CreateRoute")[0].parameters == {
            "RouteTableId": aws.double.main_table,
            "DestinationCidrBlock": "10.5.1.0/24",
            "NetworkInterfaceId": aws.target(1),
        }
        assert aws.calls("ModifyNetworkInterfaceAttribute")[0].parameters == {
            "NetworkInterfaceId": aws.target(1),
            "SourceDestCheck.Value": "false",
        }

    def test_table_of_the_subnet_comes_before_the_main_one(self, aws: AwsSite, store: MemoryStore) -> None:
        own = self.add_table(aws, subnet_of=1)
        run(started(aws, store))
        assert aws.double.routes(own) == {"10.5.1.0/24": aws.target(1)}
        assert aws.double.routes() == {}

    def add_table(self, aws: AwsSite, *, subnet_of: int = 0) -> str:
        answer: str = aws.double.call("CreateRouteTable", VpcId=aws.double.vpc)
        table = answer.partition("<routeTableId>")[2].partition("<")[0]
        if subnet_of:
            where = aws.double.subnets[aws.machines[subnet_of - 1].subnet]
            aws.double.call("AssociateRouteTable", RouteTableId=table, SubnetId=where)
        return table

    @pytest.mark.parametrize("page_size", [0, 1, 2])
    def test_table_is_found_on_any_page(self, aws: AwsSite, store: MemoryStore, page_size: int) -> None:
        for _ in range(3):
            self.add_table(aws)
        own = self.add_table(aws, subnet_of=1)
        aws.double.page_size = page_size

        async def work() -> None:
            agent = await started(aws, store)
            aws.journal.clear()
            await agent.look()

        run(work())
        assert aws.double.routes(own) == {"10.5.1.0/24": aws.target(1)}
        assert aws.journal.writes == []

    def test_several_tables_each_get_what_they_miss(self, aws: AwsSite, store: MemoryStore) -> None:
        tables = [self.add_table(aws) for _ in range(3)]
        aws.double.call(
            "CreateRoute",
            RouteTableId=tables[1],
            DestinationCidrBlock=str(OWN),
            NetworkInterfaceId=aws.target(1),
        )

        async def work() -> None:
            agent = await started(aws, store, RouteTableID=tables)
            assert agent.failures == []

        run(work())
        assert [call.parameters["RouteTableId"] for call in aws.calls("CreateRoute")] == [
            tables[0],
            tables[2],
        ]
        assert all(aws.double.routes(table) == {str(OWN): aws.target(1)} for table in tables)
        assert len(aws.calls("DescribeRouteTables")) == 1

    def test_one_full_table_of_several_leaves_the_others_their_routes(
        self, aws: AwsSite, store: MemoryStore
    ) -> None:
        tables = [self.add_table(aws) for _ in range(2)]
        aws.fail("CreateRoute", 400, "RouteLimitExceeded")

        async def work() -> None:
            agent = await started(aws, store, RouteTableID=tables)
            assert tables[0] in agent.failures[0]
            await agent.look()
            assert agent.failures == []

        run(work())

    def test_route_over_another_interface_of_ours_is_turned(self, aws: AwsSite, store: MemoryStore) -> None:
        other = aws.double.add_interface("h1", "198.18.1.77", aws.machines[1].subnet)
        aws._create(OWN, NetworkInterfaceId=other)
        run(started(aws, store))
        assert aws.routes() == {str(OWN): aws.target(1)}
        assert len(aws.calls("ReplaceRoute")) == 1

    def test_the_interface_with_our_address_is_the_one(self, aws: AwsSite, store: MemoryStore) -> None:
        other = aws.double.add_interface("h1", "198.18.1.77", aws.machines[1].subnet)

        async def work() -> None:
            agent = Agent(aws, 1, address=bytes((198, 18, 1, 77)))
            await agent.join(store, OWN)
            await agent.look()

        run(work())
        assert aws.routes() == {str(OWN): other}
        assert aws.calls("ModifyNetworkInterfaceAttribute")[0].parameters["NetworkInterfaceId"] == other

    def test_blackhole_in_our_place_is_replaced_without_asking(
        self, aws: AwsSite, store: MemoryStore
    ) -> None:
        """Whose it was cannot be found out any more: the interface is gone."""
        aws._create(OWN, NetworkInterfaceId=aws.target(2))
        aws.double.terminate("h2")

        async def work() -> None:
            agent = await started(aws, store)
            assert agent.failures == []

        run(work())
        assert aws.routes() == {str(OWN): aws.target(1)}
        assert len(aws.calls("ReplaceRoute")) == 1

    def test_blackholes_that_are_no_hosts_subnets_stay(self, aws: AwsSite, store: MemoryStore) -> None:
        """COMPAT §8.1: flannel deletes every blackhole in its network at each start."""
        others = [Prefix.parse(text) for text in ("10.77.0.0/16", "10.5.64.0/20", "10.5.7.128/25")]
        for dst in others:
            aws._create(dst, NetworkInterfaceId=aws.target(2))
        aws.double.terminate("h2")

        async def work() -> None:
            agent = await started(aws, store, GracePeriod=10)
            agent.now_s = 1000.0
            for _ in range(2):
                await agent.look()

        run(work())
        assert set(aws.routes()) == {str(OWN), *map(str, others)}
        assert aws.calls("DeleteRoute") == []

    def test_check_switched_on_behind_our_back_is_repaired(self, aws: AwsSite, store: MemoryStore) -> None:
        async def work() -> None:
            agent = await started(aws, store)
            aws.switch_check(1, on=True)
            assert aws.machines[0].address not in aws.double.view().free
            await agent.look()
            assert agent.routes._reconciler.statistics.drifted == 1

        run(work())
        assert aws.machines[0].address in aws.double.view().free

    def test_route_to_a_host_with_our_tag_is_known_as_ours(self, aws: AwsSite, store: MemoryStore) -> None:
        aws._create(OWN, NetworkInterfaceId=aws.target(3))

        async def work() -> None:
            agent = await started(aws, store)
            assert "somebody else's" in agent.failures[0]  # for all that can be known
            aws.tag(3)
            await agent.look()
            assert agent.failures == []

        run(work())

    def test_route_to_the_address_of_the_last_lease_is_known_as_ours(
        self, aws: AwsSite, store: MemoryStore
    ) -> None:
        """flannel's hosts have no tag."""

        async def work() -> None:
            first, last = await started(aws, store, 1), Agent(aws, 3)
            record = await last.join(store, subnet(3))
            aws._create(subnet(3), NetworkInterfaceId=aws.target(3))
            first.routes.take(await store.snapshot())
            await store.delete(record)
            for now_s in (0.0, 600.0):
                first.now_s = now_s
                await first.look()

        run(work())
        assert aws.routes() == {str(OWN): aws.target(1)}

    def test_ipv6_goes_under_the_name_that_it_has_there(self, aws: AwsSite) -> None:
        cloud = aws.cloud()
        wide = Prefix.parse("2001:db8:5:1::/64")
        cloud.add(aws.double.main_table, wide)
        assert aws.calls("CreateRoute")[0].parameters["DestinationIpv6CidrBlock"] == str(wide)
        assert [route.dst for route in cloud.list_routes().routes] == [wide]
        cloud.remove(cloud.list_routes().routes[0])
        assert cloud.list_routes().routes == ()

    def test_fifty_routes_say_the_quota_and_how_to_raise_it(
        self, aws: AwsSite, store: MemoryStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        aws.double.limit = 45
        for number in range(45):
            aws._create(Prefix.parse(f"10.9.{number}.0/24"), NetworkInterfaceId=aws.target(2))

        async def work() -> None:
            agent = await started(aws, store)
            assert "holds 45 routes, the account's quota is 50 [RouteLimitExceeded]" in agent.failures[0]
            assert "raise 'Routes per route table' in Service Quotas" in agent.failures[0]
            aws.double.limit = 100
            await agent.look()
            assert agent.failures == []

        run(work())
        assert "cloud routes nearly full" in caplog.text
        assert len(aws.calls("GetServiceQuota")) == 1


class TestGoogle:
    def test_calls_are_these(self, google: GoogleSite, store: MemoryStore) -> None:
        run(started(google, store))
        assert google.journal.actions == [
            "routes.list",
            "routes.insert",
            "globalOperations.wait",
            "instances.get",
        ]
        sent = google.calls("routes.insert")[0].parameters
        assert sent == {
            "project": "lab-project",
            "name": "flannel-10-5-1-0-24",
            "description": "made by loden",
            "network": "projects/lab-project/global/networks/lab-network",
            "destRange": "10.5.1.0/24",
            "nextHopInstance": google.target(1),
            "priority": "1000",
            "tags": "[]",
        }

    def test_operation_that_takes_its_time_is_awaited(self, google: GoogleSite, store: MemoryStore) -> None:
        google.double.polls = 3
        run(started(google, store))
        assert len(google.calls("globalOperations.wait")) == 3

    def test_six_hundred_routes_are_read_in_pages(self, google: GoogleSite, store: MemoryStore) -> None:
        google.double.limit = 1000
        for number in range(600):
            dst = f"10.{64 + number // 250}.{number % 250}.0/24"
            google.double.put_route(f"a{number:03}", dst, nextHopIp="198.18.9.9")

        async def work() -> None:
            agent = await started(google, store)
            google.journal.clear()
            await agent.look()

        run(work())
        assert google.journal.writes == []
        assert [call.parameters.get("pageToken") for call in google.calls("routes.list")] == [None, "500"]

    @pytest.mark.parametrize("wrong", [{"priority": 900}, {"tags": ["web"]}])
    def test_route_of_ours_that_is_not_as_it_should_be_is_made_anew(
        self, google: GoogleSite, store: MemoryStore, wrong: dict[str, object]
    ) -> None:
        google.put_fabric(OWN, 1)
        google.double.routes["flannel-10-5-1-0-24"].update(wrong)
        run(started(google, store))
        assert list(google.double.routes) == ["flannel-10-5-1-0-24-2"]
        assert [call.action for call in google.journal.writes] == ["routes.insert", "routes.delete"]

    def test_replacement_that_was_cut_short_is_finished(self, google: GoogleSite, store: MemoryStore) -> None:
        google.put_fabric(OWN, 2)
        hop = f"https://www.googleapis.com/compute/v1/{google.target(1)}"
        google.double.put_route("flannel-10-5-1-0-24-2", str(OWN), nextHopInstance=hop)
        run(started(google, store))
        assert list(google.double.routes) == ["flannel-10-5-1-0-24-2"]
        assert google.calls("routes.insert") == []

    def test_name_that_another_network_took_is_avoided(self, google: GoogleSite, store: MemoryStore) -> None:
        """COMPAT §8.2: the same subnet in two networks of one project."""
        google.double.put_route(
            "flannel-10-5-1-0-24", str(OWN), nextHopIp="10.0.0.9", network="x/networks/other"
        )
        run(started(google, store))
        assert google.double.routes["flannel-10-5-1-0-24-2"]["destRange"] == str(OWN)

    def test_names_that_are_both_taken_are_named(self, google: GoogleSite, store: MemoryStore) -> None:
        for name in ("flannel-10-5-1-0-24", "flannel-10-5-1-0-24-2"):
            google.double.put_route(name, str(OWN), nextHopIp="10.0.0.9", network="x/networks/other")

        async def work() -> None:
            agent = await started(google, store)
            assert "the names flannel-10-5-1-0-24 and flannel-10-5-1-0-24-2 are taken" in agent.failures[0]

        run(work())

    def test_name_of_ours_with_another_range_is_somebody_elses(
        self, google: GoogleSite, store: MemoryStore
    ) -> None:
        """COMPAT §8.2: flannel looked at the name alone."""
        google.double.put_route("flannel-10-5-9-0-24", str(OWN), nextHopIp="10.0.0.9")

        async def work() -> None:
            agent = await started(google, store)
            assert "flannel-10-5-9-0-24" in agent.failures[0]

        run(work())

    def test_shared_network_has_its_routes_in_its_own_project(
        self, google: GoogleSite, store: MemoryStore
    ) -> None:
        google.double.network_project = "987654321098"

        async def work() -> str:
            agent = Agent(google)
            await agent.join(store, OWN)
            return str(await agent.try_to_look())

        assert "projects/987654321098" in run(work())
        assert google.calls("routes.list")[0].parameters["project"] == "987654321098"

    def test_forwarding_that_is_off_is_said_with_the_command_that_mends_it(
        self, google: GoogleSite, store: MemoryStore
    ) -> None:
        google.switch_check(1, on=True)

        async def work() -> None:
            agent = await started(google, store)
            assert google.routes() == {str(OWN): google.target(1)}
            (said,) = agent.failures
            assert "canIpForward is not true" in said
            where = "--project=lab-project --zone=europe-west1-b"
            assert f"gcloud compute instances export h1 {where} --destination=h1.yaml && sed" in said
            assert f"gcloud compute instances update-from-file h1 {where} --source=h1.yaml" in said
            google.switch_check(1, on=False)
            await agent.look()
            assert agent.failures == []

        run(work())


class TestAlibaba:
    def test_calls_are_these(self, alibaba: AlibabaSite, store: MemoryStore) -> None:
        run(started(alibaba, store))
        assert alibaba.journal.actions == [
            "DescribeRouteTableList",
            "DescribeRouteEntryList",
            "CreateRouteEntry",
            "DescribeRouteEntryList",
            "DescribeNetworkInterfaces",
        ]
        sent = dict(alibaba.calls("CreateRouteEntry")[0].parameters)
        assert sent.pop("ClientToken")  # COMPAT §8.3: flannel's is empty
        assert sent == {
            "RegionId": "cn-hangzhou",
            "RouteTableId": alibaba.double.main_table,
            "DestinationCidrBlock": "10.5.1.0/24",
            "NextHopType": "Instance",
            "NextHopId": alibaba.target(1),
            "RouteEntryName": "loden-10-5-1-0-24",
            "Description": "made by loden",
        }

    def test_keys_come_from_the_environment_too(
        self, alibaba: AlibabaSite, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ACCESS_KEY_ID", "LTAI-environment")
        monkeypatch.setenv("ACCESS_KEY_SECRET", "of-the-environment")
        alibaba.double.keys = {"LTAI-environment": "of-the-environment"}

        async def work() -> None:
            agent = await started(alibaba, store, AccessKeyID=None, AccessKeySecret=None)
            assert agent.failures == []

        run(work())

    def test_table_of_the_switch_comes_before_the_vpcs(
        self, alibaba: AlibabaSite, store: MemoryStore
    ) -> None:
        own = alibaba.double.add_table("Custom", ["vsw-lab0001"])
        run(started(alibaba, store))
        assert alibaba.double.routes(own) == {str(OWN): alibaba.target(1)}
        assert alibaba.double.routes() == {}

    def test_table_is_found_on_any_page(self, alibaba: AlibabaSite, store: MemoryStore) -> None:
        for _ in range(60):
            alibaba.double.add_table("Custom", ["vsw-others"])
        own = alibaba.double.add_table("Custom", ["vsw-lab0001"])
        run(started(alibaba, store))
        assert alibaba.double.routes(own) == {str(OWN): alibaba.target(1)}

    def test_hundred_and_fifty_entries_are_read_in_pages(
        self, alibaba: AlibabaSite, store: MemoryStore
    ) -> None:
        for number in range(150):
            alibaba.double.put_entry(f"10.64.{number}.0/24", "ngw-1", kind="NatGateway")

        async def work() -> None:
            agent = await started(alibaba, store)
            alibaba.journal.clear()
            await agent.look()

        run(work())
        assert alibaba.journal.writes == []
        tokens = [call.parameters.get("NextToken") for call in alibaba.calls("DescribeRouteEntryList")]
        assert tokens == [None, "100"]

    def test_several_tables_each_get_what_they_miss(self, alibaba: AlibabaSite, store: MemoryStore) -> None:
        """COMPAT §8.3: flannel looks at the first table only."""
        tables = [alibaba.double.main_table, alibaba.double.add_table("Custom", ["vsw-others"])]
        alibaba.put_fabric(OWN, 1)
        run(started(alibaba, store, RouteTableID=tables))
        assert [call.parameters["RouteTableId"] for call in alibaba.calls("CreateRouteEntry")] == tables[1:]
        assert all(alibaba.double.routes(table) == {str(OWN): alibaba.target(1)} for table in tables)

    def test_table_that_is_not_there_is_named(self, alibaba: AlibabaSite, store: MemoryStore) -> None:
        async def work() -> str:
            agent = Agent(alibaba, 1, {"RouteTableID": "vtb-nowhere"})
            await agent.join(store, OWN)
            return str(await agent.try_to_look())

        assert "list routes of vtb-nowhere: The specified route table does not exist" in run(work())

    def test_entry_that_flannel_made_is_kept(self, alibaba: AlibabaSite, store: MemoryStore) -> None:
        alibaba.double.put_entry(str(OWN), alibaba.target(1))
        run(started(alibaba, store))
        assert alibaba.journal.writes == []

    def test_pending_entries_of_others_are_not_waited_for(
        self, alibaba: AlibabaSite, store: MemoryStore
    ) -> None:
        """COMPAT §8.3: flannel waits until all entries of the table are available."""
        alibaba.double._put_entry(
            alibaba.double.main_table, "10.77.0.0/16", "Instance", "i-other", "", settle_s=3600.0
        )

        async def work() -> None:
            agent = await started(alibaba, store)
            assert agent.failures == []

        run(work())

    def test_check_switched_on_behind_our_back_is_repaired(
        self, alibaba: AlibabaSite, store: MemoryStore
    ) -> None:
        async def work() -> None:
            agent = await started(alibaba, store)
            alibaba.switch_check(1, on=True)
            await agent.look()
            assert agent.failures == []

        run(work())
        assert alibaba.double.checks["h1"] is False

# SPDX-License-Identifier: Apache-2.0
"""What the real APIs refuse: what the user sees, and that nothing is lost by it."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from loden.errors import CloudDenied, CloudError, CloudUnavailable, RoutesFull
from loden.lab.clouds.aws import KEY_ID
from loden.lab.clouds.http import Answer, Request, serving
from loden.stores.memory import MemoryStore
from tests.clouds.agents import Agent, run
from tests.clouds.site import AlibabaSite, AwsSite, GoogleSite, Site, subnet

OWN, OTHER = subnet(1), subnet(2)
UNAVAILABLE, DENIED, FULL = CloudUnavailable, CloudDenied, RoutesFull


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(request.node.nodeid, ttl_s=86_400.0)


def error_of(agent: Agent) -> CloudError:
    (error,) = agent.routes._reconciler.failures("own lease")
    assert isinstance(error, CloudError)
    return error


async def joined(site: Site, store: MemoryStore, **options: object) -> Agent:
    agent = Agent(site, 1, options)
    await agent.join(store, OWN)
    return agent


#: Cloud, status, code, message; what it comes to, and words of what the user sees.
REFUSALS = [
    ("aws", 503, "RequestLimitExceeded", "Request limit exceeded.", UNAVAILABLE, "Request limit exceeded"),
    ("aws", 503, "Unavailable", "The server is overloaded.", UNAVAILABLE, "The server is overloaded"),
    ("aws", 500, "InternalError", "An internal error has occurred.", UNAVAILABLE, "An internal error"),
    ("aws", 400, "ExpiredToken", "The security token is expired", DENIED, "give the instance a role"),
    ("aws", 400, "RequestExpired", "Request has expired.", DENIED, "give the instance a role"),
    ("aws", 401, "AuthFailure", "not able to validate", DENIED, "AWS_ACCESS_KEY_ID"),
    ("aws", 403, "UnauthorizedOperation", "You are not authorized.", DENIED, "docs/backends/aws-vpc.md"),
    ("aws", 400, "InvalidRouteTableID.NotFound", "It does not exist", CloudError, "RouteTableID names"),
    ("google", 403, "rateLimitExceeded", "Rate Limit Exceeded", UNAVAILABLE, "Rate Limit Exceeded"),
    ("google", 429, "rateLimitExceeded", "Too many", UNAVAILABLE, "Too many"),
    ("google", 412, "conditionNotMet", "Precondition Failed", UNAVAILABLE, "Precondition Failed"),
    ("google", 500, "backendError", "Internal error", UNAVAILABLE, "Internal error"),
    ("google", 503, "backendError", "Backend Error", UNAVAILABLE, "Backend Error"),
    ("google", 401, "authError", "Invalid Credentials", DENIED, "--scopes compute-rw"),
    ("google", 403, "insufficientPermissions", "Insufficient Permission", DENIED, "docs/backends/gce.md"),
    ("google", 404, "notFound", "The network was not found", CloudError, "The network was not found"),
    ("alibaba", 400, "Throttling.User", "Denied due to user flow control.", UNAVAILABLE, "flow control"),
    ("alibaba", 503, "ServiceUnavailable", "The service is not available.", UNAVAILABLE, "not available"),
    ("alibaba", 400, "IncorrectRouteEntryStatus", "NotStable routeEntry status.", UNAVAILABLE, "NotStable"),
    ("alibaba", 400, "TaskConflict", "The operation is too frequent.", UNAVAILABLE, "too frequent"),
    ("alibaba", 403, "Forbidden.RAM", "User not authorized.", DENIED, "docs/backends/ali-vpc.md"),
    ("alibaba", 400, "InvalidSecurityToken.Expired", "Token expired.", DENIED, "RAM role"),
    ("alibaba", 404, "InvalidAccessKeyId.NotFound", "Access key is not found.", DENIED, "AccessKeySecret"),
    ("alibaba", 400, "InvalidParameter", "Parameter is not valid.", CloudError, "not valid"),
]  # fmt: skip


class Refusal(NamedTuple):
    status: int
    code: str
    message: str
    kind: type[CloudError]
    words: str


@pytest.mark.parametrize(
    ("refusal", "site"),
    [(Refusal(*case[1:]), case[0]) for case in REFUSALS],
    indirect=["site"],
    ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in REFUSALS],
)
class TestRefusals:
    def test_of_a_change_is_told_and_tried_again(
        self, site: Site, store: MemoryStore, refusal: Refusal
    ) -> None:
        status, code, message, kind, words = refusal

        async def work() -> None:
            agent = await joined(site, store)
            site.fail(site.ADD, status, code, message=message, times=3)
            await agent.look()
            error = error_of(agent)
            assert type(error) is kind
            assert str(error).startswith("add cloud route 10.5.1.0/24 via ")
            assert words in str(error)
            assert code in str(error)
            if kind is CloudError:  # perhaps somebody was faster: it has looked, and found nobody
                assert len(site.calls(site.LIST)) == 2
            while agent.failures:
                await agent.look()

        run(work())
        assert site.routes() == {str(OWN): site.target(1)}

    def test_of_a_listing_changes_nothing(self, site: Site, store: MemoryStore, refusal: Refusal) -> None:
        status, code, message, kind, words = refusal

        site.put_fabric(OWN, 1)
        site.put_fabric(OTHER, 2)
        before = site.routes()

        async def work() -> None:
            agent = await joined(site, store)
            site.fail(site.LIST, status, code, message=message, times=2)
            error = await agent.try_to_look()
            assert type(error) is kind
            assert words in str(error)
            assert not agent.routes.is_standing
            assert site.journal.writes == []
            site.journal.clear()
            await agent.look()

        run(work())
        assert site.routes() == before
        assert site.calls(site.ADD) == site.calls(site.REMOVE) == []


class TestRaces:
    def test_lost_to_another_host_of_the_fabric_is_settled_by_the_lease(
        self, site: Site, store: MemoryStore
    ) -> None:
        """RouteAlreadyExists, 409, RouterEntryConflict.Duplicated, and the lease is ours."""
        site.journal.before(site.ADD, lambda: site.put_fabric(OWN, 2))

        async def work() -> None:
            agent = await joined(site, store)
            await agent.look()
            assert agent.failures == []

        run(work())
        assert set(site.routes().values()) == {site.target(1)}
        outcomes = [call.outcome for call in site.calls(site.ADD)]
        assert outcomes[0] in ("RouteAlreadyExists", "alreadyExists", "RouterEntryConflict.Duplicated")

    def test_lost_to_somebody_else_is_a_foreign_route(self, site: Site, store: MemoryStore) -> None:
        names: list[str] = []
        site.journal.before(site.ADD, lambda: names.append(site.put_foreign(OWN)))

        async def work() -> None:
            agent = await joined(site, store)
            await agent.look()
            await agent.look()  # at Google both stand side by side until then
            assert names[0] in agent.failures[0]

        run(work())

    def test_for_one_range_ends_with_the_route_of_who_holds_the_lease(
        self, site: Site, store: MemoryStore
    ) -> None:
        async def work() -> None:
            loser, winner = await joined(site, store), Agent(site, 2)
            await loser.look()
            records = (await store.snapshot()).records
            await store.delete(next(iter(records.values())))
            await winner.join(store, OWN)
            for _ in range(3):
                await winner.look()
                await loser.look()
                assert set(site.routes().values()) == {site.target(2)}
            assert "the store has no lease of this host" in loser.failures[0]
            assert winner.failures == []

        with_tags(site)
        run(work())


def with_tags(site: Site) -> None:
    """At Amazon, the hosts' agents have marked their interfaces."""
    if isinstance(site, AwsSite):
        for number in (1, 2, 3):
            site.tag(number)


class TestFull:
    def test_says_how_many_and_how_to_raise_it_and_works_when_there_is_room(
        self, site: Site, store: MemoryStore
    ) -> None:
        site.double.limit = 0

        async def work() -> None:
            agent = await joined(site, store)
            await agent.look()
            error = error_of(agent)
            assert isinstance(error, RoutesFull)
            assert "holds 0 routes, the quota usually is" in str(error)
            assert "raise" in error.hint
            assert site.FULL in str(error)
            site.double.limit = 10
            await agent.look()
            assert agent.failures == []

        run(work())

    def test_route_limit_is_kept_to_without_asking(self, site: Site, store: MemoryStore) -> None:
        site.put_fabric(OTHER, 2)

        async def work() -> None:
            agent = await joined(site, store, RouteLimit=1)
            await agent.look()
            assert "holds 1 routes, RouteLimit says 1" in agent.failures[0]

        run(work())
        assert site.calls(site.ADD) == []


@pytest.mark.parametrize("status", [200, 502])
def test_page_of_somebody_in_between_is_no_answer(site: Site, store: MemoryStore, status: int) -> None:
    """A proxy, a captive portal: HTML where the API's own form is expected."""
    with serving(lambda _: Answer(status, b"<html>Sign in</html>", "text/html")) as url:
        real, site.api = site.api, url

        async def work() -> None:
            agent = await joined(site, store)
            error = await agent.try_to_look()
            assert isinstance(error, CloudError)
            assert "list route" in str(error)

        run(work())
        site.api = real
    assert site.journal.calls == []


class TestLateFailures:
    def test_of_google_are_told_and_tried_again(self, google: GoogleSite, store: MemoryStore) -> None:
        google.fail("routes.insert", 403, "QUOTA_EXCEEDED", message="Quota 'ROUTES' exceeded.", is_late=True)
        google.fail("routes.insert", 503, "RESOURCE_OPERATION_RATE_EXCEEDED", message="Busy.", is_late=True)
        google.fail("routes.insert", 400, "RESOURCE_NOT_READY", message="Not ready.", is_late=True)

        async def work() -> None:
            agent = await joined(google, store)
            said = []
            for _ in range(3):
                await agent.look()
                said.append(error_of(agent))
            assert [type(error) for error in said] == [RoutesFull, CloudUnavailable, CloudError]
            assert "Not ready [RESOURCE_NOT_READY]" in str(said[2])
            await agent.look()
            assert agent.failures == []

        run(work())
        assert google.routes() == {str(OWN): google.target(1)}

    def test_removal_that_failed_late_is_done_by_a_later_look(
        self, google: GoogleSite, store: MemoryStore
    ) -> None:
        google.put_fabric(OWN, 2)
        google.fail("routes.delete", 500, "INTERNAL_ERROR", is_late=True)

        async def work() -> None:
            agent = await joined(google, store)
            await agent.look()
            assert len(google.double.routes) == 2
            await agent.look()
            assert agent.failures == []

        run(work())
        assert list(google.double.routes) == ["flannel-10-5-1-0-24-2"]

    def test_entry_that_alibaba_takes_and_drops(self, alibaba: AlibabaSite, store: MemoryStore) -> None:
        alibaba.fail("CreateRouteEntry", 200, "late", is_late=True)

        async def work() -> None:
            agent = await joined(alibaba, store)
            await agent.look()
            assert "the cloud took it and dropped it again" in agent.failures[0]
            await agent.look()
            assert agent.failures == []

        run(work())

    def test_entry_that_alibaba_does_not_get_done(
        self, alibaba: AlibabaSite, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alibaba.double.settle_s = 3600.0
        monkeypatch.setattr("loden.clouds.alibaba._WAIT_S", 0.2)

        async def work() -> None:
            agent = await joined(alibaba, store)
            await agent.look()
            assert "still Creating after 0.2 s" in agent.failures[0]
            await agent.look()
            assert "the cloud is still at work on it" in agent.failures[0]
            assert len(alibaba.calls("CreateRouteEntry")) == 1
            alibaba.double.tables[alibaba.double.main_table]["entries"][str(OWN)]["ready"] = 0.0
            await agent.look()
            assert agent.failures == []

        run(work())

    def test_operation_that_google_does_not_get_done(
        self, google: GoogleSite, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        google.double.polls = 10**9
        monkeypatch.setattr("loden.clouds.google._WAIT_S", 0.2)

        async def work() -> None:
            agent = await joined(google, store)
            await agent.look()
            assert "operation operation-1 not done after 0.2 s" in agent.failures[0]
            await agent.look()  # the route stands, whatever became of the operation
            assert agent.failures == []

        run(work())


class TestSmallPolicies:
    """Amazon's, as flannel's documentation had them."""

    def test_without_sight_of_interfaces_the_instance_tells(self, aws: AwsSite, store: MemoryStore) -> None:
        aws.double.denied = {"DescribeNetworkInterfaces", "CreateTags"}

        async def work() -> None:
            agent = await joined(aws, store)
            await agent.look()
            assert agent.failures == []
            aws.switch_check(1, on=True)
            await agent.look()

        run(work())
        assert aws.double.source_check("h1") is False
        assert len(aws.calls("DescribeNetworkInterfaces")) == 1  # asked once, and never again

    def test_with_modify_instance_attribute_alone_the_check_is_switched_off_once(
        self, aws: AwsSite, store: MemoryStore
    ) -> None:
        aws.double.denied = {
            *("DescribeNetworkInterfaces", "DescribeInstances"),
            *("ModifyNetworkInterfaceAttribute", "CreateTags"),
        }

        async def work() -> None:
            agent = await joined(aws, store, RouteTableID=aws.double.main_table)
            for _ in range(3):
                await agent.look()
                assert agent.failures == []

        run(work())
        assert len(aws.calls("ModifyInstanceAttribute")) == 1
        assert aws.calls("ModifyInstanceAttribute")[0].parameters["InstanceId"] == aws.double.instances["h1"]

    def test_without_both_the_check_is_an_error_with_the_policy(
        self, aws: AwsSite, store: MemoryStore
    ) -> None:
        """COMPAT §8.1: flannel only warned, and no packet came through."""
        aws.double.denied = {"ModifyNetworkInterfaceAttribute", "ModifyInstanceAttribute"}

        async def work() -> None:
            agent = await joined(aws, store)
            await agent.look()
            (said,) = agent.failures
            assert said.startswith("switch off source/destination check of i-")
            assert "[UnauthorizedOperation]" in said
            assert "3DUsNk1LLL" not in said

        run(work())
        assert aws.routes() == {str(OWN): aws.target(1)}

    def test_without_replace_route_it_is_deleted_and_created(self, aws: AwsSite, store: MemoryStore) -> None:
        aws.double.denied = {"ReplaceRoute"}
        aws.put_fabric(OWN, 2)

        async def work() -> None:
            agent = await joined(aws, store)
            await agent.look()
            assert agent.failures == []

        run(work())
        assert aws.routes() == {str(OWN): aws.target(1)}

    def test_alibaba_without_ecs_is_taken_to_be_as_it_usually_is(
        self, alibaba: AlibabaSite, store: MemoryStore
    ) -> None:
        alibaba.double.denied = {"DescribeNetworkInterfaces"}

        async def work() -> None:
            agent = await joined(alibaba, store)
            await agent.look()
            assert agent.failures == []

        run(work())


class TestConfiguration:
    def test_table_that_is_not_there(self, aws: AwsSite, store: MemoryStore) -> None:
        async def work() -> str:
            agent = await joined(aws, store, RouteTableID="rtb-0123456789abcdef0")
            return str(await agent.try_to_look())

        said = run(work())
        assert "list route tables rtb-0123456789abcdef0" in said
        assert "[InvalidRouteTableID.NotFound]" in said
        assert "in another region" in said

    def test_missing_credentials_say_where_they_could_come_from(
        self, aws: AwsSite, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(aws.double, "_credentials", lambda role: Answer(404, b"no role"))

        async def work() -> str:
            agent = await joined(aws, store)
            return str(await agent.try_to_look())

        said = run(work())
        assert "Unable to locate credentials" in said
        assert "give the instance a role, or set AWS_ACCESS_KEY_ID" in said

    @pytest.mark.parametrize("name", ["AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"])
    def test_temporary_keys_of_the_environment_are_used(
        self, aws: AwsSite, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        seen: list[str] = []
        monkeypatch.setattr(aws.double, "_pass_on", _spying(aws.double._pass_on, seen))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-environment")
        monkeypatch.setenv(name, "token-of-the-environment")

        async def work() -> None:
            agent = await joined(aws, store)
            await agent.look()
            assert agent.failures == []

        run(work())
        assert set(seen) == {"token-of-the-environment"}


def _spying(pass_on: Callable[[Request], Answer], seen: list[str]) -> Callable[[Request], Answer]:
    def spy(request: Request) -> Answer:
        token = request.headers.get("x-amz-security-token")
        if token:
            seen.append(token)
        return pass_on(request)

    return spy

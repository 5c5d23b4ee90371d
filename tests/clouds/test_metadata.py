# SPDX-License-Identifier: Apache-2.0
"""What a host learns about itself, and what it says where nobody tells it."""

import socket
import threading
from collections.abc import Iterator

import pytest

from loden.clouds.aws import region_of_zone
from loden.clouds.metadata import Metadata
from loden.errors import CloudError, CloudUnavailable
from loden.lab.clouds.http import Answer, Request, serving
from loden.stores.memory import MemoryStore
from loden.tables.cloud_calls import ATTACH_S, CloudCalls
from tests.clouds.agents import Agent, run
from tests.clouds.site import AlibabaSite, AwsSite, GoogleSite, Site, subnet

VARIABLES = {
    AwsSite: "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    GoogleSite: "GCE_METADATA_HOST",
    AlibabaSite: "ALIBABA_CLOUD_METADATA_ENDPOINT",
}
HINTS = {
    AwsSite: "no EC2 instance",
    GoogleSite: "no Compute Engine instance",
    AlibabaSite: "no ECS instance",
}


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address where somebody takes the question, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_patience_with_all_questions_is_five_seconds() -> None:
    assert ATTACH_S <= 5.0


def test_nobody_there_is_said_with_what_it_may_mean(
    site: Site, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLES[type(site)], nobody)
    with pytest.raises(CloudUnavailable, match=r"metadata at http://127.0.0.1:\d+: .*refused") as caught:
        site.open(site.machines[0]).attach()
    assert HINTS[type(site)] in caught.value.hint


def test_silence_is_said_as_such(site: Site, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[type(site)], silent)
    monkeypatch.setattr("loden.clouds.metadata.TIMEOUT_S", 0.05)
    with pytest.raises(CloudUnavailable, match=r"metadata at http://127.0.0.1:\d+: no answer"):
        site.open(site.machines[0]).attach()


def test_service_that_answers_too_slowly_as_a_whole_is_given_up(aws: AwsSite) -> None:
    """Each answer comes in time, and all of them together do not."""
    release = threading.Event()
    cloud = aws.open(aws.machines[0])

    def slow() -> str:
        release.wait()
        return ""

    cloud.attach = slow  # type: ignore[method-assign]
    calls = CloudCalls(cloud, attach_s=0.05)
    with pytest.raises(CloudUnavailable, match=r"read metadata of AWS: no answer within 0.05 s"):
        run(calls.call("list routes", lambda cloud: cloud.list_routes()))
    release.set()


def test_agent_goes_on_and_works_when_the_service_does(
    site: Site, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore(f"metadata {type(site)}", ttl_s=86_400.0)

    async def work() -> None:
        agent = Agent(site, 1)
        await agent.join(store, subnet(1))
        with monkeypatch.context() as patch:
            patch.setattr(site, "environment", lambda _: {VARIABLES[type(site)]: nobody})
            assert "metadata" in str(await agent.try_to_look())
        await agent.look()
        assert agent.failures == []

    run(work())


def test_another_address_than_the_instances_names_those_that_it_has(site: Site) -> None:
    stranger = site.machines[2]
    with (
        site.on(1),
        pytest.raises(CloudError, match=rf"network interface with address {stranger.ip}") as caught,
    ):
        site.open(stranger).attach()
    assert site.machines[0].ip in str(caught.value)
    assert "--iface" in caught.value.hint


class TestAmazon:
    def test_session_token_is_used(self, aws: AwsSite) -> None:
        cloud = aws.open(aws.machines[0])
        assert "us-west-2" in cloud.attach()

    def test_older_service_without_tokens_is_used_without(
        self, aws: AwsSite, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aws.double.needs_token = False
        metadata = aws.double.metadata

        def older(request: Request) -> Answer:
            return Answer(404, b"") if request.method == "PUT" else metadata(request)

        monkeypatch.setattr(aws.double, "metadata", older)
        assert "us-west-2" in aws.open(aws.machines[0]).attach()

    def test_region_follows_from_the_zone_where_it_is_not_told(
        self, aws: AwsSite, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = aws.double._values
        monkeypatch.setattr(
            aws.double,
            "_values",
            lambda one: {name: value for name, value in values(one).items() if not name.endswith("region")},
        )
        assert "us-west-2" in aws.open(aws.machines[0]).attach()

    @pytest.mark.parametrize(
        ("zone", "region"),
        [
            ("us-east-1a", "us-east-1"),
            ("ap-southeast-2c", "ap-southeast-2"),
            ("us-west-2-lax-1a", "us-west-2"),  # a local zone
            ("us-east-1-wl1-bos-wlz-1", "us-east-1"),  # a Wavelength zone
            ("us-gov-west-1b", "us-gov-west-1"),
            ("cn-north-1a", "cn-north-1"),
        ],
    )
    def test_region_of_a_zone(self, zone: str, region: str) -> None:
        """COMPAT §8.1: flannel takes the last character off."""
        assert region_of_zone(zone) == region

    def test_region_of_nonsense(self) -> None:
        with pytest.raises(CloudError, match="not of the form us-east-1a"):
            region_of_zone("somewhere")

    def test_service_that_is_switched_off_by_the_environment(
        self, aws: AwsSite, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(CloudError, match="AWS_EC2_METADATA_DISABLED is true"):
            aws.open(aws.machines[0]).attach()


def test_google_wants_its_header(google: GoogleSite) -> None:
    answer = google.double.metadata(
        Request("GET", "/computeMetadata/v1/instance/zone", {}, {}, b"", "198.18.0.1")
    )
    assert answer.status == 403


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, CloudError), (403, CloudError), (429, CloudUnavailable), (503, CloudUnavailable)],
)
def test_status_is_looked_at(status: int, kind: type[CloudError]) -> None:
    """COMPAT §8.2: flannel takes the page of an error for a name."""
    with serving(lambda _: Answer(status, b"<html>error</html>")) as url:
        metadata = Metadata("X", url, headers={}, hint="")
        with pytest.raises(kind) as caught:
            metadata.get("/name")
        assert type(caught.value) is kind
        assert "<html>" not in str(caught.value)
        metadata.close()

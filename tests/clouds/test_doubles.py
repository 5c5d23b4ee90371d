# SPDX-License-Identifier: Apache-2.0
"""The doubles speak what the real clouds speak: the vendors' own, typed clients work on them unchanged."""

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest

from loden.address import Prefix
from loden.clouds.google import SCOPE
from loden.lab.clouds.alibaba import KEY_ID, REGION, VPC
from loden.lab.clouds.journal import Call, Fault, Journal, read_calls
from tests.clouds.site import CANARY, AlibabaSite, AwsSite, GoogleSite, Site, subnet


class TestAlibaba:
    def client(self, site: AlibabaSite) -> Any:
        """The generated client, of whose thousands of classes we do without."""
        from alibabacloud_tea_openapi.models import Config
        from alibabacloud_vpc20160428.client import Client

        host = site.api.partition("//")[2]
        return Client(
            Config(
                access_key_id=KEY_ID,
                access_key_secret=CANARY,
                endpoint=host,
                protocol="HTTP",
                region_id=REGION,
            )
        )

    def test_generated_client_works_on_it(self, alibaba: AlibabaSite) -> None:
        from alibabacloud_vpc20160428 import models

        client = self.client(alibaba)
        tables = client.describe_route_table_list(
            models.DescribeRouteTableListRequest(region_id=REGION, vpc_id=VPC)
        ).body.router_table_list.router_table_list_type
        assert [table.route_table_id for table in tables] == [alibaba.double.main_table]
        assert tables[0].route_table_type == "System"
        made = client.create_route_entry(
            models.CreateRouteEntryRequest(
                region_id=REGION,
                route_table_id=tables[0].route_table_id,
                destination_cidr_block="10.5.1.0/24",
                next_hop_type="Instance",
                next_hop_id=alibaba.target(1),
            )
        ).body.route_entry_id
        (entry,) = client.describe_route_entry_list(
            models.DescribeRouteEntryListRequest(region_id=REGION, route_table_id=tables[0].route_table_id)
        ).body.route_entrys.route_entry
        assert entry.route_entry_id == made
        assert entry.destination_cidr_block == "10.5.1.0/24"
        assert entry.next_hops.next_hop[0].next_hop_id == alibaba.target(1)

    def test_we_name_nothing_that_the_generated_client_does_not_know(self, alibaba: AlibabaSite) -> None:
        """Its request classes list every parameter there is."""
        from alibabacloud_vpc20160428 import models

        cloud = alibaba.cloud()
        table = cloud.list_routes().tables[0]
        made = cloud.add(table, subnet(1))
        alibaba.put_fabric(subnet(2), 2)
        cloud.replace(next(one for one in cloud.list_routes().routes if one.dst == subnet(2)))
        cloud.remove(made)
        called = {call.action: call.parameters for call in alibaba.journal.calls}
        assert {"CreateRouteEntry", "ModifyRouteEntry", "DeleteRouteEntry", "DescribeRouteEntryList"} <= set(
            called
        )
        for action, parameters in called.items():
            if hasattr(models, f"{action}Request"):
                known = getattr(models, f"{action}Request")()
                known.from_map(dict(parameters))
                assert not parameters.keys() - known.to_map().keys()

    @pytest.mark.parametrize(("secret", "status"), [(CANARY, 200), ("wrong", 400)])
    def test_requests_signed_as_before_are_taken_too(
        self, alibaba: AlibabaSite, secret: str, status: int
    ) -> None:
        """Parameters in the query, HMAC-SHA1: what flannel's client sends."""
        parameters = {
            "Action": "DescribeRouteTableList",
            "Version": "2016-04-28",
            "Format": "JSON",
            "AccessKeyId": KEY_ID,
            "SignatureMethod": "HMAC-SHA1",
            "SignatureVersion": "1.0",
            "SignatureNonce": "1",
            "Timestamp": "2020-01-01T00:00:00Z",
            "RegionId": REGION,
            "VpcId": VPC,
        }
        query = "&".join(f"{name}={quote(value, safe='~')}" for name, value in sorted(parameters.items()))
        text = f"GET&{quote('/', safe='~')}&{quote(query, safe='~')}"
        signature = base64.b64encode(hmac.new(f"{secret}&".encode(), text.encode(), hashlib.sha1).digest())
        answer = _get(f"{alibaba.api}/?{urlencode({**parameters, 'Signature': signature.decode()})}")
        assert answer[0] == status
        assert ("RouterTableList" in answer[1]) is (status == 200)

    def test_unknown_key_and_wrong_secret_are_told_apart(self, alibaba: AlibabaSite) -> None:
        cloud = alibaba.cloud()
        alibaba.double.keys = {KEY_ID: "another"}
        with pytest.raises(Exception, match="SignatureDoesNotMatch"):
            cloud.list_routes()
        alibaba.double.keys = {}
        with pytest.raises(Exception, match=r"InvalidAccessKeyId\.NotFound"):
            cloud.list_routes()


class TestGoogle:
    def test_googles_session_authorises_itself_by_the_metadata(self, google: GoogleSite) -> None:
        from google.auth import default
        from google.auth.transport.requests import AuthorizedSession

        credentials, project = default(scopes=[SCOPE])
        answer = AuthorizedSession(credentials).get(
            f"{google.api}/compute/v1/projects/lab-project/global/routes", timeout=10
        )
        assert answer.status_code == 200
        assert answer.json()["kind"] == "compute#routeList"
        assert project == "lab-project"

    def test_without_a_token_it_is_refused(self, google: GoogleSite) -> None:
        status, text = _get(f"{google.api}/compute/v1/projects/lab-project/global/routes")
        assert status == 401
        assert json.loads(text)["error"]["errors"][0]["reason"] == "authError"


class TestAws:
    def test_terminated_instance_leaves_a_blackhole(self, aws: AwsSite) -> None:
        cloud = aws.cloud()
        aws.put_fabric(subnet(2), 2)
        aws.double.terminate("h2")
        (route,) = cloud.list_routes().routes
        assert not route.is_usable
        assert Prefix.parse("10.5.2.0/24") not in aws.double.view().routes

    def test_wrong_keys_are_refused(self, aws: AwsSite, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        cloud = aws.open(aws.machines[0])
        cloud.attach()
        with pytest.raises(Exception, match="InvalidClientTokenId"):
            cloud.list_routes()


def test_packets_go_where_routes_lead(site: Site) -> None:
    site.put_fabric(subnet(2), 2)
    view = site.double.view()
    assert view.routes == {subnet(2): site.machines[1].address}
    site.switch_check(2, on=True)
    assert site.machines[1].address not in site.double.view().free
    site.switch_check(2, on=False)
    assert site.machines[1].address in site.double.view().free


def test_journal_is_written_for_others_to_read(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    journal = Journal(file)
    assert read_calls(file) == []
    call = Call("CreateRoute", True, {"a": "b"}, "198.18.0.1", "ok")
    journal.note(call)
    assert read_calls(file) == [call]
    assert journal.writes == [call]


def test_faults_are_given_as_often_as_they_were_asked_for() -> None:
    journal = Journal()
    journal.fail(Fault("A", 400, "x", times=2), Fault("A", 400, "late", is_late=True), Fault("B", 400, "y"))
    given = [journal.take_fault("A") for _ in range(3)]
    assert [fault.code if fault else None for fault in given] == ["x", "x", None]
    late = journal.take_fault("A", late=True)
    assert late is not None
    assert late.code == "late"


def _get(url: str) -> tuple[int, str]:
    from urllib.error import HTTPError

    try:
        with urlopen(HttpRequest(url)) as answer:
            return int(answer.status), answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()

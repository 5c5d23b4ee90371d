# SPDX-License-Identifier: Apache-2.0
"""No secret in a log, an exception or a ``repr``, whatever happens (COMPAT W44)."""

import io
import logging
import traceback
from collections.abc import Iterator

import click.testing
import msgspec
import pytest

from loden.backend_options import check_options
from loden.backends.ali_vpc import Options
from loden.cli.config import check
from loden.errors import LodenError
from loden.lab.clouds.alibaba import KEY_ID
from loden.network import parse_network
from loden.secret import Secret
from loden.stores.memory import MemoryStore
from tests.clouds.agents import Agent, run
from tests.clouds.site import CANARY, AlibabaSite, AwsSite, GoogleSite, Site, subnet

_CONFIG = {
    "Network": "10.5.0.0/16",
    "Backend": {"Type": "ali-vpc", "AccessKeyID": KEY_ID, "AccessKeySecret": CANARY},
}


@pytest.fixture
def heard() -> Iterator[io.StringIO]:
    """Everything that anybody logs, at every level, tracebacks included."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.setLevel(before)
    root.removeHandler(handler)


def everything_of(error: BaseException) -> str:
    """The error with all that stands behind it, as a traceback and as values."""
    parts = ["".join(traceback.format_exception(error))]
    seen: set[int] = set()
    stack: list[BaseException | None] = [error]
    while stack:
        one = stack.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        parts += [repr(one), str(one), repr(one.args), repr(vars(one))]
        stack += [one.__cause__, one.__context__]
    return "\n".join(parts)


def test_canary_is_really_what_the_clients_sign_with(site: Site) -> None:
    site.cloud().list_routes()
    if isinstance(site, AlibabaSite):
        site.double.keys = {KEY_ID: "another"}
    elif isinstance(site, GoogleSite):
        site.double.secret = "another"
    else:
        assert site.double.secret == CANARY
        return
    with pytest.raises(LodenError):
        site.cloud().list_routes()


def test_nothing_that_goes_well_or_wrong_shows_it(
    site: Site, heard: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    store = MemoryStore(f"secrets {type(site)}", ttl_s=86_400.0)
    errors: list[LodenError] = []

    async def work() -> None:
        agent = Agent(site, 1)
        await agent.join(store, subnet(1))
        refusals = [
            (400, "SignatureDoesNotMatch"),
            (403, site.DENIED[1]),
            (*site.THROTTLED,),
            (400, "ExpiredToken"),
            (500, "InternalError"),
        ]
        for status, code in refusals:
            # As Alibaba does, which quotes what it was sent.
            is_quoted = code.startswith("Sig") and isinstance(site, AlibabaSite)
            quoted = f"No match. server string to sign is:GET&%2F&Signature={CANARY}"
            message = quoted if is_quoted else "no"
            site.fail(site.LIST, status, code, message=message, times=2)
            errors.append(await agent.try_to_look())
            site.journal.clear()
            site.fail(site.ADD, status, code, message=message, times=2)
            await agent.look()
            errors.extend(agent.routes._reconciler.failures("own lease"))
            site.journal.clear()
        await agent.look()
        for value in (agent.network, agent.backend, agent.routes, agent.routes._calls, agent.backend.options):
            errors.append(LodenError(repr(value)))
        errors.append(LodenError(repr(agent.backend._host)))

    run(work())
    assert len(errors) >= 15
    said = heard.getvalue() + "".join(capfd.readouterr()) + "\n".join(map(everything_of, errors))
    assert CANARY not in said


def test_wrong_type_of_a_secret_is_refused_without_showing_it() -> None:
    raw = msgspec.json.encode({"AccessKeySecret": [CANARY]})
    found, errors, _ = check_options(raw, Options)
    assert found is None
    assert str(errors[0]) == "Backend.AccessKeySecret: what it holds is not allowed (a text in quotes)"


def test_half_of_the_keys_names_the_other_half(alibaba: AlibabaSite) -> None:
    with pytest.raises(
        LodenError, match=r"Backend.AccessKeyID: missing, and AccessKeySecret is there"
    ) as caught:
        Agent(alibaba, 1, {"AccessKeyID": None})
    assert CANARY not in everything_of(caught.value)


def test_network_and_options_print_without_it() -> None:
    network = parse_network(msgspec.json.encode(_CONFIG))
    options = check_options(network.backend, Options)[0]
    assert options is not None
    assert options.access_key_secret.reveal() == CANARY
    assert CANARY not in f"{network!r} {options!r} {options.access_key_secret!r} {options.access_key_secret}"


@pytest.mark.parametrize("arguments", [["-"], ["-", "--json"]])
def test_config_check_shows_that_there_is_one_and_not_which(arguments: list[str]) -> None:
    done = click.testing.CliRunner().invoke(check, arguments, input=msgspec.json.encode(_CONFIG))
    assert done.exit_code == 0, done.output
    assert CANARY not in done.output
    assert "(secret)" in done.output


def test_secrets_compare_by_their_text_and_show_none() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert len({Secret("a"), Secret("a")}) == 1
    assert not Secret("")
    assert (repr(Secret("a")), str(Secret("a")), f"{Secret('')}") == ("(secret)", "(secret)", "(none)")


def test_amazon_keys_of_the_environment_stay_unseen(
    aws: AwsSite, heard: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("AWS_SECURITY_TOKEN", CANARY)
    cloud = aws.open(aws.machines[0])
    cloud.attach()
    with pytest.raises(LodenError, match="InvalidClientTokenId") as caught:
        cloud.list_routes()
    assert CANARY not in everything_of(caught.value)
    assert CANARY not in heard.getvalue()

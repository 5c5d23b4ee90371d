# SPDX-License-Identifier: Apache-2.0
"""What the tests of clouds share: a cloud for each test, and an environment that leads to no real one."""

import os
from collections.abc import Iterator
from typing import TypeVar

import pytest

from loden.lab.clouds.catalogue import FOREIGN
from loden.lab.clouds.http import Answer, Request, serving
from tests.clouds.site import CANARY, SITES, AlibabaSite, AwsSite, GoogleSite, Site

T = TypeVar("T", bound=Site)


@pytest.fixture(scope="session", autouse=True)
def tokens() -> Iterator[str]:
    """Google's client reads where metadata are once, when it is imported: tokens come from here."""

    def answer(request: Request) -> Answer:
        headers = {"Metadata-Flavor": "Google"}
        if request.path.endswith("/token"):
            body = b'{"access_token": "%s", "expires_in": 3600, "token_type": "Bearer"}' % CANARY.encode()
            return Answer(200, body, "application/json", headers)
        if "/service-accounts/" in request.path:
            body = b'{"email": "lab@lab.iam.gserviceaccount.com", "scopes": []}'
            return Answer(200, body, "application/json", headers)
        if request.path.endswith("universe-domain"):
            return Answer(200, b"googleapis.com", "text/plain", headers)
        return Answer(200, b"lab-project", "text/plain", headers)

    with serving(answer) as url:
        host = url.partition("//")[2]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GCE_METADATA_HOST", host)
            import google.auth.compute_engine._metadata  # noqa: F401
        yield host


@pytest.fixture(scope="session", autouse=True)
def _one_description() -> Iterator[None]:
    """Amazon's client reads the description of EC2, which is large, once and not for each of many hosts."""
    import botocore.loaders
    import botocore.session

    loader = botocore.loaders.create_loader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", lambda *_: loader)
        yield


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the doubles answer in time on a machine at rest may take longer on a busy one."""
    monkeypatch.setattr("loden.clouds.metadata.TIMEOUT_S", 30.0)


@pytest.fixture(autouse=True)
def _nowhere_else(monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    """No variable of the machine's user reaches a client."""
    for name in list(os.environ):
        if name.startswith(FOREIGN) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GCE_METADATA_IP", tokens)  # Google's client looks there whether it is at Google
    monkeypatch.setenv("HOME", "/nonexistent")  # no shared credentials file


@pytest.fixture(params=list(SITES))
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Three hosts in each of the clouds."""
    yield from _made(SITES[request.param], monkeypatch)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsSite]:
    """Three hosts at Amazon."""
    yield from _made(AwsSite, monkeypatch)


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleSite]:
    """Three hosts at Google."""
    yield from _made(GoogleSite, monkeypatch)


@pytest.fixture
def alibaba(monkeypatch: pytest.MonkeyPatch) -> Iterator[AlibabaSite]:
    """Three hosts at Alibaba."""
    yield from _made(AlibabaSite, monkeypatch)


def _made(kind: type[T], monkeypatch: pytest.MonkeyPatch) -> Iterator[T]:
    made = kind(3)
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()

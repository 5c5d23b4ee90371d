# SPDX-License-Identifier: Apache-2.0
"""Every exception of the vendors' clients becomes one of ours, at one place for each."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

import pytest

from loden.clouds import alibaba, aws, google
from loden.errors import CloudDenied, CloudError, CloudUnavailable


def classes(module: ModuleType) -> list[type[Exception]]:
    """The exceptions that a module defines."""
    found = [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, Exception)]
    return [one for one in found if one.__module__ == module.__name__ and not issubclass(one, Warning)]


def raising(error: Exception) -> Callable[[], NoReturn]:
    def act() -> NoReturn:
        raise error

    return act


def bare(kind: type[Exception]) -> Exception:
    """An exception without what its constructor asks for; the class alone is looked at."""
    made = kind.__new__(kind)
    for name in ("code", "message", "data", "name", "description"):
        setattr(made, name, "said so")
    return made


def test_amazons() -> None:
    from botocore import exceptions

    mistakes = {"MissingServiceIdError", "UndefinedModelAttributeError"}  # in the client's own descriptions
    for kind in classes(exceptions):
        if kind.__name__ in mistakes:
            continue
        error = bare(kind)
        error.response = {"Error": {"Code": "X", "Message": "said so"}}  # type: ignore[attr-defined]
        with pytest.raises(CloudError):
            aws._ask("list", "routes", raising(error))


def test_googles() -> None:
    from google.auth import exceptions

    for kind in classes(exceptions):
        with pytest.raises(CloudError):
            google._translated("list", "routes", raising(kind("said so")))


def test_alibabas() -> None:
    import alibabacloud_credentials.exceptions
    import alibabacloud_tea_openapi.exceptions
    import darabonba.exceptions
    import Tea.exceptions

    openapi = alibabacloud_tea_openapi.exceptions
    kinds = [
        *classes(alibabacloud_credentials.exceptions),
        *(openapi.ClientException, openapi.ServerException, openapi.ThrottlingException),
        darabonba.exceptions.RetryError,
        darabonba.exceptions.DaraException,
        darabonba.exceptions.UnretryableException,
        Tea.exceptions.TeaException,
        Tea.exceptions.UnretryableException,
    ]
    for kind in kinds:
        with pytest.raises(CloudError):
            alibaba._translated("list", "routes", raising(bare(kind)))


@pytest.mark.parametrize(
    "translate", [aws._ask, google._translated, alibaba._translated], ids=["aws", "google", "alibaba"]
)
def test_bugs_pass(translate: Callable[[str, str, Callable[[], object]], object]) -> None:
    with pytest.raises(ZeroDivisionError):
        translate("list", "routes", raising(ZeroDivisionError()))


def test_no_network_is_no_answer_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import EndpointConnectionError
    from darabonba.exceptions import RetryError
    from requests.exceptions import ConnectionError as RequestsError

    url = "https://vpc.cn-hangzhou.aliyuncs.com/?Signature=never-to-be-seen"
    quoting = RetryError(f"HTTPSConnectionPool: Max retries exceeded with url: {url} (Caused by refused)")
    for translate, error in (
        (aws._ask, EndpointConnectionError(endpoint_url="https://ec2.us-west-2.amazonaws.com")),
        (google._translated, RequestsError("connection refused")),
        (alibaba._translated, quoting),
    ):
        with pytest.raises(CloudUnavailable) as caught:
            translate("list", "routes", raising(error))
        assert "never-to-be-seen" not in str(caught.value)


def test_no_credentials_say_where_they_could_come_from() -> None:
    from alibabacloud_credentials.exceptions import CredentialException
    from botocore.exceptions import NoCredentialsError
    from google.auth.exceptions import DefaultCredentialsError

    for translate, error, word in (
        (aws._ask, NoCredentialsError(), "AWS_ACCESS_KEY_ID"),
        (google._translated, DefaultCredentialsError("none"), "GOOGLE_APPLICATION_CREDENTIALS"),
        (alibaba._translated, CredentialException("none"), "ACCESS_KEY_ID"),
    ):
        with pytest.raises(CloudDenied) as caught:
            translate("list", "routes", raising(error))
        assert word in caught.value.hint

# SPDX-License-Identifier: Apache-2.0
"""Which clouds the lab has, where they answer, and what they need; it loads none of them."""

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import msgspec

from loden.errors import LabError

if TYPE_CHECKING:  # every lab reads this, and few have a cloud
    from loden.lab.clouds.machines import Double

#: Where every cloud's API answers, in the router's namespace.
API = "169.254.169.253"

#: What would bring an agent of the lab to a real cloud, or past the lab's own.
FOREIGN = ("AWS_", "GOOGLE_", "GCE_", "CLOUDSDK_", "ALIBABA_", "ACCESS_KEY_", "ECS_", "VPC_", "QUOTAS_")


class Entry(msgspec.Struct, frozen=True):
    """A cloud of the lab.

    Args:
        module, name: of the double's class.
        metadata: the address of its metadata service.
        needs: modules of packages that are not part of Loden.
        extras: of Loden, that install them.
    """

    module: str
    name: str
    metadata: str
    needs: tuple[str, ...]
    extras: str

    def load(self) -> "type[Double]":
        """The double's class; it may take seconds."""
        found: type[Double] = getattr(import_module(self.module), self.name)
        return found


#: By backend.
CLOUDS: Mapping[str, Entry] = {
    "aws-vpc": Entry(
        "loden.lab.clouds.aws",
        "AwsDouble",
        "169.254.169.254",
        ("boto3", "moto", "flask", "flask_cors"),
        "aws,lab-clouds",
    ),
    "gce": Entry("loden.lab.clouds.google", "GoogleDouble", "169.254.169.254", ("google.auth",), "gce"),
    "ali-vpc": Entry(
        "loden.lab.clouds.alibaba",
        "AlibabaDouble",
        "100.100.100.200",
        ("alibabacloud_tea_openapi", "alibabacloud_credentials"),
        "aliyun",
    ),
}


def require_installed(backend: str) -> None:
    """Raise where the cloud of a lab needs what is not installed.

    Raises:
        LabError: with the command that installs it.
    """
    entry = CLOUDS[backend]
    for module in entry.needs:
        if find_spec(module.partition(".")[0]) is None:
            raise LabError(
                f"make lab with --backend {backend}: the Python package {module} is not installed",
                hint=f"pip install 'loden[{entry.extras}]'",
            )


def addresses(backend: str) -> tuple[str, ...]:
    """Of the API and the metadata service; none where the backend has no cloud."""
    return (API, CLOUDS[backend].metadata) if backend in CLOUDS else ()


def environment(backend: str) -> dict[str, str]:
    """This process's environment, as an agent of a lab with a cloud is to have it."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and not name.lower().endswith("_proxy")
    }
    entry = CLOUDS[backend]
    return {**ours, **entry.load().environment(f"http://{API}", f"http://{entry.metadata}")}

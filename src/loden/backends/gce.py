# SPDX-License-Identifier: Apache-2.0
"""``gce``: a route resource for this host's subnet in a network of Google Compute Engine (COMPAT §8.2)."""

from typing import ClassVar

import msgspec

from loden.backends.cloud import CloudBackend, CloudOptions
from loden.clouds.google import FORWARDING, Google
from loden.tables.cloud import Cloud
from loden.tables.entries import CloudSetting


class Gce(CloudBackend):
    """One route of the project."""

    Options: ClassVar[type[msgspec.Struct]] = CloudOptions
    type_name: ClassVar[str] = "gce"
    client: ClassVar[tuple[str, str]] = ("google.auth", "gce")
    settings: ClassVar[tuple[CloudSetting, ...]] = (CloudSetting(FORWARDING, "true"),)

    def open(self) -> Cloud:
        return Google(address=self.address)

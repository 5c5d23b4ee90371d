# SPDX-License-Identifier: Apache-2.0
"""``ali-vpc``: a route entry for this host's subnet in an Alibaba Cloud VPC (COMPAT §8.3)."""

import os
from typing import ClassVar

import msgspec

from loden.backends.base import Host
from loden.backends.cloud import TABLE_NAMES, CloudBackend, TableOptions
from loden.clouds.alibaba import CHECK, Alibaba
from loden.errors import ConfigError
from loden.secret import Secret
from loden.tables.cloud import Cloud
from loden.tables.entries import CloudSetting

_NAMES = {**TABLE_NAMES, "access_key_id": "AccessKeyID", "access_key_secret": "AccessKeySecret"}
_NONE = Secret("")


class Options(TableOptions, frozen=True, rename=_NAMES):
    """The options of ``ali-vpc``.

    Args:
        access_key_id, access_key_secret: of the account; else those of the environment, else the
            instance's role.
    """

    access_key_id: Secret = _NONE
    access_key_secret: Secret = _NONE


class AliVpc(CloudBackend):
    """One route entry, in each table."""

    Options: ClassVar[type[msgspec.Struct]] = Options
    type_name: ClassVar[str] = "ali-vpc"
    client: ClassVar[tuple[str, str]] = ("alibabacloud_tea_openapi", "aliyun")
    settings: ClassVar[tuple[CloudSetting, ...]] = (CloudSetting(CHECK, "off"),)

    def __init__(self, host: Host, options: msgspec.Struct) -> None:
        super().__init__(host, options)
        assert isinstance(options, Options)
        self._key_id = options.access_key_id or Secret(os.environ.get("ACCESS_KEY_ID", ""))
        self._key_secret = options.access_key_secret or Secret(os.environ.get("ACCESS_KEY_SECRET", ""))
        if bool(self._key_id) != bool(self._key_secret):
            there, missing = ("AccessKeyID", "AccessKeySecret")[:: 1 if self._key_id else -1]
            raise ConfigError(
                f"Backend.{missing}",
                f"missing, and {there} is there",
                hint="both or neither, here or as ACCESS_KEY_ID and ACCESS_KEY_SECRET in the environment",
            )

    def open(self) -> Cloud:
        assert isinstance(self.options, Options)
        return Alibaba(
            address=self.address,
            key_id=self._key_id,
            key_secret=self._key_secret,
            tables=self.options.tables,
        )

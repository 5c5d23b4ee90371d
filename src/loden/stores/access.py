# SPDX-License-Identifier: Apache-2.0
"""How a store is to be spoken to: who we are and whom we trust. Values; nothing here is read or checked
yet."""

import msgspec

from loden.secret import Secret


class Access(msgspec.Struct, frozen=True):
    """What a store's URL does not say.

    Args:
        is_tls: speak TLS; so it is wherever one of the files is given.
        ca_file: whom to trust; empty for whom the host trusts.
        cert_file, key_file: our own certificate and its key; both or none.
        username: empty where the store asks nobody who they are.
        password: of that user.
    """

    is_tls: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    username: str = ""
    password: Secret = Secret("")

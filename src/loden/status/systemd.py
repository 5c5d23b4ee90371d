# SPDX-License-Identifier: Apache-2.0
"""Tell the service manager how it goes (the protocol of ``sd_notify(3)``, as systemd documents it)."""

import logging
import os
import socket

_log = logging.getLogger(__name__)


def notify(**fields: object) -> bool:
    """Send one notification, such as ``notify(READY=1)``; whether somebody was there to take it.

    Never raises and never waits: the agent does not depend on who watches it.

    Args:
        fields: by their names in the protocol; a line break in a value becomes a space.
    """
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return False
    # An abstract socket's name begins with a null byte, which no environment variable can hold.
    address = f"\0{name[1:]}" if name.startswith("@") else name
    lines = (f"{field}={' '.join(str(value).splitlines())}" for field, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            sender.sendto("\n".join(lines).encode(errors="replace"), address)
    except (OSError, ValueError) as error:
        _log.debug("notify %s: %s", name, error)
        return False
    return True

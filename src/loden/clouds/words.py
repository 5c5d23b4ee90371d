# SPDX-License-Identifier: Apache-2.0
"""What a cloud or its vendor's client said, made fit for a log: short, and without what nobody may read."""

import logging
import re

_MOST = 240
_NOISE = re.compile(
    r"^code: \d+, |\s*(?:Encoded authorization failure message|server string to sign is|request id:).*",
    re.DOTALL,
)


def quiet(*loggers: str) -> None:
    """Keep vendors' clients from logging requests and answers, credentials among them, at ``-v=1``.

    Args:
        loggers: names of their loggers.
    """
    for name in loggers:
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.INFO))


def shorten(said: object) -> str:
    """One sentence out of a cloud's message.

    Args:
        said: its text. The innards of a signature or a policy are cut off, and so are numbers of requests,
            by which two equal answers would differ.
    """
    text = " ".join(_NOISE.sub("", str(said or "")).split()).rstrip(".: ") or "no reason given"
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"

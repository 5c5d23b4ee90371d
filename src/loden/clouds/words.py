# SPDX-License-Identifier: Apache-2.0
"""What a cloud said, made fit for a log: one line, not too long, without what nobody can read."""

import re

_MOST = 240
_NOISE = re.compile(
    r"^code: \d+, |\s*(?:Encoded authorization failure message|server string to sign is|request id:).*",
    re.DOTALL,
)


def shorten(said: object) -> str:
    """One sentence out of a cloud's message.

    Args:
        said: its text. The innards of a signature or a policy are cut off, and so are numbers of requests,
            by which two equal answers would differ.
    """
    text = " ".join(_NOISE.sub("", str(said or "")).split()).rstrip(".: ")
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"

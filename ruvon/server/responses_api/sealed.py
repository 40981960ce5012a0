"""Text that clients carry for us as ``encrypted_content``: reasoning, and compacted conversations.

It is the client's own conversation, and there is nothing in it to hide from whom it belongs to. So
it is not encrypted but encoded, and the prefix says so.
"""

from __future__ import annotations

import base64
import binascii

PREFIX = "ruvon-plain-1:"


def seal(text: str) -> str:
    """Text → what `unseal` reads."""
    return PREFIX + base64.b64encode(text.encode()).decode()


def unseal(sealed: str) -> str | None:
    """The text again, or None for what another server has made."""
    if not sealed.startswith(PREFIX):
        return None
    try:
        return base64.b64decode(sealed[len(PREFIX) :], validate=True).decode()
    except (binascii.Error, ValueError):
        return None

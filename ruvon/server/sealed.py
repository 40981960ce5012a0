"""Text that clients carry for us: reasoning and compacted conversations as ``encrypted_content``,
and thinking that is not shown as the ``signature`` of its block.

It is the client's own conversation, and there is nothing in it to hide from whom it belongs to. So
it is not encrypted but encoded, and the prefix says so.
"""

from __future__ import annotations

import base64

PREFIX = "ruvon-plain-1:"
SIGNATURE = "ruvon:"  # begins Anthropic's


def seal(text: str, prefix: str = PREFIX) -> str:
    """Text → what `unseal` reads."""
    return prefix + base64.b64encode(text.encode()).decode()


def unseal(sealed: str, prefix: str = PREFIX) -> str | None:
    """The text again, or None for what another server has made."""
    if not sealed.startswith(prefix):
        return None
    try:
        return base64.b64decode(sealed[len(prefix) :], validate=True).decode()
    except ValueError:  # not base64, or no text
        return None

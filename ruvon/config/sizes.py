"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

from ruvon.errors import ConfigError

MOST_BYTES = 1 << 63
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in ``"512MiB"``, ``"2GB"``, ``"1.5g"`` or ``"1048576"``. With an i the unit is a power
    of 1024, without it of 1000, as in the standards.

    Raises:
        ConfigError: the text is no size, or is zero or beyond all memory.
    """
    match = SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{text!r} is not a size; write it like 512MiB, 2GiB or 1048576")
    base = 1024 if match[3] else 1000
    power = " kmgt".index(match[2].lower() or " ")
    size = float(match[1]) * base**power
    if not 1 <= size < MOST_BYTES:
        raise ConfigError(f"size {text!r} is {'zero bytes' if size < 1 else 'more than can be'}")
    return int(size)

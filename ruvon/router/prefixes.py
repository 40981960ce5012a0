"""Which beginnings of prompts a replica holds, as far as a router can know.

A prompt is a chain of keys (`chain`), each of which stands for a piece and all pieces before it, as
a block's key does in `ruvon.engine.blocks`. What a replica was given it holds, until it evicts what
was used longest ago. So a router keeps the same keys in the same order for each replica, and drops
as many as the replica says that it has evicted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

PIECE = 256  # bytes of a prompt under one key
KEY_BYTES = 16
ENTRY_BYTES = 160  # of memory that a key takes, with its place in the order


def chain(root: bytes, prompt: bytes) -> list[bytes]:
    """The keys of a prompt's full pieces. ``root`` is what tells apart prompts that share nothing
    whatever they begin with, such as another tenant's."""
    key = blake2b(root, digest_size=KEY_BYTES).digest()
    keys = []
    for start in range(0, len(prompt) - PIECE + 1, PIECE):
        key = blake2b(key + prompt[start : start + PIECE], digest_size=KEY_BYTES).digest()
        keys.append(key)
    return keys


class Prefixes:
    """What one replica is believed to hold, at most ``limit`` keys.

    No key is older in the order than one that follows it in a chain, so a chain is forgotten from
    its end, as the replica's own cache does it, and what is left of one is its beginning.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._keys: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._keys)

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of a chain's keys are held, from its beginning."""
        held = self._keys
        return bisect_left(keys, True, key=lambda key: key not in held)

    def hold(self, keys: Sequence[bytes]) -> None:
        """Note that a prompt went there."""
        held = self._keys
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
        self.forget(len(held) - self.limit)

    def forget(self, count: int) -> None:
        """Drop those that were used longest ago, ``count`` of them."""
        for _ in range(min(count, len(self._keys))):
            self._keys.popitem(last=False)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Note that the replica has not got these, the end of a chain, after all."""
        for key in keys:
            self._keys.pop(key, None)

    def clear(self) -> None:
        """The replica began anew."""
        self._keys.clear()

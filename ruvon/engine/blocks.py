"""BlockPool: who holds which block of the KV cache, and which blocks can be found again.

Integers only; the tensors live in `kv_cache`. A block is in one of three states::

    held        referenced by one or more block tables
    cached      referenced by none, but findable by its key until evicted
    blank       referenced by none, nothing in it worth finding

Blocks are numbered from 1. Block `NULL` is nobody's and never written: it stands in a table for one
that is not there.

A full block may be *published* under a key that stands for its tokens and all tokens before them
(`block_key`), held or not. Sequences with an equal prefix then share it, without a copy: a
published block is never written again.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

NULL = 0
KEY_BYTES = 32


def root_key(salt: str) -> bytes:
    """The key "before" the first block: prefixes are shared only under one salt."""
    return blake2b(salt.encode(), digest_size=KEY_BYTES).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block after ``parent``.

    A cryptographic digest, because equal keys are taken for equal tokens: nobody can craft a
    prompt that finds another's blocks.
    """
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=KEY_BYTES).digest()


def extend_keys(
    keys: list[bytes], num_keys: int, tokens: Sequence[int], size: int, salt: str
) -> None:
    """Let ``keys`` have those of the first ``num_keys`` blocks of ``size`` tokens, at least; 8
    microseconds for each that is new."""
    for start in range(len(keys) * size, num_keys * size, size):
        parent = keys[-1] if keys else root_key(salt)
        keys.append(block_key(parent, tokens[start : start + size]))


def first_block(start: int, window: int, block_size: int) -> int:
    """The first block that a token at position ``start`` looks at, or any that comes after it;
    ``window`` 0 sees everything."""
    return max(start - window + 1, 0) // block_size if window else 0


class PrefixCache(NamedTuple):
    """What a router wants to know of a cache."""

    num_tokens: int  # that it holds
    num_evicted: int  # tokens that could be found and gave way to others, since the start
    num_forgotten: int  # times that it was emptied


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a pool knows besides who holds which block."""

    blank: tuple[int, ...]  # the last is handed out first
    cached: tuple[int, ...]  # least recently used first
    keys: Mapping[int, bytes]  # of published blocks


class BlockPool:
    """All blocks of one cache but `NULL`. Every verb costs O(1) for each block it touches."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * (num_blocks + 1)
        self._keys: list[bytes | None] = [None] * (num_blocks + 1)
        self._published: dict[bytes, int] = {}
        self._blank = list(range(num_blocks, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.num_evicted = 0  # published blocks that were given to others, since the start
        self.num_forgotten = 0  # times that all of them were

    @property
    def num_free(self) -> int:
        """Blocks that `grow` can hand out: blank or evictable."""
        return len(self._blank) + len(self._cached)

    @property
    def cached(self) -> list[int]:
        """Free blocks that can be found, least recently used first."""
        return list(self._cached)

    @property
    def prefix_cache(self) -> PrefixCache:
        """How large it is, and what it has lost."""
        size = self.block_size
        return PrefixCache(self.num_blocks * size, self.num_evicted * size, self.num_forgotten)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def has(self, key: bytes | None) -> bool:
        """Whether a block is published under this key."""
        return key in self._published

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Take hold of the longest run of published blocks that ``keys`` starts with; no key after
        the first that is not found is asked for."""
        found = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            self._hold(block)
            found.append(block)
        return found

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Extend a block table to hold ``num_tokens``; False, and unchanged, if it cannot."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > self.num_free:
            return False
        blocks.extend(self._take() for _ in range(missing))
        return True

    def publish(self, block: int, key: bytes) -> None:
        """Make a held, full block findable. A second block with the same tokens stays private."""
        if key not in self._published:
            self._published[key] = block
            self._keys[block] = key

    def release(self, blocks: Iterable[int]) -> None:
        """Let go of a block table. Its tail is evicted before its head, which more may share."""
        for block in reversed(list(blocks)):
            if block == NULL:
                continue
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def forget(self) -> None:
        """Empty the prefix cache: what is held stays held, and can no longer be found."""
        self.num_forgotten += 1
        self._blank.extend(self._cached)
        self._cached.clear()
        self._published.clear()
        self._keys = [None] * (self.num_blocks + 1)

    def state(self) -> PoolState:
        """A copy that stays as it is."""
        keys = {block: key for key, block in self._published.items()}
        return PoolState(tuple(self._blank), tuple(self._cached), keys)

    def restore(self, state: PoolState, tables: Iterable[Iterable[int]]) -> None:
        """Be in a state that a pool of this size was in when these were its block tables."""
        self._blank = list(state.blank)
        self._cached = OrderedDict.fromkeys(state.cached)
        self._published = {key: block for block, key in state.keys.items()}
        self._keys = [state.keys.get(block) for block in range(self.num_blocks + 1)]
        held = Counter(block for table in tables for block in table)
        self._references = [0, *(held[block] for block in range(1, self.num_blocks + 1))]

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise RuntimeError unless the books agree with the block tables there are; for tests."""
        held = Counter(block for table in tables for block in table if block != NULL)
        blocks = range(1, self.num_blocks + 1)
        keys = {key: block for block, key in enumerate(self._keys) if key is not None}
        agree = (
            all(self._references[block] == held[block] for block in blocks),
            sorted([*self._blank, *self._cached, *held]) == list(blocks),
            all(self._keys[block] is None for block in self._blank),
            all(self._keys[block] is not None for block in self._cached),
            self._published == keys,
        )
        if not all(agree):
            raise RuntimeError(f"blocks are lost, doubled or misfiled: {agree}")

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self.num_evicted += 1
            key = self._keys[block]
            assert key is not None
            del self._published[key]
            self._keys[block] = None
        self._references[block] = 1
        return block

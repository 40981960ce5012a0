"""GroupedPool: a sequence's block tables, one for each cache group, out of one pool of blocks.

A group that sees everything holds the blocks of all of a sequence's tokens, from its start on. One
with a window holds those that the next tokens look at, and those that the next chunk will be
written to. The others are back in the pool, where they can be found until they are evicted; `NULL`
stands for them in the table. So its share of a sequence does not grow with the sequence.

A prefix is found if the groups that see everything have all of it, and every other group what its
window shows of it to the next token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from ruvon.config import EngineConfig
from ruvon.engine.blocks import KEY_BYTES, NULL, BlockPool, first_block
from ruvon.engine.types import Blocks, Tables

UNBOUNDED = 1 << 40  # tokens; more than any sequence has


def group_key(key: bytes, group: int) -> bytes:
    """A block's key in a cache group. Keys are of one length, so that what follows tells."""
    return key + bytes((group,)) if group else key


def without_group(key: bytes) -> tuple[bytes, int]:
    """The two that `group_key` put together."""
    return key[:KEY_BYTES], int.from_bytes(key[KEY_BYTES:])


def most_blocks(num_tokens: int, block_size: int, windows: Sequence[int], chunk: int) -> int:
    """How many blocks a sequence of so many tokens ever holds at once, all groups together, if a
    step computes at most ``chunk`` of them."""
    whole = -(-num_tokens // block_size)
    return sum(
        [
            min(whole, -(-(window + chunk - 2) // block_size) + 1) if window else whole
            for window in windows
        ]
    )


def longest_that_fits(
    num_blocks: int, most_tokens: int, block_size: int, windows: Sequence[int], chunk: int
) -> int:
    """The longest sequence, of ``most_tokens`` at most, that never holds more blocks than that."""
    lengths = range(block_size, most_tokens + block_size, block_size)
    fitting = bisect_right(
        lengths, num_blocks, key=lambda length: most_blocks(length, block_size, windows, chunk)
    )
    return min(fitting * block_size, most_tokens)


def longest_chunk(config: EngineConfig) -> int:
    """Most tokens of a sequence that a step computes."""
    return config.largest_step.tokens


class GroupedPool:
    """Gives tables out of ``pool`` to sequences of which no step computes more than
    ``longest_chunk`` tokens. ``windows`` are those of the groups: 0 sees everything."""

    def __init__(
        self, pool: BlockPool, windows: Sequence[int] = (0,), longest_chunk: int = UNBOUNDED
    ) -> None:
        self.pool = pool
        self.slides = any(windows)  # whether any group gives blocks back before a sequence is over
        self.num_growing = max(windows.count(0), 1)  # groups that need more with every token
        self.windows = tuple(windows)
        self._longest_chunk = longest_chunk
        self._sliding = [(group, window) for group, window in enumerate(windows) if window]

    def most_blocks(self, num_tokens: int) -> int:
        """How many blocks a sequence of so many tokens ever holds at once."""
        return most_blocks(num_tokens, self.pool.block_size, self.windows, self._longest_chunk)

    def has(self, key: bytes | None) -> bool:
        """Whether all groups have a block with this key."""
        if not self.slides:
            return self.pool.has(key)
        return key is not None and all(
            self.pool.has(group_key(key, group)) for group in range(len(self.windows))
        )

    def match(self, keys: Iterable[bytes]) -> tuple[Tables, int]:
        """Take hold of the longest prefix that is there, of the one whose blocks have ``keys``: its
        tables, and how many blocks it has. No key after the first that is missing where everything
        is seen is asked for."""
        if not self.slides:
            found = self.pool.match(keys)
            return (found,), len(found)
        known = self._known(keys)
        length = self._longest_seen(known)
        tables = tuple([self._hold(known, length, *group) for group in enumerate(self.windows)])
        return tables, length

    def num_missing(self, tables: Tables, num_computed: int, num_tokens: int) -> int:
        """Blocks that `grow` would take."""
        wanted = self._wanted(num_computed, num_tokens)
        return sum(
            [
                max(self.pool.blocks_for(tokens) - len(table), 0)
                for table, tokens in zip(tables, wanted, strict=True)
            ]
        )

    def grow(self, tables: Tables, num_computed: int, num_tokens: int) -> Blocks | None:
        """Let tables hold what a sequence of ``num_tokens`` needs for its next step; what they have
        grown by. None, and they are as they were, if there are too few blocks."""
        if not self.slides:
            before = len(tables[0])
            return (tuple(tables[0][before:]),) if self.pool.grow(tables[0], num_tokens) else None
        if self.num_missing(tables, num_computed, num_tokens) > self.pool.num_free:
            return None
        known = [len(table) for table in tables]
        for table, tokens in zip(tables, self._wanted(num_computed, num_tokens), strict=True):
            self.pool.grow(table, tokens)
        return tuple([tuple(table[n:]) for table, n in zip(tables, known, strict=True)])

    def publish(self, tables: Tables, i: int, key: bytes) -> None:
        """Let others find the blocks at ``i``, which are full."""
        for group, table in enumerate(tables):
            self.pool.publish(table[i], group_key(key, group))

    def leave(self, tables: Tables, end: int) -> int:
        """Give back what nobody looks at any more once the first ``end`` tokens are computed. All
        steps that computed one of them are over. How many there are when more will leave."""
        size, next_end = self.pool.block_size, UNBOUNDED
        for group, window in self._sliding:
            table = tables[group]
            held = first = first_block(end, window, size)
            next_end = min(next_end, (first + 1) * size + window - 1)
            while held and table[held - 1] != NULL:
                held -= 1
            if held < first:
                self.pool.release(table[held:first])
                table[held:first] = [NULL] * (first - held)
        return next_end

    def release(self, tables: Tables) -> None:
        """Let go of all blocks of a sequence."""
        for table in tables:
            self.pool.release(table)

    def _wanted(self, num_computed: int, num_tokens: int) -> list[int]:
        """For how many tokens each group needs blocks."""
        soon = min(num_computed + self._longest_chunk, num_tokens)
        return [soon if window else num_tokens for window in self.windows]

    def _known(self, keys: Iterable[bytes]) -> list[bytes]:
        """The keys up to the first that is missing in a group which sees everything."""
        whole = [group for group, window in enumerate(self.windows) if not window]
        known = []
        for key in keys:
            if not all(self.pool.has(group_key(key, group)) for group in whole):
                break
            known.append(key)
        return known

    def _longest_seen(self, keys: list[bytes]) -> int:
        """Of how many of these blocks every group has what its window shows."""
        length = len(keys)
        while (missing := self._last_missing(keys, length)) is not None:
            length = missing  # whatever is longer shows it too
        return length

    def _last_missing(self, keys: list[bytes], length: int) -> int | None:
        """The last block that a window shows of a prefix and that is not there."""
        for group, window in self._sliding:
            first = first_block(length * self.pool.block_size, window, self.pool.block_size)
            for i in range(length - 1, first - 1, -1):
                if not self.pool.has(group_key(keys[i], group)):
                    return i
        return None

    def _hold(self, keys: list[bytes], length: int, group: int, window: int) -> list[int]:
        first = first_block(length * self.pool.block_size, window, self.pool.block_size)
        shown = [group_key(key, group) for key in keys[first:length]]
        return [NULL] * first + self.pool.match(shown)

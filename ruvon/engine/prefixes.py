"""Which blocks of a sequence need not be computed, since they have been, or are being, for another.

A block is found by its key (`blocks`). One that some sequence computes right now has a *claim*:
others wait for it rather than compute it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ruvon.engine.blocks import extend_keys
from ruvon.engine.grouped_pool import GroupedPool
from ruvon.engine.types import Sequence, Tables


class Prefixes:
    """The keys of sequences' blocks, and the claims. ``caching`` off: nothing is ever shared."""

    def __init__(self, grouped: GroupedPool, caching: bool) -> None:
        self._grouped = grouped
        self._caching = caching
        self._size = grouped.pool.block_size
        self.computing: dict[bytes, int] = {}  # key of a block in the making → sequence id

    def looks_up(self, seq: Sequence) -> bool:
        """Whether it may find blocks: not if it wants the logits or the hidden states of its whole
        prompt."""
        return self._caching and not (seq.pooling == "mean" or seq.lacks_prompt_logprobs)

    def is_computed(self, seq: Sequence) -> bool:
        """Whether another computes the block that a sequence awaits right now."""
        return seq.awaits in self.computing

    def find(self, seq: Sequence) -> tuple[Tables, int]:
        """Take hold of the published blocks its tokens start with, and see who makes the next: the
        tables, and how many blocks need not be computed."""
        num_shared = self._num_shared(seq)
        tables, num_found = self._grouped.match(self._keys_of(seq, num_shared))
        seq.missing = seq.keys[num_found] if num_found < num_shared else None
        seq.awaits = seq.missing if seq.missing in self.computing else None
        return tables, num_found

    def claim(self, seq: Sequence, num_planned: int) -> None:
        """Tell others which blocks of a prompt are in the making: the planned ones and, so that
        nobody begins with it between two chunks, the one after them."""
        num_claimed = min(num_planned + 1, self._num_shared(seq))
        self._extend_keys(seq, num_claimed)
        for i in range(max(seq.num_claimed, seq.num_published), num_claimed):
            self.computing.setdefault(seq.keys[i], seq.id)
        seq.num_claimed = max(num_claimed, seq.num_claimed)

    def publish(self, seq: Sequence, end: int) -> None:
        """Let others find the blocks that its first ``end`` tokens fill."""
        num_full = end // self._size if self._caching else 0
        if num_full <= seq.num_published:
            return
        self._extend_keys(seq, num_full)
        for i in range(seq.num_published, num_full):
            self._grouped.publish(seq.tables, i, seq.keys[i])
            self.computing.pop(seq.keys[i], None)
        seq.num_published = num_full

    def disclaim(self, seq: Sequence) -> None:
        """What a sequence has not computed so far, it will not."""
        for key in seq.keys[seq.num_published :]:
            if self.computing.get(key) == seq.id:
                del self.computing[key]

    def _num_shared(self, seq: Sequence) -> int:
        """How many blocks it could share: full ones, and never the one with the last token, whose
        logits are wanted."""
        return (len(seq.tokens) - 1) // self._size if self.looks_up(seq) else 0

    def _keys_of(self, seq: Sequence, num_keys: int) -> Iterable[bytes]:
        """The keys of its first blocks; those not known are computed as they are asked for."""
        known = seq.keys[:num_keys]
        return known if len(known) == num_keys else self._making_keys(seq, num_keys)

    def _making_keys(self, seq: Sequence, num_keys: int) -> Iterator[bytes]:
        for i in range(num_keys):
            self._extend_keys(seq, i + 1)
            yield seq.keys[i]

    def _extend_keys(self, seq: Sequence, num_keys: int) -> None:
        extend_keys(seq.keys, num_keys, seq.tokens, self._size, seq.salt)

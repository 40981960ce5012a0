"""How the tokens that one step may compute are shared among the running sequences."""

from __future__ import annotations

from collections.abc import Collection

from ruvon.engine.types import Sequence

MOST_FORCED = 32
"""Of a stream's tokens that come before prompts: a grammar seldom forces more at once."""


class Budget:
    """``max_tokens`` a step. If not ``chunked``, a prompt is computed in one step, if one can hold
    it. A longer one takes whole steps, and after each the streams that it has held up go on.

    Where a step goes through several ``stages``, whose first has to know its tokens, whoever awaits
    one is left out, and streams are divided into as many steps: no stage is idle then, if there are
    enough of them.
    """

    def __init__(self, max_tokens: int, chunked: bool, stages: int = 1) -> None:
        self._max_tokens = max_tokens
        self._stages = stages
        self._chunked = chunked
        self.held_up = False  # whether the last step left running streams out for a long prompt

    def share(self, running: Collection[Sequence], forced: bool) -> list[tuple[Sequence, int]]:
        """Who computes how many tokens: single tokens first, so that running streams go on
        smoothly, then prompts with what is left. ``forced``: streams may have several tokens, as
        grammars force them, and come first too."""
        most = self._max_tokens
        if self._stages > 1:
            num_streams = sum(1 for seq in running if seq.num_pending == 1)
            most = min(most, -(-num_streams // self._stages))
            running = [seq for seq in running if seq.num_computed < len(seq.tokens)]
        shares = [(seq, 1) for seq in running if seq.num_pending == 1]
        del shares[most:]
        num_single = len(shares)
        budget = self._max_tokens - num_single
        held_up, self.held_up = self.held_up, False
        several = [seq for seq in running if seq.num_pending > 1]
        if forced:
            several.sort(key=lambda seq: seq.num_pending > MOST_FORCED)
        for seq in several:
            num_tokens = min(seq.num_pending, budget)
            if num_tokens < seq.num_pending and not self._chunked:
                if len(shares) > num_single or held_up:
                    break
                # Beside nothing else, or it might never fit; then it is the others' turn.
                self.held_up = num_single > 0
                return [(seq, min(seq.num_pending, self._max_tokens))]
            if num_tokens == 0:
                break
            shares.append((seq, num_tokens))
            budget -= num_tokens
        return shares

"""Matchers: what a runner keeps of its sequences' grammars, beside the forward pass.

Each is a function of the tokens after the prompt, so it can be made anew at any time, as after a
preemption. A mask says which tokens may come; it is computed while the model computes logits. No
token goes up that its matcher has not consumed, whatever a sampler made of the mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ruvon.engine.grammar import Grammars
from ruvon.engine.types import Plan, SamplingParams, SamplingRow, StepResult
from ruvon.errors import RuvonError

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

MOST_REPEATED = 64  # tokens that are consumed once more for a compilation of one's own

REFUSED = "a token was sampled that the grammar does not allow"
EXHAUSTED = "the grammar takes more time or memory than a step may use"


class Matching:
    """How far one sequence has come in its grammar. ``at_once``: see `Matchers`; ``turn``: see
    `Grammars.matcher`."""

    def __init__(
        self,
        matcher: LLMatcher,
        sampling: SamplingParams,
        eos: Sequence[int],
        at_once: bool = True,
        turn: int = 0,
    ) -> None:
        self.matcher = matcher
        self.grammar = sampling.grammar
        self.turn = turn
        self.crowded = False  # whether it is to have a compilation of its own once there is one
        self.is_over = False  # nothing may follow what has been accepted
        self.num_tokens = 0  # accepted
        self.forced: list[int] = []  # what the matcher has consumed beyond them, the last one first
        self.at_once = at_once
        self.min_tokens = sampling.min_tokens
        self.forces = sampling.logprobs is None  # a forced token has no log-probability
        self.stops = [*sampling.stop_token_ids, *eos]
        self.eos = list(eos) if sampling.ignore_eos else []

    def withheld(self) -> list[int]:
        """Tokens that are not to be sampled as long as the grammar allows any other: ``min_tokens``
        and ``ignore_eos`` hold until it is complete and nothing more may come."""
        return self.stops if self.num_tokens < self.min_tokens else self.eos

    def leads_to(self, num_tokens: int) -> bool:
        """Whether it can be at so many tokens without beginning anew."""
        ahead = num_tokens - self.num_tokens
        return ahead == 0 or (ahead > 0 and not self.forced)

    def follow(self, output: Sequence[int]) -> None:
        """Consume what is known of the output and has not been consumed."""
        self.matcher.consume_tokens(list(output[self.num_tokens :]))
        self.num_tokens = len(output)

    def accept(self, token: int) -> tuple[int, ...]:
        """Consume a sampled token; it and those that it forces, as far as they come at once, or
        none if it is refused."""
        matcher = self.matcher
        if self.forced:
            if token != self.forced[-1]:
                return ()
            self.forced.pop()
        elif not matcher.consume_token(token):
            return ()
        elif self.forces and not matcher.is_stopped() and (forced := matcher.compute_ff_tokens()):
            self.forced = forced[: matcher.try_consume_tokens(forced)][::-1]
        at_once: list[int] = []
        if self.at_once:
            at_once, self.forced = self.forced[::-1], []
        self.num_tokens += 1 + len(at_once)
        return (token, *at_once)


class Matchers:
    """What a runner knows of its sequences' grammars: a function of plans, and of what has been
    sampled. While masks are computed, the interpreter's lock is free.

    ``at_once``: a token brings those that it forces, for the next step to compute in one chunk.
    Otherwise each is all that its step's mask allows, and how many tokens a step brings is known
    before it is over.
    """

    def __init__(self, grammars: Grammars, threads: int = 1, *, at_once: bool = True) -> None:
        self._grammars = grammars
        self._num_threads = threads
        self._at_once = at_once
        self._thread = ThreadPoolExecutor(1, "ruvon-masks")
        self._eos = grammars.eos_token_ids
        self.width = -(-grammars.vocab_size // 32)  # words of a mask
        self._matchings: dict[int, Matching] = {}

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor  # takes long to load

        return LLExecutor(num_threads=self._num_threads)

    def close(self) -> None:
        self._thread.shutdown()

    def follow(self, plan: Plan) -> None:
        """Forget the sequences that a plan ends."""
        if self._matchings:
            for seq_id in plan.ended:
                self._matchings.pop(seq_id, None)

    def begin(self, rows: Mapping[int, SamplingRow]) -> Masks | None:
        """Start to compute the masks of the rows of a step that have a grammar, by their places;
        their histories are complete. None if there are none."""
        if not rows:
            return None
        masks_RW = np.zeros((len(rows), self.width), dtype=np.int32)
        future = self._thread.submit(self.fill, list(rows.values()), masks_RW)
        return Masks(list(rows), masks_RW, future)

    def fill(self, rows: Sequence[SamplingRow], masks_RW: Ints) -> dict[int, str]:
        """Compute the masks of rows whose histories are complete; that of a row without a grammar
        allows everything. Errors by sequence: the mask of a row with an error allows nothing, nor
        does that of a row whose grammar is complete."""
        errors: dict[int, str] = {}
        turns: list[list[tuple[Matching, int]]] = [[] for _ in range(self._num_threads)]
        for place, row in enumerate(rows):
            if row.sampling.grammar is None:
                masks_RW[place] = -1
                continue
            matching = self._find(row, errors)
            if matching is None or matching.is_over:
                masks_RW[place] = 0
            elif matching.forced:
                allow(masks_RW[place], matching.forced[-1])
            else:
                turns[matching.turn].append((matching, place))
        live = [pair for turn in turns for pair in turn]  # neighbours are one thread's, after all
        self._compute([(matching.matcher, place) for matching, place in live], masks_RW)
        for matching, place in live:
            if matching.matcher.is_error():
                masks_RW[place] = 0
                errors[rows[place].seq_id] = EXHAUSTED
        withhold(masks_RW, {place: tokens for m, place in live if (tokens := m.withheld())})
        return errors

    def _compute(self, live: list[tuple[LLMatcher, int]], masks_RW: Ints) -> None:
        size = masks_RW.strides[0]
        if len(live) == 1:  # without what it takes to share the work
            ((matcher, place),) = live
            matcher.unsafe_compute_mask_ptr(masks_RW[place].ctypes.data, size)
        elif live:
            self._executor.unsafe_compute_mask_ptr(live, masks_RW.ctypes.data, size, len(masks_RW))

    def _find(self, row: SamplingRow, errors: dict[int, str]) -> Matching | None:
        """A sequence's matching, if it can be had; nearly always it is where it has to be."""
        found = self._matchings.get(row.seq_id)
        if found and not found.crowded and found.num_tokens == len(row.history) - row.num_prompt:
            return found
        try:
            return self._matching_of(row)
        except (RuvonError, RuntimeError) as error:  # forgotten, and not to be had this time
            errors[row.seq_id] = str(error)
            return None

    def _matching_of(self, row: SamplingRow) -> Matching:
        """Where a sequence is in its grammar, found anew if it was not here before."""
        num_output = len(row.history) - row.num_prompt
        found = self._matchings.get(row.seq_id)
        if found is None or not found.leads_to(num_output) or self._may_part(found):
            self._matchings.pop(row.seq_id, None)
            found = self._matchings[row.seq_id] = self._begin(row.sampling)
        if found.num_tokens < num_output:
            found.follow(row.history[row.num_prompt :])
        return found

    def _begin(self, sampling: SamplingParams) -> Matching:
        """A sequence's matching at the beginning, in the turn that the fewest others have."""
        grammar = sampling.grammar
        assert grammar is not None
        used = Counter(m.turn for m in self._matchings.values() if m.grammar == grammar)
        turn = min(range(self._num_threads), key=used.__getitem__)
        matcher = self._grammars.matcher(grammar, turn)
        made = Matching(matcher, sampling, self._eos, self._at_once, turn)
        made.crowded = turn > 0 and not self._grammars.has(grammar, turn)
        return made

    def _may_part(self, matching: Matching) -> bool:
        """Whether it is worth beginning anew, with a compilation that nobody else uses."""
        if not matching.crowded or matching.forced:
            return False
        matching.crowded = matching.num_tokens < MOST_REPEATED
        assert matching.grammar is not None
        return matching.crowded and self._grammars.has(matching.grammar, matching.turn)

    def accept(self, seq_ids: Sequence[int], masks: Masks, result: StepResult) -> StepResult:
        """A step's result after its grammars: each sampled token checked, what it forces behind it,
        and the sequences that are complete."""
        tokens, errors, ended = list(result.tokens), {**result.errors}, []
        failed = masks.errors
        for place in masks.places:
            seq_id = seq_ids[place]
            if seq_id in failed:
                tokens[place], errors[seq_id] = (), failed[seq_id]
            elif tokens[place]:
                matching = self._matchings[seq_id]
                tokens[place] = matching.accept(tokens[place][0])
                if not tokens[place]:
                    errors[seq_id] = why_refused(matching.matcher)
                elif not matching.matcher.is_stopped():
                    continue
                elif matching.matcher.is_error():  # which is also one that has stopped
                    tokens[place], errors[seq_id] = (), EXHAUSTED
                elif not matching.forced:
                    matching.is_over = True
                    ended.append(seq_id)
        return replace(result, tokens=tuple(tokens), errors=errors, ended=frozenset(ended))


@dataclass(frozen=True, slots=True)
class Masks:
    """Masks on their way: for token 32 w + b, bit b of word w says whether it is allowed."""

    places: list[int]  # of the step's rows, those with a grammar
    masks_RW: Ints
    filling: Future[dict[int, str]]

    def are_there(self, timeout: float | None = None) -> bool:
        """Whether they are, for better or worse, or will be in so many seconds."""
        return self.filling.done() or bool(wait((self.filling,), timeout).done)

    @property
    def errors(self) -> dict[int, str]:
        """Why some sequences' masks could not be computed; waits for the masks."""
        return self.filling.result()

    def wait(self) -> Ints:
        """The masks, once they are computed."""
        self.filling.result()
        return self.masks_RW

    def hand_to(self, rows: Sequence[SamplingRow]) -> None:
        """Give each of the step's rows its mask, once they are computed."""
        self.wait()
        for place, mask_W in zip(self.places, self.masks_RW, strict=True):
            rows[place].mask = mask_W


def with_grammar(rows: Iterable[SamplingRow]) -> dict[int, SamplingRow]:
    """Those rows of a step that have one, by their places."""
    return {i: row for i, row in enumerate(rows) if row.sampling.grammar is not None}


def why_refused(matcher: LLMatcher) -> str:
    """Why it has not consumed a token: whoever sampled is at fault, or the grammar, behind whose
    token the library looked too far ahead for what must follow."""
    error = matcher.get_error()
    return REFUSED if not error or "satisfy the grammar" in error else EXHAUSTED


def allow(mask_W: Ints, token: int) -> None:
    """A mask that allows one token."""
    mask_W[:] = 0
    mask_W.view(np.uint32)[token >> 5] = 1 << (token & 31)


def ban(mask_W: Ints, tokens: Iterable[int]) -> None:
    """Take tokens out of a mask, whatever is left."""
    words_W = mask_W.view(np.uint32)
    for token in tokens:
        words_W[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))


def withhold(masks_RW: Ints, withheld: Mapping[int, Sequence[int]]) -> None:
    """Take tokens out of rows of masks, but for a row of which nothing would be left."""
    hits: dict[int, list[int]] = {}  # nearly always none
    for token in {token for tokens in withheld.values() for token in tokens}:
        if token < 32 * masks_RW.shape[1]:
            column_R = masks_RW[:, token >> 5].tolist()
            for row, tokens in withheld.items():
                if column_R[row] >> (token & 31) & 1 and token in tokens:
                    hits.setdefault(row, []).append(token)
    for row, tokens in hits.items():
        kept_W = masks_RW[row].copy()
        ban(kept_W, tokens)
        if kept_W.any():
            masks_RW[row] = kept_W

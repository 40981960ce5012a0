"""SlotStates: what the device's sampler knows of each slot, kept by plans and results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import to_device
from ruvon.engine.gpu.deferred import NOTHING_BANNED, BadWords, DeferredRow
from ruvon.engine.gpu.graphs import Words
from ruvon.engine.types import BEING_SAMPLED, NewSequence, Plan, SamplingParams, SamplingRow
from ruvon.kernels import sample, scores

Ids: TypeAlias = Iterable[int]


class SlotStates:
    """Parameters by slot, kept here and sent with a step; penalties' counts and biases, which are
    as wide as the vocabulary, are made on the device when a sequence first samples."""

    def __init__(self, state: sample.SamplingState, eos_token_ids: Sequence[int]) -> None:
        num_slots = state.last_tokens.shape[0]
        self._state = state
        self._eos_token_ids = list(eos_token_ids)
        self._params: Words = np.zeros((num_slots, sample.PARAMS), dtype=np.int32)
        self._num_prompt: Words = np.zeros(num_slots, dtype=np.int32)
        self._unprepared: set[int] = set()
        self._waits: dict[int, NewSequence] = {}  # slots whose min_tokens have not been sampled
        self._sequences: dict[int, NewSequence] = {}
        self._histories: dict[int, list[int]] = {}  # of those whose sampling looks at it
        self._constrained: dict[int, SamplingRow] = {}  # those with a grammar
        self._bad_words: dict[int, BadWords] = {}
        # Sequence → how many alternatives, or which, where logprobs are wanted.
        self.num_logprobs: dict[int, int | tuple[int, ...]] = {}

    @property
    def waiting(self) -> bool:
        """Whether some row's parameters will change with what is sampled."""
        return bool(self._waits)

    # ---------------------------------------------------------------- by sequence

    def follow(self, plan: Plan) -> None:
        """Take in what a plan says of its sequences. All steps before the latest have been
        recorded."""
        for seq_id in plan.ended:
            self._forget(seq_id)
        for new in plan.new:
            self._forget(new.seq_id)
            self._meet(new)
        if self._histories:
            for chunk in plan.chunks:
                history = self._histories.get(chunk.seq_id)
                if history is not None and chunk.tokens != BEING_SAMPLED:
                    history[chunk.start :] = chunk.tokens

    def _forget(self, seq_id: int) -> None:
        self._sequences.pop(seq_id, None)
        self._histories.pop(seq_id, None)
        self._bad_words.pop(seq_id, None)
        self._constrained.pop(seq_id, None)
        self.num_logprobs.pop(seq_id, None)

    def _meet(self, new: NewSequence) -> None:
        sampling = new.sampling
        self._sequences[new.seq_id] = new
        if sampling.logprobs is not None:
            self.num_logprobs[new.seq_id] = sampling.logprob_token_ids or sampling.logprobs
        if sampling.bad_words:
            self._bad_words[new.seq_id] = BadWords(sampling.bad_words)
        if sampling.bad_words or is_penalized(sampling) or sampling.grammar is not None:
            self._histories[new.seq_id] = list(new.prefix)
        if sampling.grammar is not None:
            history = self._histories[new.seq_id]
            self._constrained[new.seq_id] = SamplingRow(
                new.seq_id, sampling, history, new.num_prompt, new.seed
            )

    def record(self, plan: Plan, tokens: Sequence[tuple[int, ...]]) -> None:
        """Take in what a step has sampled."""
        if not self._histories:
            return
        ends = [chunk.start + len(chunk.tokens) for chunk in plan.chunks if chunk.samples]
        for seq_id, end, sampled in zip(plan.rows, ends, tokens, strict=True):
            history = self._histories.get(seq_id)
            if history is not None and len(history) == end:  # or it has been told already
                history += sampled

    # ---------------------------------------------------------------- by slot

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Sequences changed from the first slot of each pair to the second."""
        for old, new in moves:
            self._params[new] = self._params[old]
            self._params[new, sample.SLOT] = new
            self._num_prompt[new] = self._num_prompt[old]
            for slots in (self._state.counts, self._state.bias):
                slots[new] = slots[old]
            self.renew([new])
            if old in self._unprepared:
                self._unprepared.add(new)
            else:
                self._unprepared.discard(new)
            if old in self._waits:
                self._waits[new] = self._waits.pop(old)

    def renew(self, slots: Iterable[int]) -> None:
        """These slots hold nothing yet of those they belong to now."""
        for slot in slots:
            self._unprepared.add(slot)
            self._waits.pop(slot, None)

    def fill(
        self, params: Words, seq_ids: Sequence[int], slots: Words, contexts: Words
    ) -> list[DeferredRow]:
        """Write the parameters of a step's rows, and mark those to be sampled later as padding.
        ``contexts`` are tokens before the one sampled."""
        rows = list(zip(seq_ids, slots.tolist(), contexts.tolist(), strict=True))
        if self._unprepared:
            for seq_id, slot, context in rows:
                if slot in self._unprepared:
                    self._prepare(slot, self._sequences[seq_id], context)
        params[:] = self._params[slots]
        params[:, sample.DRAW] = contexts - self._num_prompt[slots]
        if self._constrained:
            (masked,) = params[:, sample.MASK].nonzero()
            params[masked, sample.MASK] = np.arange(1, len(masked) + 1)
        if self._waits:
            self._end_waits(slots, params)
        return [
            self._defer(row, params, *about)
            for row, about in enumerate(rows)
            if is_deferred(self._sequences[about[0]].sampling)
        ]

    def rows_with_grammar(self, seq_ids: Sequence[int]) -> dict[int, SamplingRow]:
        """The rows of a step that has been followed which have one, by their place; their masks are
        in the same order."""
        known = self._constrained
        if not known:
            return {}
        return {place: known[seq_id] for place, seq_id in enumerate(seq_ids) if seq_id in known}

    def _defer(self, row: int, params: Words, seq_id: int, slot: int, context: int) -> DeferredRow:
        own, banned = params[row].copy(), NOTHING_BANNED
        params[row, sample.SLOT] = -1
        if seq_id in self._bad_words:
            banned = self._bad_words[seq_id].completed(self._histories[seq_id], context)
        typical_p = self._sequences[seq_id].sampling.typical_p
        return DeferredRow(row, slot, own, typical_p, banned)

    def _prepare(self, slot: int, new: NewSequence, context: int) -> None:
        self._unprepared.discard(slot)
        sampling = new.sampling
        words = self._params[slot]
        write_params(words, sampling, new.seed)
        words[sample.SLOT] = slot
        self._num_prompt[slot] = new.num_prompt
        if words[sample.HISTORY] >= 0:
            history = self._histories[new.seq_id][:context]
            self._write_counts(slot, history[: new.num_prompt], history[new.num_prompt :])
        waiting = bool(sampling.min_tokens) and sampling.grammar is None  # whose mask sees to it
        if waiting:
            self._waits[slot] = new
        if words[sample.BIAS] >= 0:
            self._write_bias(slot, sampling, waiting=waiting)

    def _end_waits(self, slots: Words, params: Words) -> None:
        """Where as many tokens as ``min_tokens`` have been sampled, let stop tokens be."""
        for slot, draw in zip(slots.tolist(), params[:, sample.DRAW].tolist(), strict=True):
            new = self._waits.get(slot)
            if new is not None and draw >= new.sampling.min_tokens:
                del self._waits[slot]
                self._write_bias(slot, new.sampling, waiting=False)

    def _write_counts(self, slot: int, prompt: Ids, output: Ids) -> None:
        counts = self._state.counts[slot]
        prompt_P, output_P = self._ids(prompt), self._ids(output)
        ones = torch.ones_like(output_P, dtype=torch.int32)
        number = torch.zeros_like(counts, dtype=torch.int32).index_add_(0, output_P, ones)
        flags = torch.zeros_like(counts).index_fill_(0, prompt_P, scores.IN_PROMPT.value)
        counts.copy_(number.clamp_(max=scores.COUNT.value) | flags)

    def _write_bias(self, slot: int, sampling: SamplingParams, *, waiting: bool) -> None:
        bias = self._state.bias[slot].zero_()
        if sampling.allowed_token_ids is not None:
            bias.fill_(-torch.inf).index_fill_(0, self._ids(sampling.allowed_token_ids), 0)
        if sampling.logit_bias:
            amounts = np.array([*sampling.logit_bias.values()], dtype=np.float32).clip(-6e4, 6e4)
            (words,) = to_device((amounts.view(np.int32),), bias.device)
            added = words.view(torch.float32).to(bias.dtype)
            bias.index_add_(0, self._ids(sampling.logit_bias), added)
        if waiting:
            eos = [] if sampling.ignore_eos else self._eos_token_ids
            bias.index_fill_(0, self._ids([*sampling.stop_token_ids, *eos]), -torch.inf)

    def _ids(self, ids: Ids) -> Tensor:
        """On the device, without waiting for it."""
        array: Any = np.fromiter(ids, dtype=np.int32)
        return to_device((array,), self._state.counts.device)[0].long()


def is_deferred(sampling: SamplingParams) -> bool:
    """Whether it is more than the captured step's sampler does."""
    return sampling.typical_p < 1 or bool(sampling.bad_words)


def is_penalized(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )


def write_params(words: Words, sampling: SamplingParams, seed: int) -> None:
    """One row's parameters; HISTORY and BIAS say whether a slot's counts and biases are used."""
    floats = words.view(np.float32)
    floats[sample.TEMPERATURE] = sampling.temperature
    floats[sample.TOP_P] = sampling.top_p
    floats[sample.MIN_P] = sampling.min_p
    floats[sample.REPETITION] = sampling.repetition_penalty
    floats[sample.PRESENCE] = sampling.presence_penalty
    floats[sample.FREQUENCY] = sampling.frequency_penalty
    words[sample.TOP_K] = min(sampling.top_k, 2**31 - 1)
    low_high = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint32)
    words[[sample.SEED_LOW, sample.SEED_HIGH]] = low_high.view(np.int32)
    biased = bool(
        sampling.logit_bias or sampling.allowed_token_ids is not None or sampling.min_tokens
    )
    words[sample.HISTORY] = 0 if is_penalized(sampling) else -1
    words[sample.BIAS] = 0 if biased else -1
    words[sample.WANTS_LOGPROB] = sampling.logprobs is not None
    words[sample.MASK] = sampling.grammar is not None

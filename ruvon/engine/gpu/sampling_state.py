"""SlotStates: what the device's sampler knows of each slot, kept by plans and results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import Ints, to_device
from ruvon.engine.runner import SamplingRows
from ruvon.engine.transforms import is_held, is_penalized, stopping_ids
from ruvon.engine.types import Plan, SamplingParams, SamplingRow
from ruvon.kernels import sample, scores


class SlotStates:
    """Parameters by slot, kept here and sent with a step; penalties' counts and biases, which are
    as wide as the vocabulary, are made on the device when a sequence first samples."""

    def __init__(self, state: sample.SamplingState, eos_token_ids: Sequence[int]) -> None:
        self._state = state
        self._eos_token_ids = eos_token_ids
        self._params = np.zeros((len(state.last_tokens), sample.PARAMS), dtype=np.int32)
        self._due: dict[int, int] = {}
        """Sequence → at how many tokens its slot has to be written: a newcomer's at once, and again
        where stop tokens begin to be allowed."""
        self.rows = SamplingRows(lambda sampling: is_masked(sampling) or is_penalized(sampling))
        # By sequence: rows with a mask, which has its place in the order of rows; with logprobs.
        self.masked: dict[int, SamplingRow] = {}
        self.scored: dict[int, SamplingRow] = {}

    @property
    def waiting(self) -> bool:
        """Whether some row's parameters will change with what is sampled."""
        return any(self._due.values())

    # ---------------------------------------------------------------- by sequence

    def follow(self, plan: Plan) -> None:
        """Take in what a plan says of its sequences. All steps before the latest have been
        recorded."""
        self.rows.follow(plan)
        for seq_id in (*plan.ended, *[new.seq_id for new in plan.new]):
            for known in (self.masked, self.scored, self._due):
                known.pop(seq_id, None)
        for new in plan.new:
            if is_masked(new.sampling):
                self.masked[new.seq_id] = self.rows[new.seq_id]
            if new.sampling.logprobs is not None:
                self.scored[new.seq_id] = self.rows[new.seq_id]

    # ---------------------------------------------------------------- by slot

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Sequences changed from the first slot of each pair to the second."""
        for old, new in moves:
            for slots in (self._params, self._state.counts, self._state.bias):
                slots[new] = slots[old]
            self._params[new, sample.SLOT] = new

    def renew(self, seq_ids: Iterable[int]) -> None:
        """The slots of these sequences hold nothing yet of theirs."""
        for seq_id in seq_ids:
            self._due[seq_id] = 0

    def fill(self, params: Ints, seq_ids: Sequence[int], slots: Ints, contexts: Ints) -> None:
        """Write the parameters of a step's rows. ``contexts`` are tokens before the one sampled."""
        if self._due:
            for seq_id, slot, context in zip(
                seq_ids, slots.tolist(), contexts.tolist(), strict=True
            ):
                if context >= self._due.get(seq_id, context + 1):
                    self._write(slot, self.rows[seq_id], context)
        params[:] = self._params[slots]
        params[:, sample.DRAW] += contexts
        if self.masked:
            (masked,) = params[:, sample.MASK].nonzero()
            params[masked, sample.MASK] = np.arange(1, len(masked) + 1)

    def _write(self, slot: int, row: SamplingRow, context: int) -> None:
        sampling, held = row.sampling, is_held(row.sampling, context - row.num_prompt)
        if self._due.pop(row.seq_id) == 0:
            self._params[slot] = params_of(row, slot)
            if is_penalized(sampling):
                self._write_counts(slot, row, context)
        if held:
            self._due[row.seq_id] = row.num_prompt + sampling.min_tokens
        if is_biased(sampling):
            withheld = stopping_ids(row, self._eos_token_ids) if held else []
            self._write_bias(slot, sampling, withheld)

    def _write_counts(self, slot: int, row: SamplingRow, context: int) -> None:
        counts = self._state.counts[slot]
        prompt_P = self._ids(row.history[: row.num_prompt])
        output_P = self._ids(row.history[row.num_prompt : context])
        ones = torch.ones_like(output_P, dtype=torch.int32)
        number = torch.zeros_like(counts, dtype=torch.int32).index_add_(0, output_P, ones)
        flags = torch.zeros_like(counts).index_fill_(0, prompt_P, scores.IN_PROMPT.value)
        counts.copy_(number.clamp_(max=scores.COUNT.value) | flags)

    def _write_bias(self, slot: int, sampling: SamplingParams, withheld: list[int]) -> None:
        bias = self._state.bias[slot].zero_()
        if sampling.allowed_token_ids is not None:
            bias.fill_(-torch.inf).index_fill_(0, self._ids(sampling.allowed_token_ids), 0)
        if sampling.logit_bias:
            amounts = np.array([*sampling.logit_bias.values()], dtype=np.float32).clip(-6e4, 6e4)
            (words,) = to_device((amounts.view(np.int32),), bias.device)
            added = words.view(torch.float32).to(bias.dtype)
            bias.index_add_(0, self._ids(sampling.logit_bias), added)
        if withheld:
            bias.index_fill_(0, self._ids(withheld), -torch.inf)

    def _ids(self, ids: Iterable[int]) -> Tensor:
        """On the device, without waiting for it."""
        array: Any = np.fromiter(ids, dtype=np.int32)
        return to_device((array,), self._state.counts.device)[0].long()


def part(rows: Mapping[int, SamplingRow], seq_ids: Sequence[int]) -> dict[int, SamplingRow]:
    """Those of a step's sequences that are among ``rows``, by their places in it."""
    if not rows:
        return {}
    return {place: rows[seq_id] for place, seq_id in enumerate(seq_ids) if seq_id in rows}


def is_masked(sampling: SamplingParams) -> bool:
    """Whether what may be sampled depends on more than the captured step knows."""
    return sampling.grammar is not None or bool(sampling.bad_words) or sampling.typical_p < 1


def is_biased(sampling: SamplingParams) -> bool:
    return bool(
        sampling.logit_bias or sampling.allowed_token_ids is not None or sampling.min_tokens
    )


def params_of(row: SamplingRow, slot: int) -> Ints:
    """A row's parameters, but for those that differ from step to step; HISTORY and BIAS say whether
    a slot's counts and biases are used."""
    sampling = row.sampling
    if sampling.typical_p < 1:
        sampling = replace(sampling, top_k=0, min_p=0, top_p=1)  # its mask sees to these as well
    words: Ints = np.zeros(sample.PARAMS, dtype=np.int32)
    floats = words.view(np.float32)
    floats[sample.TEMPERATURE] = sampling.temperature
    floats[sample.TOP_P] = sampling.top_p
    floats[sample.MIN_P] = sampling.min_p
    floats[sample.REPETITION] = sampling.repetition_penalty
    floats[sample.PRESENCE] = sampling.presence_penalty
    floats[sample.FREQUENCY] = sampling.frequency_penalty
    words[sample.TOP_K] = min(sampling.top_k, 2**31 - 1)
    seed = np.array([row.seed % 2**64], dtype=np.uint64)
    words[[sample.SEED_LOW, sample.SEED_HIGH]] = seed.view(np.int32)
    words[sample.DRAW] = -row.num_prompt  # to which a step adds how far it is
    words[sample.HISTORY] = 0 if is_penalized(sampling) else -1
    words[sample.BIAS] = 0 if is_biased(sampling) else -1
    words[sample.WANTS_LOGPROB] = sampling.logprobs is not None
    words[sample.SLOT] = slot
    words[sample.MASK] = is_masked(sampling)
    return words

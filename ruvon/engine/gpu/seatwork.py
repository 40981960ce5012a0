"""SeatWork: what the device's sampler knows of each seat, kept up to date from the host."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from ruvon.engine.gpu.graphs import Words
from ruvon.engine.types import SamplingParams, SamplingRow
from ruvon.kernels import sample

Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int16]]


class SeatWork:
    """Parameters by seat, mirrored here and sent with each step; penalties' counts and biases,
    which are as wide as the vocabulary, are made on the device when a sequence first samples."""

    def __init__(self, state: sample.SamplingState, eos_token_ids: Sequence[int]) -> None:
        num_seats = state.last_tokens.shape[0]
        self._state = state
        self._eos_token_ids = list(eos_token_ids)
        self._params: Words = np.zeros((num_seats, sample.PARAMS), dtype=np.int32)
        self._num_prompt: Words = np.zeros(num_seats, dtype=np.int32)
        self._unprepared: set[int] = set()
        self._waits: dict[int, SamplingRow] = {}  # seats whose min_tokens have not been drawn

    @property
    def waiting(self) -> bool:
        """Whether some row's parameters will change with what is drawn."""
        return bool(self._waits)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Sequences changed from the first seat of each pair to the second."""
        for old, new in moves:
            self._params[new] = self._params[old]
            self._params[new, sample.SEAT] = new
            self._num_prompt[new] = self._num_prompt[old]
            for seats in (self._state.counts, self._state.bias):
                seats[new] = seats[old]
            self._unprepared.discard(new)
            if old in self._unprepared:
                self._unprepared.add(new)
            self._waits.pop(new, None)
            if old in self._waits:
                self._waits[new] = self._waits.pop(old)

    def fill(
        self,
        params: Words,
        rows: Sequence[SamplingRow],
        seats: Words,
        contexts: Words,
        newcomers: Collection[int],
    ) -> None:
        """Write the parameters of a step's rows. ``contexts`` are tokens before the one drawn;
        ``newcomers`` are seats that hold nothing yet of those who sit there now."""
        self._unprepared.update(newcomers)
        for seat in newcomers:
            self._waits.pop(seat, None)
        if self._unprepared:
            for row, seat in zip(rows, seats.tolist(), strict=True):
                if seat in self._unprepared:
                    self._prepare(seat, row)
        params[:] = self._params[seats]
        params[:, sample.DRAW] = contexts - self._num_prompt[seats]
        if self._waits:
            self._end_waits(seats, params)

    def replace_last(self, seat: int, token: int) -> None:
        """The host has drawn a token itself, for whoever sits there."""
        self._state.last_tokens[seat] = token

    def _prepare(self, seat: int, row: SamplingRow) -> None:
        self._unprepared.discard(seat)
        sampling = row.sampling
        words = self._params[seat]
        write_params(words, sampling, row.seed)
        words[sample.SEAT] = seat
        self._num_prompt[seat] = row.num_prompt
        if words[sample.HISTORY] >= 0:
            counts = count_tokens(row, self._state.counts.shape[1])
            self._state.counts[seat].copy_(torch.from_numpy(counts))
        if sampling.min_tokens:
            self._waits[seat] = row
        if words[sample.BIAS] >= 0:
            self._write_bias(seat, row, waiting=bool(sampling.min_tokens))

    def _end_waits(self, seats: Words, params: Words) -> None:
        """Where as many tokens as ``min_tokens`` have been drawn, let stop tokens be drawn."""
        for seat, draw in zip(seats.tolist(), params[:, sample.DRAW].tolist(), strict=True):
            row = self._waits.get(seat)
            if row is not None and draw >= row.sampling.min_tokens:
                del self._waits[seat]
                self._write_bias(seat, row, waiting=False)

    def _write_bias(self, seat: int, row: SamplingRow, *, waiting: bool) -> None:
        sampling = row.sampling
        bias = np.zeros(self._state.bias.shape[1], dtype=np.float16)
        if sampling.allowed_token_ids is not None:
            bias[:] = -np.inf
            bias[list(sampling.allowed_token_ids)] = 0
        for token, amount in sampling.logit_bias.items():
            bias[token] += np.float16(np.clip(amount, -6e4, 6e4))
        if waiting:
            bias[list(sampling.stop_token_ids)] = -np.inf
            if not sampling.ignore_eos:
                bias[self._eos_token_ids] = -np.inf
        self._state.bias[seat].copy_(torch.from_numpy(bias))


def write_params(words: Words, sampling: SamplingParams, seed: int) -> None:
    """One row's parameters; HISTORY and BIAS say whether a seat's counts and biases are used."""
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
    penalized = (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )
    biased = bool(
        sampling.logit_bias or sampling.allowed_token_ids is not None or sampling.min_tokens
    )
    words[sample.HISTORY] = 0 if penalized else -1
    words[sample.BIAS] = 0 if biased else -1
    words[sample.WANTS_LOGPROB] = sampling.logprobs is not None


def count_tokens(row: SamplingRow, vocab_size: int) -> Counts:
    """int16 [V]: how often the output holds each token, flagged where the prompt does."""
    output = row.history[row.num_prompt :]
    counts: Counts = np.minimum(
        np.bincount(output, minlength=vocab_size), sample.COUNT.value
    ).astype(np.int16)
    counts[np.unique(row.history[: row.num_prompt])] |= sample.IN_PROMPT.value
    return counts

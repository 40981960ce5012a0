"""Plans and results as bytes: what goes between the scheduler's process and those of the ranks.

A fixed layout, little-endian: how many there are of each, whole numbers of 64 bits, numbers with a
fraction of 64 bits, and JSON for what is seldom there (settings of new sequences, errors). Nothing
that is read here can become code, whoever wrote it.
"""

from __future__ import annotations

import dataclasses
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
import orjson

from ruvon.engine.types import (
    NO_BLOCKS,
    Chunk,
    NewSequence,
    Plan,
    PooledRows,
    PromptRow,
    SamplingParams,
    StepResult,
    TokenLogprobs,
)
from ruvon.grammars import Grammar

Number = TypeVar("Number", int, float)

SIZES = struct.Struct("<QQQ")  # how many integers, how many floats, how many bytes of JSON
DEFAULT = SamplingParams()
NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


def encode_plan(plan: Plan) -> bytes:
    """A plan as bytes."""
    ints = [plan.step, len(plan.chunks), len(plan.new), len(plan.ended), len(plan.prompt_rows)]
    ints += [len(plan.pooled_rows), *plan.ended]
    _write_chunks(ints, plan.chunks)
    for new in plan.new:
        ints += (new.seq_id, new.num_prompt, new.seed, len(new.prefix))
        ints += new.prefix
    for row in plan.prompt_rows:
        ints += (row.seq_id, row.chunk, row.num_top, len(row.targets))
        ints += row.targets
    for pooled in plan.pooled_rows:
        ints += (pooled.seq_id, pooled.chunk, pooled.first, pooled.count)
    return _join(ints, [], [sampling_fields(new.sampling) for new in plan.new])


def decode_plan(data: bytes | memoryview) -> Plan:
    """The plan that `encode_plan` was given. Raises ValueError for other bytes."""
    ints, _, samplings = _part(data)
    step, num_chunks, num_new, num_ended, num_prompt, num_pooled = ints.take(6)
    ended = ints.take(num_ended)
    return Plan(
        step,
        _read_chunks(ints, num_chunks),
        tuple([_read_new(ints, samplings[i]) for i in range(num_new)]),
        ended,
        tuple([_read_prompt_row(ints) for _ in range(num_prompt)]),
        tuple([PooledRows(*ints.take(4)) for _ in range(num_pooled)]),
    )


def _write_chunks(ints: list[int], chunks: Sequence[Chunk]) -> None:
    """Field by field: most chunks have one token and no blocks, and are read fastest so."""
    ints += [chunk.seq_id for chunk in chunks]
    ints += [chunk.generation for chunk in chunks]
    ints += [chunk.start for chunk in chunks]
    ints += [chunk.samples for chunk in chunks]
    ints += [len(chunk.blocks) for chunk in chunks]
    _write_runs(ints, [chunk.tokens for chunk in chunks])
    for chunk in chunks:
        if chunk.blocks:
            _write_runs(ints, chunk.blocks)


def _read_chunks(ints: Ints, count: int) -> tuple[Chunk, ...]:
    seq_ids, generations, starts, samples, groups = (ints.take(count) for _ in range(5))
    tokens = _read_runs(ints, count)
    blocks = [tuple(_read_runs(ints, num)) if num else NO_BLOCKS for num in groups]
    return tuple(map(Chunk, seq_ids, generations, tokens, starts, blocks, map(bool, samples)))


def _write_runs(ints: list[int], runs: Sequence[Sequence[int]]) -> None:
    """Several sequences of numbers: first how long each is."""
    ints += [len(run) for run in runs]
    for run in runs:
        ints += run


def _read_runs(ints: Ints, count: int) -> list[tuple[int, ...]]:
    lengths = ints.take(count)
    if sum(lengths) == count and max(lengths, default=1) == 1:
        return [(number,) for number in ints.take(count)]
    return [ints.take(length) for length in lengths]


def _read_new(ints: Ints, fields: Mapping[str, Any]) -> NewSequence:
    seq_id, num_prompt, seed, num_prefix = ints.take(4)
    return NewSequence(seq_id, sampling_of(fields), num_prompt, seed, ints.take(num_prefix))


def _read_prompt_row(ints: Ints) -> PromptRow:
    seq_id, chunk, num_top, num_targets = ints.take(4)
    return PromptRow(seq_id, chunk, ints.take(num_targets), num_top)


def sampling_fields(sampling: SamplingParams) -> dict[str, Any]:
    """Those that are not as they are by default, as JSON has them. Of a grammar, what its matcher
    needs."""
    fields = {
        name: value
        for name in NAMES
        if (value := getattr(sampling, name)) != getattr(DEFAULT, name)
    }
    if sampling.grammar is not None:
        fields["grammar"] = grammar_fields(sampling.grammar)
    if "logit_bias" in fields:
        fields["logit_bias"] = list(sampling.logit_bias.items())
    return fields


def grammar_fields(grammar: Grammar) -> dict[str, str]:
    """All of it but the schema that a model may be told of."""
    return {"start": grammar.start, "rules": grammar.rules, "param": grammar.param}


def sampling_of(fields: Mapping[str, Any]) -> SamplingParams:
    """What `sampling_fields` was given, out of JSON."""
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()
    }
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    if "bad_words" in values:
        values["bad_words"] = tuple(map(tuple, values["bad_words"]))
    if "grammar" in values:
        values["grammar"] = Grammar(**values["grammar"])
    return SamplingParams(**values)


def encode_result(result: StepResult) -> bytes:
    """A step's result as bytes."""
    ints = [len(result.tokens), len(result.prompt_logprobs), len(result.pooled)]
    ints += [len(result.ended), *sorted(result.ended)]
    floats = [result.seconds]
    _write_runs(ints, result.tokens)
    ints += [-1 if logprobs is None else len(logprobs) for logprobs in result.logprobs]
    for logprobs in result.logprobs:
        if logprobs:
            _write_logprobs(ints, floats, logprobs)
    for seq_id, scores in result.prompt_logprobs.items():
        ints += (seq_id, len(scores))
        _write_logprobs(ints, floats, scores)
    for seq_id, sum_C in result.pooled.items():
        ints += (seq_id, len(sum_C))
        floats += sum_C.tolist()
    return _join(ints, floats, list(result.errors.items()))


def decode_result(data: bytes | memoryview) -> StepResult:
    """The result that `encode_result` was given. Raises ValueError for other bytes."""
    ints, floats, errors = _part(data)
    num_rows, num_prompts, num_pooled, num_ended = ints.take(4)
    ended = frozenset(ints.take(num_ended))
    seconds = floats.one()
    tokens = _read_runs(ints, num_rows)
    logprobs = [
        None if count < 0 else _read_logprobs(ints, floats, count) for count in ints.take(num_rows)
    ]
    prompts, pooled = {}, {}
    for _ in range(num_prompts):
        seq_id, count = ints.take(2)
        prompts[seq_id] = _read_logprobs(ints, floats, count)
    for _ in range(num_pooled):
        seq_id, count = ints.take(2)
        pooled[seq_id] = np.array(floats.take(count))
    return StepResult(tuple(tokens), tuple(logprobs), prompts, pooled, dict(errors), ended, seconds)


def _write_logprobs(ints: list[int], floats: list[float], scores: Iterable[TokenLogprobs]) -> None:
    for score in scores:
        ints += (score.token, score.rank, len(score.top))
        floats.append(score.logprob)
        for token, logprob in score.top:
            ints.append(token)
            floats.append(logprob)


def _read_logprobs(ints: Ints, floats: Floats, count: int) -> tuple[TokenLogprobs, ...]:
    scores = []
    for _ in range(count):
        token, rank, num_top = ints.take(3)
        logprob = floats.one()
        top = tuple(zip(ints.take(num_top), floats.take(num_top), strict=True))
        scores.append(TokenLogprobs(token, logprob, rank, top))
    return tuple(scores)


class Numbers(Generic[Number]):
    """Numbers of one kind (``q`` or ``d``, as `array` has it), read one after another."""

    def __init__(self, code: Literal["q", "d"], data: memoryview) -> None:
        self._values: tuple[Number, ...] = tuple(array(code, bytes(data)))
        self._at = 0

    def take(self, count: int) -> tuple[Number, ...]:
        """The next ones. Raises ValueError if there are not that many."""
        first, self._at = self._at, self._at + count
        if count < 0 or self._at > len(self._values):
            raise ValueError("the message is cut off")
        return self._values[first : self._at]

    def one(self) -> Number:
        """The next one."""
        return self.take(1)[0]


Ints: TypeAlias = Numbers[int]
Floats: TypeAlias = Numbers[float]


def _join(ints: list[int], floats: list[float], rest: list[Any]) -> bytes:
    text = orjson.dumps(rest) if rest else b""
    sizes = SIZES.pack(len(ints), len(floats), len(text))
    return b"".join((sizes, array("q", ints).tobytes(), array("d", floats).tobytes(), text))


def _part(data: bytes | memoryview) -> tuple[Ints, Floats, list[Any]]:
    view = memoryview(data)
    if len(view) < SIZES.size:
        raise ValueError("the message is cut off")
    num_ints, num_floats, num_bytes = SIZES.unpack_from(view)
    floats_at = SIZES.size + 8 * num_ints
    text_at = floats_at + 8 * num_floats
    if len(view) != text_at + num_bytes:
        raise ValueError("the message is cut off")
    text = view[text_at:]
    return (
        Numbers("q", view[SIZES.size : floats_at]),
        Numbers("d", view[floats_at:text_at]),
        orjson.loads(text) if num_bytes else [],
    )

"""`build_batch` against the same thing said token by token."""

import random

import numpy as np
import pytest
import torch

from ruvon.engine.batch import BlockTables, build_batch, join, part
from ruvon.engine.types import (
    BEING_SAMPLED,
    Chunk,
    NewSequence,
    Plan,
    PromptRow,
    SamplingParams,
)

CPU = torch.device("cpu")


def make_plan(chunks, prompt_rows=()) -> Plan:
    new = tuple(NewSequence(chunk.seq_id, SamplingParams(), 0, 0) for chunk in chunks)
    return Plan(0, tuple(chunks), new, prompt_rows=tuple(prompt_rows))


def random_plan(rng: random.Random, block_size: int) -> Plan:
    chunks, free = [], list(range(1000))
    rng.shuffle(free)
    for seq_id in range(rng.randint(1, 9)):
        start = rng.choice([0, rng.randrange(100)])
        tokens = tuple(rng.randrange(5000) for _ in range(rng.choice([1, 1, rng.randint(2, 70)])))
        # A block table may reach further than this chunk does.
        num_blocks = -(-(start + len(tokens)) // block_size) + rng.randint(0, 2)
        blocks = (tuple(free.pop() for _ in range(num_blocks)),)
        chunks.append(Chunk(seq_id, 0, tokens, start, blocks, rng.random() < 0.7))
    prompt_rows = [
        PromptRow(chunk.seq_id, index, chunk.tokens[: rng.randint(0, len(chunk.tokens))], 1)
        for index, chunk in enumerate(chunks)
        if rng.random() < 0.3
    ]
    return make_plan(chunks, prompt_rows)


@pytest.mark.parametrize("seed", range(30))
def test_a_batch_says_what_its_plan_says(seed):
    rng = random.Random(seed)
    size = rng.choice([1, 4, 16])
    plan = random_plan(rng, size)
    batch = build_batch(plan, size, CPU)
    tokens, positions, slots, query_starts, sampled = [], [], [], [0], []
    for chunk in plan.chunks:
        for position, token in enumerate(chunk.tokens, chunk.start):
            tokens.append(token)
            positions.append(position)
            slots.append(chunk.blocks[0][position // size] * size + position % size)
        query_starts.append(len(tokens))
        if chunk.samples:
            sampled.append(len(tokens) - 1)
    scored = [
        query_starts[row.chunk] + n for row in plan.prompt_rows for n in range(len(row.targets))
    ]
    assert batch.token_ids.tolist() == tokens
    assert batch.positions.tolist() == positions
    assert batch.paged[0].slots.tolist() == slots
    assert batch.query_starts.tolist() == query_starts
    assert batch.logit_rows.tolist() == sampled + scored
    contexts = [chunk.start + len(chunk.tokens) for chunk in plan.chunks]
    assert batch.context_lens.tolist() == contexts
    assert batch.max_context == max(contexts)
    assert batch.max_query == max(len(chunk.tokens) for chunk in plan.chunks)
    width = -(-max(contexts) // size)
    for chunk, context, table in zip(
        plan.chunks, contexts, batch.paged[0].block_tables.tolist(), strict=True
    ):
        needed = -(-context // size)
        assert table == [*chunk.blocks[0][:needed]] + [0] * (width - needed)


def test_every_tensor_is_contiguous_int32():
    batch = build_batch(random_plan(random.Random(1), 16), 16, CPU)
    names = ("token_ids", "positions", "query_starts", "context_lens", "logit_rows")
    (index,) = batch.paged
    for tensor in (index.slots, index.block_tables, *(getattr(batch, name) for name in names)):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


def test_joined_arrays_come_apart_and_begin_on_boundaries():
    shapes = [(3,), (2, 5), (0,), (4,), (1,)]
    arrays = [np.full(shape, i, dtype=np.int32) for i, shape in enumerate(shapes, 1)]
    joined = torch.from_numpy(join(arrays))
    parts = part(joined, shapes)
    assert [p.tolist() for p in parts] == [a.tolist() for a in arrays]
    assert all((p.data_ptr() - joined.data_ptr()) % 16 == 0 for p in parts)


def test_a_plan_that_samples_nothing_wants_no_logits():
    batch = build_batch(make_plan([Chunk(0, 0, (1, 2, 3), 0, ((5,),), False)]), 16, CPU)
    assert batch.logit_rows.tolist() == []


def test_block_tables_are_what_a_stream_of_plans_said():
    def plan(*chunks, new=(), ended=()):
        introduced = tuple(NewSequence(seq_id, SamplingParams(), 1, 0) for seq_id in new)
        return Plan(0, chunks, introduced, ended)

    def decode(seq_id, start, *blocks):
        return Chunk(seq_id, 0, BEING_SAMPLED, start, (blocks,) if blocks else (), True)

    tables = BlockTables()
    tables.follow(plan(decode(1, 0, 4, 2), decode(2, 0, 9), new=(1, 2)))
    tables.follow(plan(decode(1, 1), decode(2, 1, 7)))
    assert tables == {1: ([4, 2],), 2: ([9, 7],)}
    tables.follow(plan(decode(2, 0, 5), new=(2,), ended=(1, 2, 77)))
    assert tables == {2: ([5],)}
    with pytest.raises(KeyError):
        tables.follow(plan(decode(1, 2, 3)))

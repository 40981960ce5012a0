"""`Plan` to `ForwardBatch`: one step's work as the tensors a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, islice
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch

from ruvon.engine.types import UNDRAWN, Plan
from ruvon.kernels.ops import ForwardBatch

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

NOTHING: Mapping[int, int] = MappingProxyType({})


def build_batch(
    plan: Plan, block_size: int, device: torch.device, drawn: Mapping[int, int] = NOTHING
) -> ForwardBatch:
    """The batch for a plan of at least one chunk.

    ``logit_rows`` starts with the rows of ``plan.rows``, in order; those of ``plan.prompt_rows``
    follow. ``drawn`` has, by sequence, the tokens that were undrawn when the plan was made; one
    that is not in there has failed, and anything may stand for it.
    """
    chunks = plan.chunks
    queries = ints([len(chunk.tokens) for chunk in chunks])
    starts = ints([chunk.start for chunk in chunks])
    query_starts = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(queries, out=query_starts[1:])
    contexts = starts + queries
    total = int(query_starts[-1])
    owner = np.repeat(np.arange(len(chunks)), queries)
    positions = np.arange(total, dtype=np.int32) + (starts - query_starts[:-1])[owner]
    tables = block_tables([chunk.blocks for chunk in chunks], -(-contexts // block_size))
    slots = tables[owner, positions // block_size] * block_size + positions % block_size
    tokens = np.fromiter(chain.from_iterable([chunk.tokens for chunk in chunks]), np.int32, total)
    for at in np.flatnonzero(tokens == UNDRAWN):
        tokens[at] = drawn.get(chunks[owner[at]].seq_id, 0)
    rows = logit_rows(plan, query_starts)
    tensors = to_device((tokens, positions, slots, tables, query_starts, contexts, rows), device)
    return ForwardBatch(
        token_ids=tensors[0],
        positions=tensors[1],
        slots=tensors[2],
        block_tables=tensors[3],
        query_starts=tensors[4],
        context_lens=tensors[5],
        logit_rows=tensors[6],
        max_query=int(queries.max()),
        max_context=int(contexts.max()),
    )


def ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def block_tables(blocks: list[list[int]], num_needed: Ints) -> Ints:
    """One row a sequence, as wide as the longest, padded with 0."""
    tables = np.zeros((len(blocks), int(num_needed.max())), dtype=np.int32)
    filled = np.arange(tables.shape[1]) < num_needed[:, None]
    needed = chain.from_iterable(map(islice, blocks, num_needed.tolist()))
    tables[filled] = np.fromiter(needed, np.int32, int(num_needed.sum()))
    return tables


def logit_rows(plan: Plan, query_starts: Ints) -> Ints:
    samples = np.array([chunk.samples for chunk in plan.chunks])
    last: Ints = query_starts[1:][samples] - 1
    if not plan.prompt_rows:
        return last
    scored = [
        query_starts[row.chunk] + np.arange(len(row.targets), dtype=np.int32)
        for row in plan.prompt_rows
    ]
    return np.concatenate((last, *scored))


def to_device(arrays: tuple[Ints, ...], device: torch.device) -> list[torch.Tensor]:
    """As tensors; for another device in a single copy, which costs as much as each would."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    joined = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).pin_memory()
    parts = torch.split(joined.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

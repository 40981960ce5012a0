"""Final hidden states, added up by sequence: what embeddings are made of.

A step computes them for the rows that its plan's ``pooled_rows`` name, beside its logits, and the
scheduler adds up what the chunks of a prompt give. Sums are float64: how a prompt was cut into
chunks shows in their last bits only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import Ints, ints
from ruvon.engine.types import Floats64, PooledRows

BROKEN = "the model computed hidden states that are not numbers (NaN or infinite)"


def places(rows: Sequence[PooledRows], query_starts: Ints) -> Ints:
    """Where these rows are among a batch's tokens, one after another."""
    ranges = [query_starts[row.chunk] + row.first + np.arange(row.count) for row in rows]
    return ints(np.concatenate(ranges).tolist())


def pool(hidden_LC: Tensor, rows: Sequence[PooledRows]) -> dict[int, Floats64]:
    """The sum of each sequence's rows, [C], given the hidden states of all, in order."""
    pieces = torch.split(hidden_LC, [row.count for row in rows])
    return {
        row.seq_id: piece.sum(0, dtype=torch.float64).numpy(force=True)
        for row, piece in zip(rows, pieces, strict=True)
    }


def broken(sums: dict[int, Floats64]) -> dict[int, str]:
    """Why sequences have no sum that could be told."""
    return {seq_id: BROKEN for seq_id, sum_C in sums.items() if not np.isfinite(sum_C).all()}

"""Which tiles `ruvon.kernels.experts` takes, as measured on an H100 (docs/log.md)."""

from __future__ import annotations

from typing import NamedTuple

from ruvon.kernels.ops import PackedExperts


class ExpertsTile(NamedTuple):
    tokens: int
    rows: int  # of the weight
    columns: int
    stages: int
    warps: int = 4
    bulk: bool = False  # whether to sort x's rows first, and copy them in bulk
    few: int = 0  # a tile with no more tokens takes the time of so many; 0: all take the same
    overlap: bool = False  # whether a program's matrix unit runs while it unpacks what comes next
    split: bool = False  # whether each warp takes all rows, and columns of its own; of codes alone
    late: bool = False  # whether what comes next starts as the last programs end, and so spreads


def experts_tiles(tokens: int, experts: PackedExperts) -> tuple[ExpertsTile, ExpertsTile]:
    """For the first product and the second; both have as many tokens."""
    spec = experts.spec
    entries = tokens * spec.top_k
    each = entries / spec.num_experts
    if entries <= 8:  # of one token or two: a multiprocessor has few programs, so each counts
        first = second = ExpertsTile(8, 64, 256, 4, late=True)
        if entries <= 4 and experts.kind == "mxfp4":
            second = ExpertsTile(8, 32, 256, 4, split=True, late=True)
        return first, second
    if each <= 4:
        return (ExpertsTile(8, 64, 256, 4) if each <= 0.125 else ExpertsTile(8, 64, 512, 3),) * 2
    if each <= 8:
        return (ExpertsTile(16, 64, 256, 3),) * 2
    if each <= 16:
        return (ExpertsTile(32, 128, 128, 4, few=16),) * 2
    if each <= 128:
        return (ExpertsTile(64, 128, 128, 3, bulk=True, few=32),) * 2
    if each <= 512:
        return (ExpertsTile(128, 128, 64, 4, 8, bulk=True, overlap=True),) * 2
    return (ExpertsTile(256, 128, 64, 4, 8, bulk=True, overlap=True),) * 2


BATCH_INVARIANT = ExpertsTile(64, 64, 128, 4)

"""What both attention kernels share: finding keys in the paged cache, and ending a softmax.

Softmax runs online in base 2 and float32. A sink enters once, when a row is finished.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def key_rows(table_ptr, keys, inside, group, G, PAGE: tl.constexpr, D: tl.constexpr):
    """Offsets of these keys' rows in either cache."""
    page = tl.load(table_ptr + keys // PAGE, mask=inside, other=0).to(tl.int64)
    return ((page * G + group) * PAGE + keys % PAGE) * D


@triton.jit
def finite(maximum):
    """A base for exponents: rows that have seen no key yet have a maximum of minus infinity."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def finish(top_H, weight_H, sum_HD, sinks_ptr, heads, used, HAS_SINKS: tl.constexpr):
    """The softmax-weighted mean; a sink takes its share and gives nothing."""
    if HAS_SINKS:
        sink_H = tl.load(sinks_ptr + heads, mask=used, other=0.0).to(tl.float32) * LOG2_E
        new_H = tl.maximum(top_H, sink_H)
        keep_H = tl.exp2(top_H - new_H)
        weight_H = weight_H * keep_H + tl.exp2(sink_H - new_H)
        sum_HD = sum_HD * keep_H[:, None]
    return sum_HD / tl.where(weight_H > 0.0, weight_H, 1.0)[:, None]

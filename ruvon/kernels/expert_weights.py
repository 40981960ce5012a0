"""A layer's experts as the kernels of `ruvon.kernels.experts` read them.

MXFP4 stays MXFP4, in the order of `ruvon.kernels.mxfp4`; all else becomes plain numbers. Rows of a
gate and of what it gates take turns, so that one program, and in it one thread, has both.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.mxfp4 import pack_mxfp4
from ruvon.kernels.ops import (
    Activation,
    Dense,
    Experts,
    ExpertsSpec,
    Mxfp4,
    PackedExperts,
    Weight,
)

PAIR = tl.constexpr(8)  # rows of the gate, then as many of what it gates: one thread has both
GATES: dict[Activation, int] = {"silu_gated": 0, "swiglu_clamped": 1}


def pack_experts(
    experts: Experts, spec: ExpertsSpec, dtype: torch.dtype, device: torch.device
) -> PackedExperts:
    """Codes stay codes if both weights are MXFP4; all else is multiplied out."""
    if spec.activation not in GATES or spec.width % PAIR.value:
        raise LoadError(
            f"width {spec.width}, activation {spec.activation}: the width must be a multiple of "
            f"{PAIR.value}, and the activation one of {', '.join(GATES)}"
        )
    num, order = spec.num_experts, paired_rows(spec.width)
    biases = [
        None if bias is None else bias.to(device=device, dtype=dtype)
        for bias in (experts.up_bias_N, experts.down_bias_N)
    ]
    if biases[0] is not None:
        biases[0] = biases[0].view(num, -1)[:, order.to(device)].flatten()
    if isinstance(experts.up, Mxfp4) and isinstance(experts.down, Mxfp4):
        straight = torch.arange(experts.down.scales_NK.shape[0] // num)
        up = pack_mxfp4(experts.up, order, num, device)
        down = pack_mxfp4(experts.down, straight, num, device)
        return PackedExperts("mxfp4", spec, (*up, *down, *biases))
    dense = (_dense(weight, num, dtype, device) for weight in (experts.up, experts.down))
    up_ENK, down_ENK = dense
    return PackedExperts("dense", spec, (up_ENK[:, order.to(device)], down_ENK, *biases))


def paired_rows(width: int) -> Tensor:
    """Where the rows of an expert's first weight come from: see `PAIR`."""
    rows = torch.arange(2 * width).view(2, -1, PAIR.value)
    return rows.transpose(0, 1).flatten()


def _dense(weight: Weight, num: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    dense = weight.weight_NK if isinstance(weight, Dense) else weight.dequantize()
    return dense.to(device=device, dtype=dtype).view(num, -1, dense.shape[-1]).contiguous()

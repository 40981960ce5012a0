"""The table of Triton kernels: see `ruvon.kernels.ops` for what each operation means."""

from __future__ import annotations

from functools import partial

import torch

from ruvon.kernels import attention, embed, kv, linear, norm
from ruvon.kernels.ops import Ops, Packed, Quantized, Weight
from ruvon.kernels.pdl import supports_pdl


def make_triton_ops(dtype: torch.dtype, device: torch.device, pdl: bool | None = None) -> Ops:
    """The table computing in ``dtype`` on ``device``. ``pdl`` None takes it where there is any.

    Quantized weights are multiplied out: nothing here reads codes yet.
    """
    pdl = supports_pdl(device) if pdl is None else pdl
    workspace = attention.make_workspace(device)
    sums = linear.make_workspace(device)

    def pack(weight: Weight) -> Packed:
        dense = weight.dequantize() if isinstance(weight, Quantized) else weight.weight_NK
        n, k = dense.shape
        return Packed("dense", (n, k), (dense.to(device=device, dtype=dtype).contiguous(),))

    return Ops(
        name="triton",
        pack=pack,
        embed=partial(embed.embed, pdl=pdl),
        add=partial(embed.add, pdl=pdl),
        rms_norm=partial(norm.rms_norm, pdl=pdl),
        layer_norm=partial(norm.layer_norm, pdl=pdl),
        linear=partial(linear.linear, workspace=sums, pdl=pdl),
        write_kv=partial(kv.write_kv, pdl=pdl),
        attention=partial(attention.attention, workspace=workspace, pdl=pdl),
        take=partial(embed.take, pdl=pdl),
        logits=partial(linear.logits, workspace=sums, pdl=pdl),
        norm_linear=partial(linear.norm_linear, workspace=sums, pdl=pdl),
        attend=partial(attention.attend, workspace=workspace, pdl=pdl),
        dtype=dtype,
        device=device,
    )

"""The table of Triton kernels: see `ruvon.kernels.ops` for what each operation means."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ruvon.kernels import (
    attention,
    codes,
    decode,
    embed,
    expert_weights,
    experts,
    kv,
    linear,
    norm,
    norm_routing,
    split_k,
)
from ruvon.kernels.ops import Dense, Ops, Packed, Quantized, Stacked, Weight
from ruvon.kernels.pdl import supports_pdl


def make_triton_ops(
    dtype: torch.dtype,
    device: torch.device,
    *,
    pdl: bool | None = None,
    batch_invariant: bool = False,
    fewest_codes: int = 0,
) -> Ops:
    """The table computing in ``dtype`` on ``device``. ``pdl`` None takes it where there is any.

    Where ``batch_invariant``, a row comes out the same to the last bit whatever other rows a step
    has: one kernel serves all numbers of rows, and no sum is split by how many there are. Slower.

    Quantized weights of at least ``fewest_codes`` values stay codes (see `ruvon.kernels.codes`);
    so do experts in MXFP4.
    """
    pdl = supports_pdl(device) if pdl is None else pdl
    workspace = decode.make_workspace(device)
    sums = split_k.make_workspace(device)

    def pack(weight: Weight) -> Packed:
        if isinstance(weight, Quantized | Stacked) and weight.size >= fewest_codes:
            return codes.pack_codes(weight, device)
        dense = weight.weight_NK if isinstance(weight, Dense) else weight.dequantize()
        n, k = dense.shape
        return Packed("dense", (n, k), (dense.to(device=device, dtype=dtype).contiguous(),))

    ops = Ops(
        name="triton",
        pack=pack,
        embed=partial(embed.embed, dtype=dtype, pdl=pdl),
        add=partial(embed.add, pdl=pdl),
        rms_norm=partial(norm.rms_norm, pdl=pdl),
        layer_norm=partial(norm.layer_norm, pdl=pdl),
        linear=partial(linear.linear, workspace=sums, pdl=pdl),
        write_kv=partial(kv.write_kv, pdl=pdl),
        attention=partial(
            attention.attention, workspace=workspace, pdl=pdl, batch_invariant=batch_invariant
        ),
        gather_rows=partial(embed.gather_rows, pdl=pdl),
        logits=partial(linear.logits, workspace=sums, pdl=pdl),
        pack_experts=partial(expert_weights.pack_experts, dtype=dtype, device=device),
        experts=partial(experts.experts, workspace=sums, pdl=pdl, batch_invariant=batch_invariant),
        norm_linear=partial(linear.norm_linear, workspace=sums, pdl=pdl),
        linear_into=partial(linear.linear_into, pdl=pdl),
        attend=partial(attention.attend, workspace=workspace, pdl=pdl),
        norm_experts=partial(experts.norm_experts, workspace=sums, pdl=pdl),
        norm_experts_rows=norm_routing.SUMMED_TOKENS,
        dtype=dtype,
        device=device,
    )
    if not batch_invariant:
        return ops
    return replace(
        ops,
        linear=partial(linear.batch_invariant_linear, workspace=sums, pdl=pdl),
        logits=partial(linear.batch_invariant_logits, workspace=sums, pdl=pdl),
        norm_linear=None,
        linear_into=None,
        attend=None,
        norm_experts=None,
        batch_invariant=True,
    )

"""A mixture of experts as instructions of a graph, and its weights in tiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.cpu import arguments as told
from ruvon.kernels.cpu.arguments import Rows
from ruvon.kernels.cpu.formats import FORMATS, LANES, ROWS, TileFormat
from ruvon.kernels.cpu.graph import Capture, Value
from ruvon.kernels.cpu.layout import COLUMNS, aligned_bytes, pack, parts_of, round_up
from ruvon.kernels.cpu.operations import constant, linear, tiles_of
from ruvon.kernels.cpu.params import ACTIVATIONS, PANEL, PANEL_BYTES, PANELS_AT, Param
from ruvon.kernels.ops import Experts, ExpertsSpec, Packed, PackedExperts, Stacked, Weight


def pack_experts(
    experts: Experts, spec: ExpertsSpec, dense_dtype: torch.dtype | None, bf16: bool
) -> PackedExperts:
    """Lay a layer's experts out in tiles; the other arguments are those of `layout.pack`.

    Raises LoadError for what they cannot be.
    """
    assert spec.activation in ("silu_gated", "swiglu_clamped")
    counts = 2 * spec.num_experts, spec.num_experts
    up, down = (
        pack(pad_parts(weight, count), dense_dtype, bf16)
        for weight, count in zip((experts.up, experts.down), counts, strict=True)
    )
    biases = (
        None if bias is None else constant(pad_rows(bias, count))
        for bias, count in zip((experts.up_bias_N, experts.down_bias_N), counts, strict=True)
    )
    return PackedExperts(f"{up.kind},{down.kind}", spec, (*up.tensors, *down.tensors, *biases))


def pad_parts(weight: Weight, count: int) -> Weight:
    """A weight each of whose ``count`` parts, one above the other, has rows for whole units."""
    if isinstance(weight, Stacked):
        raise LoadError("an expert's gate and what it gates are of different formats")
    found = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    padded: dict[str, Any] = {
        name: pad_rows(x, count) for name, x in found.items() if isinstance(x, Tensor)
    }
    return dataclasses.replace(weight, **padded)


def pad_rows(x: Tensor, count: int) -> Tensor:
    parts = x.unflatten(0, (count, -1))
    more = -parts.shape[1] % COLUMNS
    if not more:
        return x
    return torch.nn.functional.pad(parts, (0, 0) * (x.dim() - 1) + (0, more)).flatten(0, 1)


def experts(
    capture: Capture,
    x_TC: Tensor,
    router: Packed,
    bias_E: Tensor | None,
    experts: PackedExperts,
) -> Tensor:
    """What it means is in `Ops`."""
    spec, (up, down, up_bias, down_bias) = experts.spec, experts.tensors
    up_kind, down_kind = map(int, experts.kind.split(","))
    logits = linear(capture, x_TC, without_pairs(router), bias_E, "none")
    x = capture.value_of(x_TC)
    routes = route(capture, capture.value_of(logits), spec)
    panels = sort(capture, x, routes, spec)
    rows = dispatch(capture, x, routes, spec)
    assert up is not None
    assert down is not None
    hidden = product(capture, rows, panels, (up_kind, up), up_bias, spec.width, spec)
    made = product(capture, hidden, panels, (down_kind, down), down_bias, x.width, spec)
    out = capture.new(x.counted, x.width)
    back = told.Routed(made.rows(), routes, out.output())
    capture.append(("combine", None), x.counted, back)
    return capture.stand_in(out)


def without_pairs(router: Packed) -> Packed:
    """Products with pairs of bfloat16 round activations; those of a router are in float32."""
    ((kind, tiles),) = parts_of(router)
    if not FORMATS[kind].pairs:
        return router
    pairs = tiles.view(torch.int16).unflatten(1, (-1, LANES, 2))  # tile, pair, row, k
    plain = aligned_bytes(tiles.numel()).view(tiles.shape)
    plain.view(torch.int16).view(pairs.transpose(2, 3).shape).copy_(pairs.transpose(2, 3))
    return dataclasses.replace(
        router, kind=str(FORMATS.index(TileFormat("bf16"))), tensors=(plain,)
    )


def route(capture: Capture, logits: Value, spec: ExpertsSpec) -> told.Routes:
    value = capture.new(logits.counted, 3 * spec.top_k)
    routes = told.Routes(value.rows(), spec.top_k)
    wanted = told.Route(logits.rows(), spec.num_experts, int(spec.renormalize), routes)
    capture.append(("route", None), logits.counted, wanted)
    return routes


def sort(capture: Capture, x: Value, routes: told.Routes, spec: ExpertsSpec) -> Tensor:
    """→ the panels."""
    most = spec.num_experts + x.capacity * spec.top_k // PANEL
    panels = aligned_bytes(PANELS_AT + most * PANEL_BYTES)
    wanted = told.Sort(routes, x.counted, spec.num_experts, panels)
    capture.append(("sort", None), Param.ONE, wanted)
    return panels


def dispatch(capture: Capture, x: Value, routes: told.Routes, spec: ExpertsSpec) -> Value:
    """→ the tokens, by expert."""
    most = x.capacity * spec.top_k + min(spec.num_experts, x.capacity * spec.top_k) * (ROWS - 1)
    rows = capture.new(x.counted, x.width, most, packable=True)
    arguments = told.Routed(x.rows(), routes, rows.output())
    capture.append(("dispatch", None), x.counted, arguments)
    return rows


def product(
    capture: Capture,
    x: Value,
    panels: Tensor,
    weight: tuple[int, Tensor],
    bias: Tensor | None,
    width: int,
    spec: ExpertsSpec,
) -> Value:
    """A product of rows by expert, gated if it is the first one."""
    (kind, tiles), columns = weight, round_up(width, COLUMNS) // COLUMNS
    expert_tiles = tiles.numel() // spec.num_experts
    gated = tiles.shape[0] * LANES > spec.num_experts * columns * COLUMNS
    out = capture.new(x.counted, width, x.capacity, packable=True)
    if not gated:
        out.read()
    of_all = told.Linear(
        x=Rows(capture.packed(x, FORMATS[kind].form), x.stride),
        weight=tiles_of(kind, tiles, x.width),
        bias=bias,
        activation=ACTIVATIONS[spec.activation if gated else "none"],
        counted=x.counted,
        columns=columns,
        width=columns * COLUMNS,
        gate_bytes=expert_tiles // 2 if gated else 0,
        out=out.output(),
    )
    shares = columns * spec.top_k
    bias_bytes = 4 * columns * COLUMNS * (2 if gated else 1)
    arguments = told.Experts(panels, shares, expert_tiles, bias_bytes, of_all)
    capture.append(("experts", kind), Param.ONE, arguments, units=shares)
    return out

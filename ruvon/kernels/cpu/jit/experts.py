"""A mixture of experts: who takes which token, the products of each expert, and their sum.

Tokens are given rows by expert, so that an expert's products are those of any matrix. How many
rows each has is only known when the step runs: so units of its products are shares of the work that
there is then, see `item_at`. A result does not depend on them.
"""

from __future__ import annotations

import numpy as np

from ruvon.kernels.cpu.arguments import Experts, Route, Routed, Sort
from ruvon.kernels.cpu.formats import ROWS, TileFormat
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.jit import simd as v
from ruvon.kernels.cpu.jit.largest import first_in_row, largest
from ruvon.kernels.cpu.jit.linear import make_product, two_of_next
from ruvon.kernels.cpu.jit.rows import write_row
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.params import PANEL, PANEL_BYTES, PANELS_AT, WEIGHTS_COST, Note


@helper
def expert_of(routes, token, n):
    """Where the ``n``-th expert of a token is written, then its weight, then its row."""
    return v.row_at(routes.rows, token) + 4 * n


@helper
def weight_of(routes, token, n):
    return expert_of(routes, token, n + routes.top_k)


@helper
def row_of(routes, token, n):
    return expert_of(routes, token, n + 2 * routes.top_k)


# Which experts a token goes to


@helper
def sum_of_exponentials(logits, count, highest):
    sums = 0.0
    for c in range(0, count, 16):
        sums = sums + v.keep_first(v.exp16(v.load(logits + 4 * c) - highest), count - c, 0.0)
    return v.sum_lanes(sums)


def route(address, params, start, stop, scratch):
    """A token's experts are those of its ``top_k`` largest logits; a softmax weighs them."""
    a = v.arguments(Route, address)
    left, kept = scratch, scratch + 4 * (a.experts + 16)
    for token in range(start, stop):
        logits = v.row_at(a.logits, token)
        for c in range(0, 4 * a.experts, 64):
            v.store(left + c, v.load(logits + c))
        for n in range(a.out.top_k):
            e = first_in_row(left, a.experts, largest(left, a.experts))
            v.write_f32(left + 4 * e, -np.inf)
            v.write_i32(expert_of(a.out, token, n), e)
            v.write_f32(kept + 4 * n, v.read_f32(logits + 4 * e))
        highest = v.read_f32(kept)
        if a.renormalize != 0:
            total = sum_of_exponentials(kept, a.out.top_k, highest)
        else:
            total = sum_of_exponentials(logits, a.experts, highest)
        for n in range(0, a.out.top_k, 16):
            weights = v.exp16(v.load(kept + 4 * n) - highest) / total
            v.store(kept + 4 * n, weights)
        for n in range(a.out.top_k):
            v.write_f32(weight_of(a.out, token, n), v.read_f32(kept + 4 * n))


# Rows by expert


@helper
def count_rows(a, tokens, counts):
    for e in range(a.experts):
        v.write_i64(counts + 8 * e, 0)
    for token in range(tokens):
        for n in range(a.routes.top_k):
            place = counts + 8 * v.read_i32(expert_of(a.routes, token, n))
            v.write_i64(place, v.read_i64(place) + 1)


@helper
def write_panels(a, counts):
    """Note which rows each expert has; its count becomes its first row."""
    at, first, cost = a.out + PANELS_AT, 0, 0
    for e in range(a.experts):
        count = v.read_i64(counts + 8 * e)
        v.write_i64(counts + 8 * e, first)
        for row in range(0, count, PANEL):
            rows = min(PANEL, count - row)
            v.write_i64(at, e)
            v.write_i64(at + 8, first + row)
            v.write_i64(at + 16, rows)
            v.write_i64(at + 24, cost)
            at, cost = at + PANEL_BYTES, cost + rows + WEIGHTS_COST
        first += (count + ROWS - 1) // ROWS * ROWS
    v.write_i64(a.out, (at - a.out) // PANEL_BYTES)
    v.write_i64(a.out + 8, cost)


def sort(address, params, start, stop, scratch):
    """One unit: all of a step's tokens."""
    a = v.arguments(Sort, address)
    tokens = v.get(params, a.counted)
    count_rows(a, tokens, scratch)
    write_panels(a, scratch)
    for token in range(tokens):
        for n in range(a.routes.top_k):
            place = scratch + 8 * v.read_i32(expert_of(a.routes, token, n))
            row = v.read_i64(place)
            v.write_i64(place, row + 1)
            v.write_i32(row_of(a.routes, token, n), row)


def dispatch(address, params, start, stop, scratch):
    a = v.arguments(Routed, address)
    for token in range(start, stop):
        x = v.row_at(a.x, token)
        for n in range(a.routes.top_k):
            row = v.read_i32(row_of(a.routes, token, n))
            for group in range(a.out.groups):
                at = x + 128 * group
                write_row(a.out, row, group, v.load(at), v.load(at + 64))


def combine(address, params, start, stop, scratch):
    """In the order of the token's own logits, whatever else there is in the step."""
    a = v.arguments(Routed, address)
    for token in range(start, stop):
        out = v.row_at(a.out.rows, token)
        for c in range(0, a.out.rows.stride, 64):
            total = 0.0
            for n in range(a.routes.top_k):
                weight = v.read_f32(weight_of(a.routes, token, n))
                row = v.read_i32(row_of(a.routes, token, n))
                total = v.fma(weight, v.load(v.row_at(a.x, row) + c), total)
            v.store(out + c, total)


# Products


@helper
def item_at(a, unit):
    """Where a unit's work begins. A column (32 outputs) of a panel is an item, column after column
    and panel after panel; units have equal shares of what all of them cost, to an item."""
    columns, panels = a.product.columns, v.read_i64(a.panels)
    cost = v.read_i64(a.panels + 8) * columns * unit // a.shares
    panel, before, own = 0, 0, 1
    while panel < panels:
        at = a.panels + PANELS_AT + PANEL_BYTES * panel
        before, own = v.read_i64(at + 24) * columns, v.read_i64(at + 16) + WEIGHTS_COST
        if cost < before + own * columns:
            break
        panel += 1
    if panel == panels:
        return panels * columns
    return panel * columns + (cost - before + own - 1) // own


@helper
def tiles_of(a, item, unit_bytes):
    """Where the tiles of an item lie."""
    panel, column = item // a.product.columns, item % a.product.columns
    expert = v.read_i64(a.panels + PANELS_AT + PANEL_BYTES * panel)
    return a.product.weight.tiles + expert * a.expert_tiles + column * unit_bytes


def make_experts(kind: TileFormat, isa: Isa):
    """The product of experts with weights of this format."""
    multiply_rows = make_product(kind, isa)

    @helper
    def multiply_item(a, item, w, fetch, partner, scratch):
        column = item % a.product.columns
        panel = a.panels + PANELS_AT + PANEL_BYTES * (item // a.product.columns)
        expert, first = v.read_i64(panel), v.read_i64(panel + 8)
        bias = a.product.bias
        if bias != 0:
            bias += expert * a.expert_bias + 128 * column
        last = first + v.read_i64(panel + 16)
        multiply_rows(a.product, bias, w, fetch, partner, first, last, column, scratch)

    def experts(address, params, start, stop, scratch):
        a = v.arguments(Experts, address)
        unit_bytes, own_end = 2 * a.product.weight.tile_bytes, v.read_i64(scratch + Note.OWN_END)
        end, going_on = item_at(a, stop), v.read_i64(a.panels) * a.product.columns
        if stop >= own_end:
            going_on = end
        for item in range(item_at(a, start), end):
            w = tiles_of(a, item, unit_bytes)
            if item + 1 < going_on:
                fetch = tiles_of(a, item + 1, unit_bytes)
                partner = fetch + a.product.gate_bytes
            else:
                fetch, partner = two_of_next(a.product, scratch, w, unit_bytes)
            multiply_item(a, item, w, fetch, partner, scratch)

    return experts

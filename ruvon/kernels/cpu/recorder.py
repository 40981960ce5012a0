"""The operations of `Ops` as instructions: what a model does is written down, not done.

A `Recorder` stands behind a table of operations. Each operation appends an instruction that will
read and write buffers of its own, big enough for any batch, and returns its output buffer as a
tensor. Buffers go back to a pool when their tensor is dropped by the model, as its own variables
decide, so a model of any depth needs a handful.

Outputs are made in the form that is asked for. A product with quantized weights wants its input
as int8 with scales, one with pairs of bfloat16 wants bfloat16; if that input is the output of a
norm, of attention or of another product, that instruction is told to write this form while it has
the numbers in its registers, and writes floats only if somebody else reads them. Nothing else is
fused, and models say nothing about any of it.
"""

from __future__ import annotations

import struct
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ruvon.errors import ConfigError
from ruvon.kernels.cpu.compiled import Key
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.kinds import (
    BF16_CACHE,
    F16_CACHE,
    F32_CACHE,
    GROUP,
    KINDS,
    LANES,
    ROWS,
    Form,
    TileKind,
)
from ruvon.kernels.cpu.layout import COLUMNS, aligned_bytes, parts_of, round_up
from ruvon.kernels.cpu.program import ACTIVATIONS, MOST_DIMS, TILE_ROWS, Field, Param
from ruvon.kernels.ops import Activation, AttentionSpec, ForwardBatch, Packed, Rope

MADE_ON_THE_WAY = (Form.INT8, Form.INT16, Form.BF16)
"""Forms of packed activations that a source of values can make itself."""

CACHES = {torch.float32: F32_CACHE, torch.float16: F16_CACHE, torch.bfloat16: BF16_CACHE}
PANELS = {Param.TOKENS: Param.TOKEN_PANELS, Param.LOGIT_ROWS: Param.LOGIT_PANELS}


@dataclass(slots=True, eq=False)
class Instruction:
    """One line of a program, still being filled in."""

    kernel: Key
    fields: dict[Field, int]


@dataclass(slots=True, eq=False)
class Value:
    """What an instruction makes: rows of floats, packed rows, or both, as consumers ask for."""

    rows: Param  # says how many there are in a step
    width: int
    floats: Tensor  # [capacity, width rounded up]
    source: Instruction | None = None  # to be told which forms are wanted; None: floats are there
    packs: dict[Form, Tensor] = field(default_factory=dict)  # packed rows, by form
    offered: dict[Form, Tensor] = field(default_factory=dict)  # memory for those it can make too

    @property
    def stride(self) -> int:
        return self.floats.stride(0) * 4

    @property
    def groups(self) -> int:
        return round_up(self.width, GROUP) // GROUP


class Pool:
    """Memory to use again. Only buffers of one purpose and shape share: padding stays zero."""

    def __init__(self) -> None:
        self._free: dict[tuple[str, Param, int], list[Tensor]] = {}

    def take(self, purpose: str, rows: Param, width: int, size: int) -> Tensor:
        """uint8 [size]: zeros when new; else as its last owner left it."""
        free = self._free.setdefault((purpose, rows, width), [])
        return free.pop() if free else aligned_bytes(size)

    def give(self, purpose: str, rows: Param, width: int, memory: Tensor) -> None:
        self._free[purpose, rows, width].append(memory)


@dataclass(slots=True)
class Recording:
    """A program in the making, for steps of at most ``capacity`` rows, for ``isa``."""

    capacity: dict[Param, int]
    isa: Isa
    instructions: list[Instruction] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # what instructions point at
    values: dict[int, Value] = field(default_factory=dict)  # by address of their floats
    pool: Pool = field(default_factory=Pool)

    def append(self, kernel: Key, rows: Param, fields: dict[Field, int]) -> Instruction:
        """An instruction whose units are rows, unless ``fields`` says otherwise."""
        common = {Field.COUNT: rows, Field.PER_COUNT: 1}
        made = Instruction(kernel, {**common, **fields})
        self.instructions.append(made)
        return made

    def foresee(self) -> None:
        """Tell each instruction which product follows, once all are there; after the last one
        comes the first, of the next step."""
        following: dict[Field, int] = {}
        for line in [*self.instructions, *self.instructions][::-1]:
            line.fields.update(following)
            if line.kernel[0] == "linear":
                following = {
                    Field.NEXT: line.fields[Field.WEIGHT],
                    Field.NEXT_UNITS: line.fields[Field.PER_COUNT],
                    Field.NEXT_UNIT_BYTES: 2 * line.fields[Field.TILE_BYTES],
                }

    # Memory

    def keep(self, tensor: Tensor) -> int:
        """Its address; it lives as long as the program."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def ints(self, tensor: Tensor) -> int:
        """The address of an int32 tensor."""
        return self.keep(tensor.to(torch.int32).contiguous())

    def constant(self, vector: Tensor | None) -> int:
        """The address of a float32 copy, padded with zeros; 0 for None."""
        if vector is None:
            return 0
        padded = aligned_bytes(4 * round_up(vector.numel(), COLUMNS)).view(torch.float32)
        padded[: vector.numel()] = vector
        return self.keep(padded)

    def new(self, rows: Param, width: int, *, packable: bool = False) -> Value:
        """A value to be made by the instruction that comes next."""
        padded = round_up(width, COLUMNS)
        height = self.capacity[rows]
        memory = self.pool.take("floats", rows, width, height * padded * 4)
        value = Value(rows, width, memory.view(torch.float32).view(height, padded))
        for form in MADE_ON_THE_WAY if packable else ():
            value.offered[form] = self.memory_for(form, value)
        self.values[value.floats.data_ptr()] = value
        return value

    def memory_for(self, form: Form, value: Value) -> Tensor:
        """Memory for a value's packed rows."""
        size = round_up(self.capacity[value.rows], ROWS) * value.groups * form.group_bytes
        return self.pool.take(form.name, value.rows, value.width, size)

    def hand_out(self, value: Value, view: Tensor | None = None) -> Tensor:
        """The value as a tensor for the model (``view`` of its floats, if that differs). When the
        model drops it, its memory is free for the instructions that come after."""
        given = value.floats[:, : value.width] if view is None else view
        weakref.finalize(given, self._release, value).atexit = False
        return given

    def _release(self, value: Value) -> None:
        self.values.pop(value.floats.data_ptr(), None)
        floats = value.floats.view(-1).view(torch.uint8)
        packs = {form.name: memory for form, memory in (value.packs | value.offered).items()}
        for purpose, memory in {"floats": floats, **packs}.items():
            self.pool.give(purpose, value.rows, value.width, memory)

    # Forms of a value

    def value_of(self, x: Tensor) -> Value:
        """The value behind a tensor; one from outside becomes a value as it is now."""
        if x.data_ptr() in self.values:
            return self.values[x.data_ptr()]
        flat = x.reshape(x.shape[0], -1)
        value = self.new(Param.TOKENS, flat.shape[1])
        value.floats[:, : value.width] = flat
        return value

    def floats(self, value: Value) -> int:
        """The address of its floats: whoever makes it is told to write them."""
        if value.source is not None:
            value.source.fields[Field.OUT] = value.floats.data_ptr()
            value.source.fields[Field.OUT_STRIDE] = value.stride
        return value.floats.data_ptr()

    def packed(self, value: Value, kind: TileKind) -> int:
        """The address of its packs for a product with such weights: made by its source if that
        can, else from its floats."""
        form = self.isa.form(kind)
        if form not in value.packs:
            maker, memory = value.source, value.offered.pop(form, None)
            if maker is None or memory is None:
                fields = {Field.X: self.floats(value), Field.X_STRIDE: value.stride}
                kernel = "interleave" if form == Form.FLOAT else "pack"
                maker = self.append((kernel, None), value.rows, fields)
                memory = self.memory_for(form, value)
            maker.fields.update({form.value: memory.data_ptr(), Field.GROUPS: value.groups})
            value.packs[form] = memory
        return value.packs[form].data_ptr()

    # Operations; what they mean is in `Ops`

    def embed(self, ids_T: Tensor, table: Packed) -> Tensor:
        out = self.new(Param.TOKENS, table.shape[1])
        fields = {
            Field.IDS: self.ints(ids_T),
            Field.OUT: out.floats.data_ptr(),
            Field.OUT_STRIDE: out.stride,
            Field.WIDTH: out.width,
        }
        ((kind, tiles),) = parts_of(table)
        self.append(("embed", kind), out.rows, fields | self._tiles(kind, tiles, out.width))
        return self.hand_out(out)

    def _tiles(self, kind: int, tiles: Tensor, columns: int) -> dict[Field, int]:
        return {
            Field.WEIGHT: self.keep(tiles),
            Field.TILE_BYTES: tiles.stride(0),
            Field.STEPS: round_up(columns, GROUP) // KINDS[kind].step,
        }

    def add(self, x_TC: Tensor, y_TC: Tensor) -> Tensor:
        x, y = self.value_of(x_TC), self.value_of(y_TC)
        out = self.new(x.rows, x.width)
        fields = {
            Field.X: self.floats(x),
            Field.Y: self.floats(y),
            Field.X_STRIDE: x.stride,
            Field.OUT: out.floats.data_ptr(),
        }
        self.append(("add", None), x.rows, fields)
        return self.hand_out(out)

    def take(self, x_TC: Tensor, rows_L: Tensor) -> Tensor:
        x = self.value_of(x_TC)
        out = self.new(Param.LOGIT_ROWS, x.width)
        fields = {
            Field.X: self.floats(x),
            Field.IDS: self.ints(rows_L),
            Field.X_STRIDE: x.stride,
            Field.OUT: out.floats.data_ptr(),
        }
        self.append(("take", None), out.rows, fields)
        return self.hand_out(out)

    def rms_norm(
        self, x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._norm("rms_norm", x_TC, residual_TC, weight_C, None, eps)

    def layer_norm(
        self,
        x_TC: Tensor,
        residual_TC: Tensor | None,
        weight_C: Tensor,
        bias_C: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        return self._norm("layer_norm", x_TC, residual_TC, weight_C, bias_C, eps)

    def _norm(
        self,
        kernel: str,
        x_TC: Tensor,
        residual_TC: Tensor | None,
        weight_C: Tensor,
        bias_C: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x = self.value_of(x_TC)
        fields = {
            Field.X: self.floats(x),
            Field.X_STRIDE: x.stride,
            Field.WIDTH: x.width,
            Field.WEIGHT: self.constant(weight_C),
            Field.BIAS: self.constant(bias_C),
            Field.EPS: float_bits(eps),
        }
        total = x_TC
        if residual_TC is not None:
            fields[Field.Y] = self.floats(self.value_of(residual_TC))
            sums = self.new(x.rows, x.width)
            fields[Field.TOTAL] = sums.floats.data_ptr()
            total = self.hand_out(sums)
        out = self.new(x.rows, x.width, packable=True)
        out.source = self.append((kernel, None), x.rows, fields)
        return self.hand_out(out), total

    def linear(
        self, x_TK: Tensor, weight: Packed, bias_N: Tensor | None, activation: Activation
    ) -> Tensor:
        x, parts = self.value_of(x_TK), parts_of(weight)
        gated = activation == "silu_gated"
        width = weight.shape[0] // 2 if gated else weight.shape[0]
        stacked = len(parts) > 1
        if (gated and width % COLUMNS) or (stacked and activation != "none"):
            both = self.linear(x_TK, weight, bias_N, "none")  # gate and partner do not match
            return self._activate(both, width, activation)
        out = self.new(x.rows, width, packable=not stacked)
        bias, first = self.constant(bias_N), 0
        for kind, tiles in parts:
            rows = min(width - first, tiles.shape[0] * LANES) if stacked else width
            fields = self._tiles(kind, tiles, weight.shape[1]) | {
                Field.X: self.packed(x, KINDS[kind]),
                Field.BIAS: bias and bias + 4 * first,
                Field.ACTIVATION: ACTIVATIONS[activation],
                Field.COUNT: PANELS[x.rows],
                Field.PER_COUNT: round_up(rows, COLUMNS) // COLUMNS,
                Field.WIDTH: rows,
            }
            if gated:
                fields[Field.GATE_BYTES] = width // LANES * fields[Field.TILE_BYTES]
            if stacked:
                fields[Field.OUT] = out.floats.data_ptr() + 4 * first
                fields[Field.OUT_STRIDE] = out.stride
            made = self.append(("linear", kind), x.rows, fields)
            first += rows
        if not stacked:
            out.source = made
        return self.hand_out(out)

    def _activate(self, x_TN: Tensor, width: int, activation: Activation) -> Tensor:
        x = self.value_of(x_TN)
        out = self.new(x.rows, width)
        fields = {
            Field.X: self.floats(x),
            Field.X_STRIDE: x.stride,
            Field.OUT: out.floats.data_ptr(),
            Field.OUT_STRIDE: out.stride,
            Field.WIDTH: width,
            Field.ACTIVATION: ACTIVATIONS[activation],
        }
        self.append(("activate", None), x.rows, fields)
        return self.hand_out(out)

    def logits(self, x_LC: Tensor, head: Packed) -> Tensor:
        out = self.linear(x_LC, head, None, "none")
        self.floats(self.value_of(out))
        return out

    def argmax(self, x_LV: Tensor, out_L: Tensor) -> None:
        """Where each row is largest, into int64 ``out_L``. Not one of `Ops`: a tape's last line."""
        x = self.value_of(x_LV)
        fields = {
            Field.DRAWN: 1,
            Field.X: self.floats(x),
            Field.X_STRIDE: x.stride,
            Field.WIDTH: x.width,
            Field.OUT: self.keep(out_L),
        }
        self.append(("argmax", None), x.rows, fields)

    def write_kv(
        self,
        qkv_TE: Tensor,
        batch: ForwardBatch,
        k_cache_BGPD: Tensor,
        v_cache_BGPD: Tensor,
        spec: AttentionSpec,
        rope: Rope | None,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        eps: float,
    ) -> Tensor:
        qkv, padded = self.value_of(qkv_TE), round_up(spec.head_dim, LANES)
        out = self.new(Param.TOKENS, spec.num_heads * padded)
        fields = self._cache(k_cache_BGPD, v_cache_BGPD, spec) | {
            Field.PER_COUNT: spec.num_kv_heads,
            Field.X: self.floats(qkv),
            Field.X_STRIDE: qkv.stride,
            Field.OUT: out.floats.data_ptr(),
            Field.OUT_STRIDE: out.stride,
            Field.IDS: self.ints(batch.positions),
            Field.SLOTS: self.ints(batch.slots),
            Field.Q_NORM: self.constant(q_norm_D),
            Field.K_NORM: self.constant(k_norm_D),
            Field.EPS: float_bits(eps),
        }
        if rope is not None:
            fields[Field.COS] = self.keep(rope.cos_PD.contiguous())
            fields[Field.SIN] = self.keep(rope.sin_PD.contiguous())
            fields[Field.ROTATED] = rope.cos_PD.shape[1]
        self.append(("write_kv", CACHES[k_cache_BGPD.dtype]), Param.TOKENS, fields)
        heads = out.floats[:, : spec.num_heads * padded].unflatten(1, (spec.num_heads, padded))
        return self.hand_out(out, heads[:, :, : spec.head_dim])

    def _cache(self, keys: Tensor, values: Tensor, spec: AttentionSpec) -> dict[Field, int]:
        check_attention(spec, keys)
        return {
            Field.KEYS: self.keep(keys),
            Field.VALUES: self.keep(values),
            Field.HEADS: spec.num_heads,
            Field.KV_HEADS: spec.num_kv_heads,
            Field.HEAD_DIM: spec.head_dim,
            Field.PAGE: keys.shape[2],
        }

    def attention(
        self,
        q_THD: Tensor,
        k_cache_BGPD: Tensor,
        v_cache_BGPD: Tensor,
        batch: ForwardBatch,
        spec: AttentionSpec,
        sinks_H: Tensor | None,
    ) -> Tensor:
        if q_THD.data_ptr() not in self.values:
            q_THD = torch.nn.functional.pad(q_THD, (0, -spec.head_dim % LANES))
        q = self.value_of(q_THD)
        fields = self._cache(k_cache_BGPD, v_cache_BGPD, spec) | {
            Field.COUNT: Param.QUERY_TILES,
            Field.PER_COUNT: spec.num_kv_heads,
            Field.DRAWN: 1,
            Field.X: self.floats(q),
            Field.X_STRIDE: q.stride,
            Field.STARTS: self.ints(batch.query_starts),
            Field.CONTEXTS: self.ints(batch.context_lens),
            Field.TABLES: self.ints(batch.block_tables),
            Field.TABLE_STRIDE: 4 * batch.block_tables.shape[1],
            Field.SCALE: float_bits(spec.scale),
            Field.WINDOW: spec.window,
            Field.SINKS: self.constant(sinks_H),
        }
        whole_groups = spec.head_dim % GROUP == 0
        out = self.new(q.rows, spec.num_heads * spec.head_dim, packable=whole_groups)
        out.source = self.append(("attention", CACHES[k_cache_BGPD.dtype]), q.rows, fields)
        return self.hand_out(out)


def float_bits(number: float) -> int:
    """A float64 as the int64 of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def check_attention(spec: AttentionSpec, keys: Tensor) -> None:
    """Raises ConfigError for what these kernels cannot do."""
    page, dims = keys.shape[2:]
    if page % LANES:
        raise ConfigError(f"--block-size {page}: the CPU kernels need a multiple of {LANES}")
    if spec.head_dim > MOST_DIMS:
        raise ConfigError(
            f"--kernels cpu: heads of {spec.head_dim} dims are more than {MOST_DIMS}; "
            "use --kernels torch"
        )
    if spec.num_heads // spec.num_kv_heads > TILE_ROWS:
        raise ConfigError(
            f"--kernels cpu: more than {TILE_ROWS} query heads share a key/value head; "
            "use --kernels torch"
        )
    assert dims == round_up(spec.head_dim, LANES), "the cache was not made by allocate_cache"

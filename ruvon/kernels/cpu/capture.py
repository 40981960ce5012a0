"""The operations of `Ops` as instructions: a model's calls are traced, not computed.

A `Capture` stands behind a table of operations. Each operation appends an instruction and returns a
tensor without memory, which stands for the value that it will make. Once all are there, it is known
who wants which value in which form, and up to where: `graph` then gives out memory.

A value is made in the forms that are asked for. A product with quantized weights wants its input
as int8 with scales, one with pairs of bfloat16 wants bfloat16; if that input is the output of a
norm, of attention or of another product, that instruction writes this form while it has the numbers
in its registers, and writes plain rows only if somebody else reads them. Nothing else is fused, and
models say nothing about any of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ruvon.errors import ConfigError
from ruvon.kernels.cpu import arguments as told
from ruvon.kernels.cpu.arguments import Cache, Key, Output, Place, Tiles
from ruvon.kernels.cpu.formats import (
    BF16_CACHE,
    F16_CACHE,
    F32_CACHE,
    FORMATS,
    GROUP,
    LANES,
    Form,
)
from ruvon.kernels.cpu.layout import COLUMNS, aligned_bytes, parts_of, round_up
from ruvon.kernels.cpu.params import ACTIVATIONS, MOST_DIMS, TILE_ROWS, Param
from ruvon.kernels.ops import GATED, Activation, AttentionSpec, ForwardBatch, Packed, Rope

CACHES = {torch.float32: F32_CACHE, torch.float16: F16_CACHE, torch.bfloat16: BF16_CACHE}
PANELS = {Param.TOKENS: Param.TOKEN_PANELS, Param.LOGIT_ROWS: Param.LOGIT_PANELS}


class Instruction(NamedTuple):
    """A kernel and what it is told; ``units`` for each of what is counted."""

    kernel: Key
    counted: Param
    units: int
    dynamic: bool
    arguments: Any  # of `arguments`


@dataclass(slots=True, eq=False)
class Value:
    """What an instruction makes: plain rows, packed rows, or both, as others want them."""

    rows: Param  # says how many there are in a step
    capacity: int  # most rows
    width: int
    packable: bool = False  # whether its instruction can write every form, or plain rows only
    wanted: set[Form] = field(default_factory=set)
    memory: dict[Form, Tensor] = field(default_factory=dict)  # once it is given out

    @property
    def groups(self) -> int:
        return round_up(self.width, GROUP) // GROUP

    @property
    def stride(self) -> int:
        """Bytes from one plain row to the next."""
        return self.groups * Form.ROWS.group_bytes

    def read(self, form: Form = Form.ROWS) -> Place:
        """Where an instruction will find it in a form."""
        self.wanted.add(form)
        return Place(self, form)

    def output(self, offset: int = 0) -> Output:
        """Where its instruction writes it."""
        return Output(
            rows=Place(self, Form.ROWS, offset),
            stride=self.stride,
            int8=Place(self, Form.INT8),
            bf16=Place(self, Form.BF16),
            groups=self.groups,
        )

    def floats(self) -> Tensor:
        """Its plain rows, float32 [capacity, width]."""
        return (
            self.memory[Form.ROWS].view(torch.float32).view(-1, self.stride // 4)[:, : self.width]
        )


@dataclass(slots=True)
class Capture:
    """A graph in the making, for steps of at most ``capacity`` rows."""

    capacity: dict[Param, int]
    instructions: list[Instruction] = field(default_factory=list)
    values: dict[int, tuple[Tensor, Value]] = field(default_factory=dict)  # by id of the tensor

    def append(
        self, kernel: Key, count: Param, arguments: Any, *, units: int = 1, dynamic: bool = False
    ) -> None:
        self.instructions.append(Instruction(kernel, count, units, dynamic, arguments))

    # Values

    def new(
        self,
        rows: Param,
        width: int,
        capacity: int | None = None,
        *,
        packable: bool = False,
    ) -> Value:
        """A value to be made by the instruction that comes next. ``capacity``: its most rows, where
        there are not as many as ``rows`` says."""
        most = self.capacity[rows] if capacity is None else capacity
        return Value(rows, most, width, packable, set() if packable else {Form.ROWS})

    def stand_in(self, value: Value, *shape: int) -> Tensor:
        """What the model is given for a value: a tensor without memory, a row for each of as many
        as there may be."""
        shape = shape or (value.width,)
        tensor = torch.empty(value.capacity, *shape, device="meta")
        self.values[id(tensor)] = tensor, value
        return tensor

    def value_of(self, x: Tensor) -> Value:
        """The value that a tensor stands for; one from outside is a value as it is now."""
        if id(x) in self.values:
            return self.values[id(x)][1]
        flat = x.reshape(x.shape[0], -1)
        value = Value(Param.TOKENS, flat.shape[0], flat.shape[1], wanted={Form.ROWS})
        value.memory[Form.ROWS] = aligned_bytes(round_up(value.capacity, GROUP) * value.stride)
        value.floats()[: flat.shape[0]] = flat
        return value

    def result(self, x: Tensor) -> Tensor:
        """What a tensor stands for, once there is memory."""
        floats = self.value_of(x).floats()[: x.shape[0]]
        if x.dim() == 3:  # heads, padded
            floats = floats.view(*x.shape[:2], -1)[:, :, : x.shape[2]]
        return floats

    def packed(self, value: Value, form: Form) -> Place:
        """Where rows for a product will be: written by what makes the value if that can, else
        packed from its plain rows."""
        if not value.packable and form not in value.wanted:
            packs = value.output()._replace(rows=0)
            self.append(("copy", None), value.rows, told.Copy(value.read(), value.stride, packs))
        return value.read(form)

    # Operations; what they mean is in `Ops`

    def embed(self, ids_T: Tensor, table: Packed, first: int | None = None) -> Tensor:
        out = self.new(Param.TOKENS, table.shape[1])
        ((kind, tiles),) = parts_of(table)
        arguments = told.Embed(
            ids=ints(ids_T),
            table=tiles_of(kind, tiles, out.width),
            first=first or 0,
            rows=table.shape[0],
            width=out.width,
            out=out.read(),
            stride=out.stride,
        )
        self.append(("embed", kind), out.rows, arguments)
        return self.stand_in(out)

    def add(self, x_TC: Tensor, y_TC: Tensor) -> Tensor:
        x, y = self.value_of(x_TC), self.value_of(y_TC)
        out = self.new(x.rows, x.width, packable=True)
        arguments = told.Copy(x.read(), x.stride, out.output(), y=y.read())
        self.append(("copy", None), x.rows, arguments)
        return self.stand_in(out)

    def gather_rows(self, x_TC: Tensor, rows_L: Tensor) -> Tensor:
        x = self.value_of(x_TC)
        out = self.new(Param.LOGIT_ROWS, x.width, packable=True)
        arguments = told.Copy(x.read(), x.stride, out.output(), rows=ints(rows_L))
        self.append(("copy", None), out.rows, arguments)
        return self.stand_in(out)

    def rms_norm(
        self, x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self.layer_norm(x_TC, residual_TC, weight_C, None, eps)

    def layer_norm(
        self,
        x_TC: Tensor,
        residual_TC: Tensor | None,
        weight_C: Tensor,
        bias_C: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x = self.value_of(x_TC)
        total = None if residual_TC is None else self.new(x.rows, x.width)
        out = self.new(x.rows, x.width, packable=True)
        arguments = told.Norm(
            x=x.read(),
            residual=None if residual_TC is None else self.value_of(residual_TC).read(),
            total=None if total is None else total.read(),
            stride=x.stride,
            width=x.width,
            weight=constant(weight_C),
            bias=constant(bias_C),
            eps=eps,
            out=out.output(),
        )
        self.append(("norm", None), x.rows, arguments)
        return self.stand_in(out), x_TC if total is None else self.stand_in(total)

    def linear(
        self, x_TK: Tensor, weight: Packed, bias_N: Tensor | None, activation: Activation
    ) -> Tensor:
        parts, (outputs, inputs) = parts_of(weight), weight.shape
        gated = activation in GATED
        width = outputs // 2 if gated else outputs
        stacked = len(parts) > 1
        if gated and (stacked or width % COLUMNS):
            both = self.linear(x_TK, weight, bias_N, "none")  # gate and partner do not match
            return self._gate(both, width, activation)
        x, bias = self.value_of(x_TK), constant(bias_N)
        out = self.new(x.rows, width, packable=not stacked)
        first = 0
        for kind, tiles in parts:
            rows = min(width - first, tiles.shape[0] * LANES) if stacked else width
            columns = round_up(rows, COLUMNS) // COLUMNS
            arguments = told.Linear(
                x=self.packed(x, FORMATS[kind].form),
                stride=x.stride,
                weight=tiles_of(kind, tiles, inputs),
                bias=None if bias is None else bias[first:],
                activation=ACTIVATIONS[activation],
                counted=x.rows,
                columns=columns,
                width=rows,
                gate_bytes=width // LANES * tiles.stride(0) if gated else 0,
                out=out.output(4 * first),
            )
            self.append(("linear", kind), PANELS[x.rows], arguments, units=columns)
            first += rows
        return self.stand_in(out)

    def _gate(self, x_TN: Tensor, width: int, activation: Activation) -> Tensor:
        x = self.value_of(x_TN)
        out = self.new(x.rows, width)
        code = ACTIVATIONS[activation]
        arguments = told.Gate(x.read(), x.stride, code, width, out.read(), out.stride)
        self.append(("gate", None), x.rows, arguments)
        return self.stand_in(out)

    def logits(self, x_LC: Tensor, head: Packed) -> Tensor:
        return self.linear(x_LC, head, None, "none")

    def argmax(self, x_LV: Tensor, out_L: Tensor) -> None:
        """Where each row is largest, into int64 ``out_L``. Not one of `Ops`."""
        x = self.value_of(x_LV)
        arguments = told.Argmax(x.read(), x.stride, x.width, out_L)
        self.append(("argmax", None), x.rows, arguments, dynamic=True)

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
        qkv = self.value_of(qkv_TE)
        out = self.new(Param.TOKENS, spec.num_heads * round_up(spec.head_dim, LANES))
        arguments = told.WriteKV(
            qkv=qkv.read(),
            stride=qkv.stride,
            cache=cache_of(k_cache_BGPD, v_cache_BGPD, spec),
            positions=ints(batch.positions),
            slots=ints(batch.paged[spec.cache_group].slots),
            cos=None if rope is None else rope.cos_PD.contiguous(),
            sin=None if rope is None else rope.sin_PD.contiguous(),
            pairs=0 if rope is None else rope.cos_PD.shape[1],
            q_norm=constant(q_norm_D),
            k_norm=constant(k_norm_D),
            eps=eps,
            out=out.read(),
            out_stride=out.stride,
        )
        kernel = "write_kv", CACHES[k_cache_BGPD.dtype]
        self.append(kernel, Param.TOKENS, arguments, units=spec.num_kv_heads)
        return self.stand_in(out, spec.num_heads, spec.head_dim)

    def attention(
        self,
        q_THD: Tensor,
        k_cache_BGPD: Tensor,
        v_cache_BGPD: Tensor,
        batch: ForwardBatch,
        spec: AttentionSpec,
        sinks_H: Tensor | None,
    ) -> Tensor:
        if id(q_THD) not in self.values:
            q_THD = torch.nn.functional.pad(q_THD, (0, -spec.head_dim % LANES))
        q = self.value_of(q_THD)
        packable = spec.head_dim % GROUP == 0
        out = self.new(q.rows, spec.num_heads * spec.head_dim, packable=packable)
        tables = batch.paged[spec.cache_group].block_tables
        arguments = told.Attention(
            queries=q.read(),
            stride=q.stride,
            cache=cache_of(k_cache_BGPD, v_cache_BGPD, spec),
            starts=ints(batch.query_starts),
            contexts=ints(batch.context_lens),
            tables=ints(tables),
            table_stride=4 * tables.shape[1],
            scale=spec.scale,
            window=spec.window,
            sinks=constant(sinks_H),
            block_bytes=k_cache_BGPD[0].nbytes,
            out=out.output(),
        )
        kernel = "attention", CACHES[k_cache_BGPD.dtype]
        units = spec.num_kv_heads
        self.append(kernel, Param.QUERY_TILES, arguments, units=units, dynamic=True)
        return self.stand_in(out)


def ints(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()


def constant(vector: Tensor | None) -> Tensor | None:
    """A float32 copy, padded with zeros."""
    if vector is None:
        return None
    padded = aligned_bytes(4 * round_up(vector.numel(), COLUMNS)).view(torch.float32)
    padded[: vector.numel()] = vector
    return padded


def tiles_of(kind: int, tiles: Tensor, columns: int) -> Tiles:
    steps = round_up(columns, GROUP) // FORMATS[kind].step
    return Tiles(tiles, steps, tiles.stride(0))


def cache_of(keys: Tensor, values: Tensor, spec: AttentionSpec) -> Cache:
    check_attention(spec, keys)
    shape = spec.num_heads, spec.num_kv_heads, spec.head_dim, keys.shape[2]
    return Cache(keys, values, *shape)


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

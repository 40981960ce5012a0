"""The operations of `Ops` as instructions: what each of them adds to a `Capture`."""

from __future__ import annotations

import torch
from torch import Tensor

from ruvon.errors import ConfigError
from ruvon.kernels.cpu import arguments as told
from ruvon.kernels.cpu.arguments import Cache, Rows, Tiles
from ruvon.kernels.cpu.formats import FORMATS, GROUP, LANES, TileFormat
from ruvon.kernels.cpu.graph import Capture
from ruvon.kernels.cpu.layout import COLUMNS, STORAGES, aligned_bytes, parts_of, round_up
from ruvon.kernels.cpu.params import ACTIVATIONS, MOST_DIMS, TILE_ROWS, Param
from ruvon.kernels.ops import GATED, Activation, AttentionSpec, ForwardBatch, Packed, Rope

CACHES = {dtype: FORMATS.index(TileFormat(storage)) for dtype, storage in STORAGES.items()}
PANELS = {Param.TOKENS: Param.TOKEN_PANELS, Param.LOGIT_ROWS: Param.LOGIT_PANELS}


def embed(capture: Capture, ids_T: Tensor, table: Packed, first: int | None = None) -> Tensor:
    out = capture.new(Param.TOKENS, table.shape[1])
    ((kind, tiles),) = parts_of(table)
    arguments = told.Embed(
        ids=ints(ids_T),
        table=tiles_of(kind, tiles, out.width),
        first=first or 0,
        rows=table.shape[0],
        width=out.width,
        out=out.rows(),
    )
    capture.append(("embed", kind), out.counted, arguments)
    return capture.stand_in(out)


def add(capture: Capture, x_TC: Tensor, y_TC: Tensor) -> Tensor:
    x, y = capture.value_of(x_TC), capture.value_of(y_TC)
    out = capture.new(x.counted, x.width, packable=True)
    arguments = told.Copy(x.rows(), out.output(), y=y.read())
    capture.append(("copy", None), x.counted, arguments)
    return capture.stand_in(out)


def gather_rows(capture: Capture, x_TC: Tensor, rows_L: Tensor) -> Tensor:
    x = capture.value_of(x_TC)
    out = capture.new(Param.LOGIT_ROWS, x.width, packable=True)
    arguments = told.Copy(x.rows(), out.output(), rows=ints(rows_L))
    capture.append(("copy", None), out.counted, arguments)
    return capture.stand_in(out)


def rms_norm(
    capture: Capture, x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return layer_norm(capture, x_TC, residual_TC, weight_C, None, eps)


def layer_norm(
    capture: Capture,
    x_TC: Tensor,
    residual_TC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x = capture.value_of(x_TC)
    total = None if residual_TC is None else capture.new(x.counted, x.width)
    out = capture.new(x.counted, x.width, packable=True)
    arguments = told.Norm(
        x=x.rows(),
        residual=None if residual_TC is None else capture.value_of(residual_TC).read(),
        total=None if total is None else total.read(),
        width=x.width,
        weight=constant(weight_C),
        bias=constant(bias_C),
        eps=eps,
        out=out.output(),
    )
    capture.append(("norm", None), x.counted, arguments)
    return capture.stand_in(out), x_TC if total is None else capture.stand_in(total)


def linear(
    capture: Capture, x_TK: Tensor, weight: Packed, bias_N: Tensor | None, activation: Activation
) -> Tensor:
    parts, (outputs, inputs) = parts_of(weight), weight.shape
    gated = activation in GATED
    width = outputs // 2 if gated else outputs
    stacked = len(parts) > 1
    if gated and (stacked or width % COLUMNS):
        both = linear(capture, x_TK, weight, bias_N, "none")  # gate and partner do not match
        return gate(capture, both, width, activation)
    x, bias = capture.value_of(x_TK), constant(bias_N)
    out = capture.new(x.counted, width, packable=not stacked)
    first = 0
    for kind, tiles in parts:
        rows = min(width - first, tiles.shape[0] * LANES) if stacked else width
        columns = round_up(rows, COLUMNS) // COLUMNS
        arguments = told.Linear(
            x=Rows(capture.packed(x, FORMATS[kind].form), x.stride),
            weight=tiles_of(kind, tiles, inputs),
            bias=None if bias is None else bias[first:],
            activation=ACTIVATIONS[activation],
            counted=x.counted,
            columns=columns,
            width=rows,
            gate_bytes=width // LANES * tiles.stride(0) if gated else 0,
            out=out.output(4 * first),
        )
        capture.append(("linear", kind), PANELS[x.counted], arguments, units=columns)
        first += rows
    return capture.stand_in(out)


def gate(capture: Capture, x_TN: Tensor, width: int, activation: Activation) -> Tensor:
    """Half of the columns gate the others."""
    x = capture.value_of(x_TN)
    out = capture.new(x.counted, width, packable=True)
    gated, code = x.read(offset=4 * width), ACTIVATIONS[activation]
    arguments = told.Copy(x.rows(), out.output(), y=gated, activation=code, width=width)
    capture.append(("copy", None), x.counted, arguments)
    return capture.stand_in(out)


def logits(capture: Capture, x_LC: Tensor, head: Packed) -> Tensor:
    return linear(capture, x_LC, head, None, "none")


def argmax(capture: Capture, x_LV: Tensor, out_L: Tensor) -> None:
    """Where each row is largest, into int64 ``out_L``. Not one of `Ops`."""
    x = capture.value_of(x_LV)
    arguments = told.Argmax(x.rows(), x.width, out_L)
    capture.append(("argmax", None), x.counted, arguments, dynamic=True)


def write_kv(
    capture: Capture,
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
    qkv = capture.value_of(qkv_TE)
    out = capture.new(Param.TOKENS, spec.num_heads * round_up(spec.head_dim, LANES))
    arguments = told.WriteKV(
        qkv=qkv.rows(),
        cache=cache_of(k_cache_BGPD, v_cache_BGPD, spec),
        positions=ints(batch.positions),
        slots=ints(batch.paged[spec.cache_group].slots),
        cos=None if rope is None else rope.cos_PD.contiguous(),
        sin=None if rope is None else rope.sin_PD.contiguous(),
        pairs=0 if rope is None else rope.cos_PD.shape[1],
        q_norm=constant(q_norm_D),
        k_norm=constant(k_norm_D),
        eps=eps,
        out=out.rows(),
    )
    kernel = "write_kv", CACHES[k_cache_BGPD.dtype]
    capture.append(kernel, Param.TOKENS, arguments, units=spec.num_kv_heads)
    return capture.stand_in(out, spec.num_heads, spec.head_dim)


def attention(
    capture: Capture,
    q_THD: Tensor,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks_H: Tensor | None,
) -> Tensor:
    if id(q_THD) not in capture.values:
        q_THD = torch.nn.functional.pad(q_THD, (0, -spec.head_dim % LANES))
    q = capture.value_of(q_THD)
    packable = spec.head_dim % GROUP == 0
    out = capture.new(q.counted, spec.num_heads * spec.head_dim, packable=packable)
    tables = batch.paged[spec.cache_group].block_tables
    arguments = told.Attention(
        queries=q.rows(),
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
    capture.append(kernel, Param.QUERY_TILES, arguments, units=units, dynamic=True)
    return capture.stand_in(out)


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

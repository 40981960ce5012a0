"""The operations a model is made of, and the table that says who computes them.

A model calls `Ops` and nothing else: no torch function, no kernel by name. One frozen table is
chosen at start (`select_ops`) and handed down, so swapping a kernel is swapping a field. Every
field of `TORCH` is the *meaning* of that operation in plain torch; every other table must agree
with it, and the tests compare the two.

Shape legend, used in names as a suffix (``x_TC``) across the project:

    T  tokens in this step, all sequences one after another (ragged, no padding)
    S  sequences in this step          L  rows whose logits are wanted
    C  hidden size                     N, K  rows (outputs) and columns (inputs) of a weight
    H  query heads   G  key/value heads   D  head size   V  vocabulary
    E  experts                         I  an expert's width
    B  blocks of the cache             P  tokens per block ("page")

How values are arranged *inside* one cache block, and inside a `Packed` weight, is private to the
table that wrote them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Activation: TypeAlias = Literal[
    "none", "gelu_tanh", "gelu", "relu", "silu", "silu_gated", "gelu_tanh_gated", "swiglu_clamped"
]
"""The last three: the first half of the outputs gates the second, ``act(gate) * up``; halves N.
``swiglu_clamped`` is gpt-oss's ``gate * sigmoid(1.702 gate) * (up + 1)``, the gate at most 7 and up
within -7 to 7; experts only."""

GATED: frozenset[Activation] = frozenset({"silu_gated", "gelu_tanh_gated"})  # of `Ops.linear`


CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step that will ever be computed."""

    tokens: int
    sequences: int
    logit_rows: int  # at once: the runner asks for more in pieces
    blocks_per_sequence: int
    cache_groups: int = 1


@dataclass(frozen=True, slots=True)
class PagedIndex:
    """Where a step's keys and values are in the cache, for the layers of one cache group.

    A layer with a window is not asked for what lies before it: those entries of a block table may
    be 0, or whatever they were.
    """

    slots: Tensor  # int32 [T], block * P + offset: where each token's key and value go
    block_tables: Tensor  # int32 [S, most blocks of any sequence], padded with 0


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's work as tensors: a ragged batch of prompt chunks and single decode tokens.

    Sequence ``s`` owns tokens ``query_starts[s]:query_starts[s + 1]``; after this step its cache
    holds ``context_lens[s]`` tokens, the last of which are these. There is no prefill or decode:
    a decode is a chunk of one.
    """

    token_ids: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    paged: tuple[PagedIndex, ...]  # one a cache group
    query_starts: Tensor  # int32 [S + 1]
    context_lens: Tensor  # int32 [S]
    logit_rows: Tensor  # int32 [L], indices into T
    max_query: int
    max_context: int


@dataclass(frozen=True, slots=True)
class Dense:
    """A weight as it is: ``[N, K]``, float32, bfloat16 or float16."""

    weight_NK: Tensor


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight as small integers with a scale, and perhaps an offset, for each group along K.

    ``value = (code - zero) * scale + offset``. Where there are ``blocks``, scales and offsets are
    small integers themselves: those of a block of eight groups of 32 are multiplied by the block's.
    Covers all of llama.cpp's formats that have a grid, and ruvon's own int8 and int4.
    """

    codes_NK: Tensor  # int8; from 0 to below 2 ** bits, but -128..127 where bits == 8
    scales: Tensor  # float32 or float16, or int8 with blocks, [N, K / group]
    offsets: Tensor | None  # as scales
    group: int
    bits: Literal[4, 5, 6, 8]
    zero: int = 0
    blocks: Tensor | None = None  # float16 [N, K / 256, 1 or with offsets 2]

    @property
    def size(self) -> int:
        """How many values: N * K."""
        return self.codes_NK.numel()

    def tables(self) -> tuple[Tensor, Tensor | None]:
        """float32 scales and offsets [N, K / group], multiplied out: exact."""
        tables = [self.scales] if self.offsets is None else [self.scales, self.offsets]
        wide = [table.float() for table in tables]
        if self.blocks is not None:
            groups = BLOCK // self.group
            by = self.blocks.float().repeat_interleave(groups, dim=1)
            wide = [table * by[..., number] for number, table in enumerate(wide)]
        return wide[0], wide[1] if len(wide) > 1 else None

    def dequantize(self) -> Tensor:
        """The float32 values ``[N, K]``."""
        n, k = self.codes_NK.shape
        scales, offsets = self.tables()
        values = self.codes_NK.float().view(n, k // self.group, self.group) - self.zero
        values = values * scales.unsqueeze(-1)
        if offsets is not None:
            values = values + offsets.unsqueeze(-1)
        return values.view(n, k)

    def is_like(self, other: Quantized) -> bool:
        """Whether both are of one format, so that one may stand above the other."""
        mine, theirs = (
            (w.group, w.bits, w.zero, w.scales.dtype, w.offsets is None, w.blocks is None)
            for w in (self, other)
        )
        return mine == theirs


BLOCK = 256  # values that share what multiplies scales that are small integers


@dataclass(frozen=True, slots=True)
class Stacked:
    """Weights of different formats and equal K, one above the other."""

    parts: tuple[Quantized, ...]

    @property
    def size(self) -> int:
        """How many values: N * K."""
        return sum(part.size for part in self.parts)

    def dequantize(self) -> Tensor:
        """The float32 values ``[N, K]``."""
        return torch.cat([part.dequantize() for part in self.parts])


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """A weight as 4-bit floats (e2m1) with a power of two for every 32 along K, as OCP's MX has it.

    ``value = E2M1[code] * 2 ** (scale - 127)``. gpt-oss's experts come in it.
    """

    codes_NKB: Tensor  # uint8 [N, K / 32, 16]; the low nibble is the even element
    scales_NK: Tensor  # uint8 [N, K / 32]

    def dequantize(self) -> Tensor:
        """The float32 values ``[N, K]``: exact."""
        table = torch.tensor(E2M1 + tuple(-x for x in E2M1), device=self.codes_NKB.device)
        pairs = torch.stack((self.codes_NKB & 15, self.codes_NKB >> 4), dim=-1).flatten(-2)
        values = torch.ldexp(table[pairs.int()], self.scales_NK.int().unsqueeze(-1) - 127)
        return values.flatten(-2)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; bit 3 is the sign

Weight: TypeAlias = Dense | Quantized | Stacked | Mxfp4


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight laid out for one table's kernels. Only the table that packed it may look inside."""

    kind: str
    shape: tuple[int, int]  # N, K as the model sees them
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's experts as its checkpoint has them, one above the other in N, so that all formats
    of a weight serve here, too."""

    up: Weight  # [E * 2 * I, C]: an expert's I rows of its gate, its I rows of what that gates
    up_bias_N: Tensor | None  # [E * 2 * I]
    down: Weight  # [E * C, I]
    down_bias_N: Tensor | None  # [E * C]


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """What a mixture of experts needs to know besides its inputs."""

    num_experts: int
    top_k: int  # experts that a token goes through
    width: int  # of an expert: I
    activation: Activation  # a gated one
    renormalize: bool = True  # whether the weights of the chosen sum to 1


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Experts laid out for one table's kernels. Only the table that packed them may look inside."""

    kind: str
    spec: ExpertsSpec
    tensors: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position tables, rotate-half pairs ``(i, i + D / 2)``; scaling is already in them."""

    cos_PD: Tensor  # float32 [max positions, rotated dims / 2]
    sin_PD: Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention needs to know besides its inputs."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0  # keys visible to a query, itself included; 0 means all
    cache_group: int = 0  # the layer's, an index into `ForwardBatch.paged`


@dataclass(frozen=True, slots=True)
class Ops:
    """One backend. Every function allocates and returns its result; none changes its inputs
    except ``write_kv``, which fills the cache."""

    name: str
    pack: Callable[[Weight], Packed]
    """Lay a weight out for `linear` and `embed`."""

    embed: Callable[..., Tensor]
    """(ids [T], table V×C, first id or None) → x_TC in the compute dtype. With a first id, the
    table has the rows of V ids from there on, and others give zeros."""

    add: Callable[[Tensor, Tensor], Tensor]
    """(x_TC, y_TC) → x + y."""

    rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    """(x_TC, residual_TC or None, weight_C, eps) → (normed, x + residual)."""

    layer_norm: Callable[[Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x_TC, residual_TC or None, weight_C, bias_C, eps) → (normed, x + residual)."""

    linear: Callable[[Tensor, Packed, Tensor | None, Activation], Tensor]
    """(x_TK, weight, bias_N or None, activation) → act(x Wᵀ + b), [T, N] ([T, N / 2] if gated)."""

    write_kv: Callable[..., Tensor]
    """(qkv_TE, batch, k_cache, v_cache, AttentionSpec, Rope or None, q_norm_D or None,
    k_norm_D or None, eps) → q_THD. Splits q | k | v, norms q and k per head, rotates them, and
    writes k and v to the cache at the slots of the layer's cache group."""

    attention: Callable[..., Tensor]
    """(q_THD, k_cache, v_cache, batch, AttentionSpec, sinks_H or None) → [T, H * D]. Causal over
    each sequence's own blocks, of which those before the window are not read, or read and left out
    of every sum. A sink joins the softmax's denominator only."""

    gather_rows: Callable[[Tensor, Tensor], Tensor]
    """(x_TC, rows_L) → x_LC."""

    logits: Callable[[Tensor, Packed], Tensor]
    """(x_LC, head V×C) → float32 [L, V]."""

    norm_linear: Callable[..., tuple[Tensor, Tensor]] | None = None
    """(x_TK, residual_TK or None, norm weight, norm bias or None, eps, weight, bias_N or None,
    activation) → (product, x + residual). A norm and the product after it, for a table that has
    them in one launch; the norm is RMSNorm where it has no bias. None: two calls."""

    linear_into: Callable[[Tensor, Packed, Tensor | None, Tensor], Tensor] | None = None
    """(x_TK, weight, bias_N or None, y_TN) → y: ``linear`` of many rows with a place for what it
    makes, for products in parts. None: there are none."""

    attend: Callable[..., Tensor] | None = None
    """``write_kv``'s arguments and ``sinks_H`` → what ``attention`` then returns. None: two
    calls."""

    pack_experts: Callable[[Experts, ExpertsSpec], PackedExperts] | None = None
    """Lay a layer's experts out for `experts`. None, both: this table has no experts."""

    experts: Callable[[Tensor, Packed, Tensor | None, PackedExperts], Tensor] | None = None
    """(x_TC, router E×C, bias_E or None, experts) → y_TC. A token's ``top_k`` largest router logits
    choose its experts, and their softmax (over all logits where not ``renormalize``) weighs what
    they make of it: ``sum_e weight_e * (W2_e act(W1_e x + b1_e) + b2_e)``. Logits and their softmax
    are float32."""

    norm_experts: Callable[..., tuple[Tensor, Tensor]] | None = None
    """(x_TC, residual_TC or None, norm weight_C, eps, router E×C, bias_E or None, experts) →
    (``experts``' y_TC of the RMSNorm, x + residual). None: two calls."""

    norm_experts_rows: int = 0
    """For up to how many tokens ranks that could sum with a norm had better sum alone, and call
    ``norm_experts``."""

    dtype: torch.dtype = torch.float32
    """What x is computed in; biases come in it, norm weights and rope tables in float32."""

    device: torch.device = CPU
    """Where every tensor given to these functions lies."""

    batch_invariant: bool = False
    """Whether a row's result has the same bits whatever other rows there are, and however many
    threads compute them: what `ruvon verify` checks."""

"""What kernels are told: for each a tuple of named fields, and how it lies in memory.

An *instruction* is a `Header` and the arguments of its kernel, each field an int64 or a float64,
256 bytes in all. A kernel is a compiled function over addresses:

    kernel(arguments, params, start, stop, scratch)

It does units ``start`` to ``stop`` of its instruction; what a unit is (a row, 32 outputs of a
product, a head) is the kernel's own business. There are ``units`` of them for each of what is
counted at ``params + 8 * counted``, so that one graph serves every batch size.

The same tuples are filled in by `graph`, with values, tensors and numbers, and read by compiled
code, with addresses and numbers (`jit.simd.arguments`). Strides are in bytes; what is absent has
address 0; ids, positions and the like are int32, all rows float32.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, get_type_hints

import numpy as np
from torch import Tensor

INSTRUCTION_BYTES = 256

Key: TypeAlias = tuple[str, int | None]
"""A kernel's name, and the kind of weight or cache it is made for if it has one (see `FORMATS`)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value lies in one form, ``offset`` bytes on. Nowhere, if nobody wants that form."""

    value: Any  # a `graph.Value`
    form: Any  # a `formats.Form`
    offset: int = 0

    @property
    def address(self) -> int:
        memory = self.value.memory.get(self.form)
        return 0 if memory is None else int(memory.data_ptr()) + self.offset


Address: TypeAlias = "Place | Tensor | int | None"


class Header(NamedTuple):
    """What threads are told of an instruction."""

    kernel: int  # address
    counted: int  # a `Param`
    units: int  # for each of those counted
    dynamic: int  # 1: units cost so unlike that threads take them one by one; 0: each has its own
    next_tiles: Address = 0  # those of the next product, to be fetched into the cache meanwhile
    next_units: int = 0
    next_unit_bytes: int = 0
    next_attention: Address = 0  # arguments of the next one, whose cache is fetched meanwhile


class Rows(NamedTuple):
    """Plain rows: where the first is, and from each to the next."""

    at: Address = 0
    stride: int = 0


class Output(NamedTuple):
    """Where rows go, in each form that somebody wants."""

    rows: Rows = Rows()
    int8: Address = 0
    bf16: Address = 0
    groups: int = 0  # of 32, in a packed row


class Tiles(NamedTuple):
    """A weight, see `layout`."""

    tiles: Address
    steps: int  # turns along k
    tile_bytes: int


class Copy(NamedTuple):
    """Rows as they are, or those that are asked for, or with others added to them or gated."""

    x: Rows
    out: Output
    rows: Address = 0  # their numbers; without, one after another
    y: Address = 0  # others, as far apart
    activation: int = 0  # of a gate, which x is then; 0 adds
    width: int = 0  # of what is gated


class Embed(NamedTuple):
    ids: Address
    table: Tiles
    first: int  # id of the table's first row; ids that it does not have give zeros
    rows: int
    width: int
    out: Rows


class Norm(NamedTuple):
    """LayerNorm, or RMSNorm without a bias."""

    x: Rows
    residual: Address  # as far apart
    total: Address  # x + residual out
    width: int
    weight: Address
    bias: Address
    eps: float
    out: Output


class Linear(NamedTuple):
    x: Rows  # in the form that the weight wants; what is packed has its own stride
    weight: Tiles
    bias: Address
    activation: int
    counted: int  # the `Param` of rows
    columns: int  # units of a panel of rows
    width: int
    gate_bytes: int  # from a gate's tile to its partner's; 0 if the product is not gated
    out: Output


class Routes(NamedTuple):
    """A row for each token: its experts, their weights in float32, and where in the rows of all
    experts each of them has it, ``top_k`` of each."""

    rows: Rows
    top_k: int


class Route(NamedTuple):
    """Each token's experts, in a row of `Routes`."""

    logits: Rows
    experts: int
    renormalize: int  # whether the weights of the chosen sum to 1
    out: Routes


class Sort(NamedTuple):
    """Give each token a row with each of its experts: an expert's rows lie together."""

    routes: Routes
    counted: int  # the `Param` of tokens
    experts: int
    out: Address  # panels: their number, what a column of all costs, then each, see `params`


class Routed(NamedTuple):
    """From tokens to rows for their experts, or back: a token's weighted sum of those."""

    x: Rows
    routes: Routes
    out: Output


class Experts(NamedTuple):
    """A product of each expert's rows with its own part of a weight."""

    panels: Address
    shares: int  # units in all
    expert_tiles: int  # bytes of an expert's tiles
    expert_bias: int  # bytes of its bias
    product: Linear


class Cache(NamedTuple):
    """A layer's keys and values, and what their blocks look like."""

    keys: Address
    values: Address
    heads: int
    kv_heads: int
    head_dim: int
    page: int  # tokens in a block


class WriteKV(NamedTuple):
    qkv: Rows
    cache: Cache
    positions: Address
    slots: Address
    cos: Address  # [positions, pairs]
    sin: Address
    pairs: int  # of dims that rotate
    q_norm: Address
    k_norm: Address
    eps: float
    out: Rows  # queries, heads padded to whole vectors


class Attention(NamedTuple):
    queries: Rows
    cache: Cache
    starts: Address  # first token of each sequence
    contexts: Address
    tables: Address
    table_stride: int
    scale: float
    window: int
    sinks: Address
    block_bytes: int  # of a block's keys, and of its values
    out: Output


class Argmax(NamedTuple):
    x: Rows
    width: int
    out: Address  # int64


class Sample(NamedTuple):
    rows: Address  # `SampledRow`
    results: Address  # `SampledToken`
    spaces: Address  # workspaces, float32 [vocabulary, rounded up]
    vocab_size: int


class SampledRow(NamedTuple):
    """What is wanted of a row."""

    logits: int  # address of float32 [V]
    temperature: float  # 0 is greedy
    top_k: int  # 0 is off
    min_p: float
    top_p: float  # 1 is off
    seed: np.uint64
    position: int  # in the output
    ids: int  # address of int32 token ids: allowed, biased, seen, counted ones
    amounts: int  # address of float32 amounts to add to biased and counted ones
    num_allowed: int  # -1: all are
    num_biased: int  # banned ones too, by -inf
    num_seen: int  # with repetitions
    num_counted: int
    repetition: float  # penalty for those seen
    num_top: int  # how many of the likeliest are wanted; -1: no logprobs at all
    top: int  # address of int32 [num_top]


class SampledToken(NamedTuple):
    """What became of a row."""

    token: int  # -1 if there is none
    rank: int  # 1 is the likeliest; with logprobs only
    norm: float
    """With logprobs, what to take from a logit for a log-probability; without a token, the best
    score, which is no number."""


def leaves(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """All that the fields hold, in order."""
    for each in arguments:
        if isinstance(each, tuple):
            yield from leaves(each)
        else:
            yield each


def words(arguments: tuple[Any, ...]) -> list[int]:
    """How they lie in memory."""
    return [word(each) for each in leaves(arguments)]


def word(leaf: Address | float) -> int:
    match leaf:
        case None:
            return 0
        case Place():
            return leaf.address
        case Tensor():
            return leaf.data_ptr()
        case float():
            return int(struct.unpack("<q", struct.pack("<d", leaf))[0])
    return int(leaf)


def record_type(kind: type) -> np.dtype[np.void]:
    """The numpy type of such tuples in memory."""
    names = {float: "f8", np.uint64: "u8"}
    return np.dtype([(name, names.get(each, "i8")) for name, each in get_type_hints(kind).items()])

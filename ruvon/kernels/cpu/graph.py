"""A model's whole step as one native call: captured once, replayed for every batch.

It is to a CPU what a CUDA graph is to a GPU, but sizes stay free: instructions read the number of
tokens, sequences and logit rows when they run, so one graph serves every batch up to its limits.

A model's calls are traced, not computed. A `Capture` stands behind a table of `operations`: each of
them appends an instruction and returns a tensor without memory, which stands for the value that it
will make. Once all are there, it is known who wants which value in which form, and up to where: a
`Program` then gives out memory.

A value is made in the forms that are asked for. A product with quantized weights wants its input
as int8 with scales, one with pairs of bfloat16 wants bfloat16; if that input is the output of a
norm, of attention or of another product, that instruction writes this form while it has the numbers
in its registers, and writes plain rows only if somebody else reads them. Nothing else is fused, and
models say nothing about any of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ruvon.kernels.cpu import arguments as told
from ruvon.kernels.cpu.arguments import INSTRUCTION_BYTES, Address, Header, Key, Output, Place, Rows
from ruvon.kernels.cpu.compiled import Compiled
from ruvon.kernels.cpu.formats import GROUP, Form
from ruvon.kernels.cpu.layout import aligned_bytes, round_up
from ruvon.kernels.cpu.params import PANEL, QUERY_TOKENS, Param
from ruvon.kernels.cpu.thread_pool import ThreadPool
from ruvon.kernels.ops import ForwardBatch, PagedIndex, StepLimits

Link: TypeAlias = tuple[Address, int, int, Address]
WORDS = INSTRUCTION_BYTES // 8

MEET: Key = ("meet", None)
"""In place of a kernel's: here ranks meet, see `meeting`."""


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

    counted: Param  # says how many rows there are in a step
    capacity: int  # most of them
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

    def read(self, form: Form = Form.ROWS, offset: int = 0) -> Place:
        """Where an instruction will find it in a form."""
        self.wanted.add(form)
        return Place(self, form, offset)

    def rows(self) -> Rows:
        """Where an instruction will find its plain rows."""
        return Rows(self.read(), self.stride)

    def output(self, offset: int = 0) -> Output:
        """Where its instruction writes it."""
        return Output(
            rows=Rows(Place(self, Form.ROWS, offset), self.stride),
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
        counted: Param,
        width: int,
        capacity: int | None = None,
        *,
        packable: bool = False,
    ) -> Value:
        """A value to be made by the instruction that comes next. ``capacity``: its most rows, where
        there are not as many as ``counted`` says."""
        most = self.capacity[counted] if capacity is None else capacity
        return Value(counted, most, width, packable, set() if packable else {Form.ROWS})

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
            packs = value.output()._replace(rows=Rows())
            self.append(("copy", None), value.counted, told.Copy(value.rows(), packs))
        return value.read(form)


class Program:
    """Captured instructions in memory, ready to run."""

    def __init__(
        self, capture: Capture, results: Iterable[Tensor], compiled: Compiled, pool: ThreadPool
    ) -> None:
        """``results`` stand for values that are read after the last instruction."""
        self.instructions = capture.instructions  # which keep all that they point at
        self._pool = pool
        wanted = {capture.value_of(tensor).read().value for tensor in results}
        give_memory(capture, wanted)
        self._memory = new_instructions(len(self.instructions))
        links = prefetch_links(self.instructions, self._memory)
        for line, each, link in zip(self._memory, self.instructions, links, strict=True):
            if each.kernel == MEET:
                continue
            address = compiled.address(each.kernel)
            header = Header(address, each.counted, each.units, each.dynamic, *link)
            numbers = told.words((header, each.arguments))
            line[: len(numbers)] = torch.tensor(numbers)
        self._stretches = [*stretches(self.instructions, self._memory)]

    def run(self, sizes: Sequence[int], lines: Tensor | None = None) -> None:
        """One step of these sizes; returns when all threads are done.

        ``lines`` runs some instructions only, as `pick` makes them: to find out what takes long.
        """
        if lines is not None:
            self._pool.run(lines, sizes)
            return
        for stretch, meet in self._stretches:
            if len(stretch):
                self._pool.run(stretch, sizes)
            meet(sizes)

    def pick(self, numbers: Sequence[int]) -> Tensor:
        """A copy of the instructions of these numbers."""
        lines = new_instructions(len(numbers))
        lines.copy_(self._memory[list(numbers)])
        return lines


def stretches(
    instructions: Sequence[Instruction], memory: Tensor
) -> Iterator[tuple[Tensor, Callable[[Sequence[int]], object]]]:
    """The instructions from one meeting of ranks to the next, and what is called behind them."""
    first = 0
    for number, line in enumerate(instructions):
        if line.kernel == MEET:
            yield memory[first:number], line.arguments.call
            first = number + 1
    yield memory[first:], lambda sizes: None


def new_instructions(count: int) -> Tensor:
    return aligned_bytes(count * INSTRUCTION_BYTES).view(torch.int64).view(-1, WORDS)


def places(line: Instruction) -> Iterator[tuple[Value, Form]]:
    """The memory that an instruction reads or writes and that somebody wants."""
    for leaf in told.leaves(line.arguments):
        if isinstance(leaf, Place) and leaf.form in leaf.value.wanted:
            yield leaf.value, leaf.form


def give_memory(capture: Capture, results: set[Value]) -> None:
    """Every value has memory from the instruction that makes it to the last that reads it; that of
    ``results`` is theirs for good.

    Only buffers of one form and shape share: what pads them stays zero.
    """
    last = {place: n for n, line in enumerate(capture.instructions) for place in places(line)}
    free: dict[tuple[Form, int, int], list[Tensor]] = defaultdict(list)
    for number, line in enumerate(capture.instructions):
        mine = dict.fromkeys(places(line))
        for value, form in mine:
            if form not in value.memory:
                unused = free[form, value.capacity, value.width]
                size = round_up(value.capacity, GROUP) * value.groups * form.group_bytes
                value.memory[form] = unused.pop() if unused else aligned_bytes(size)
        for value, form in mine:
            if last[value, form] == number and value not in results:
                free[form, value.capacity, value.width].append(value.memory[form])


def prefetch_links(instructions: Sequence[Instruction], memory: Tensor) -> list[Link]:
    """For each instruction what follows and is read from memory: the weights of the next product
    (tiles, units, bytes of a unit), and where the next attention's arguments lie in the
    instructions' ``memory``. After the last one comes the first, of the next step."""
    link: Link = (None, 0, 0, None)
    links = []
    for line, place in (2 * [*zip(instructions, memory, strict=True)])[::-1]:
        links.append(link)
        if line.kernel[0] == "linear":
            weight = line.arguments.weight
            link = weight.tiles, line.units, 2 * weight.tile_bytes, link[3]
        elif line.kernel[0] == "experts":
            link = None, 0, 0, link[3]  # nobody knows which before
        elif line.kernel[0] == "attention":
            link = *link[:3], place[len(Header._fields) :]
    return links[: len(instructions) - 1 : -1]


def sizes_of(query_starts: np.ndarray[Any, Any], logit_rows: int) -> list[int]:
    """The parameters of a step, in the order of `Param`; ``query_starts`` [S + 1] as in a batch."""
    tokens, sequences = int(query_starts[-1]), len(query_starts) - 1
    tiles = tokens
    if tokens != sequences:
        tiles = int((-(-np.diff(query_starts) // QUERY_TOKENS)).sum())
    return [tokens, -(-tokens // PANEL), logit_rows, -(-logit_rows // PANEL), sequences, tiles, 1]


class Graph:
    """One model's step. `replay` is a runner's ``forward``."""

    def __init__(
        self, program: Program, batch: ForwardBatch, logits_LV: Tensor, likeliest_L: Tensor
    ) -> None:
        """``program`` reads ``batch``, which is as large as any may be, and writes the others."""
        self.program = program
        self._arrays = arrays_of(batch)
        self._logits = logits_LV
        self._likeliest = likeliest_L.numpy()
        self.num_rows = 0

    def replay(self, batch: ForwardBatch) -> Tensor:
        """float32 logits [L, V] of the batch's ``logit_rows``, valid until the next replay.

        The batch may be of numpy arrays. All between two replays runs with cold caches, as weights
        have just streamed through them, and torch is a long way to a few numbers.
        """
        for array, given in zip(self._arrays, arrays_of(batch), strict=True):
            array[tuple(map(slice, given.shape))] = given
        self.num_rows = len(batch.logit_rows)
        self.program.run(sizes_of(np.asarray(batch.query_starts), self.num_rows))
        return self._logits[: self.num_rows]

    @property
    def argmax(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[L]: the likeliest token of each row of the last replay; of equals, the first."""
        return self._likeliest[: self.num_rows]


def arrays_of(batch: ForwardBatch) -> list[np.ndarray[Any, Any]]:
    """All that instructions read of a batch; of tensors, arrays in the same memory."""
    counts = batch.query_starts, batch.context_lens, batch.logit_rows
    paged = (each for index in batch.paged for each in (index.slots, index.block_tables))
    return [np.asarray(each) for each in (batch.token_ids, batch.positions, *counts, *paged)]


def empty_batch(limits: StepLimits) -> ForwardBatch:
    """The batch whose memory the instructions read."""

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return ForwardBatch(
        token_ids=ints(limits.tokens),
        positions=ints(limits.tokens),
        paged=tuple(
            PagedIndex(ints(limits.tokens), ints(limits.sequences, limits.blocks_per_sequence))
            for _ in range(limits.cache_groups)
        ),
        query_starts=ints(limits.sequences + 1),
        context_lens=ints(limits.sequences),
        logit_rows=ints(limits.logit_rows),
        max_query=limits.tokens,
        max_context=0,
    )

"""A model's whole step as one native call: captured once, replayed for every batch.

It is to a CPU what a CUDA graph is to a GPU, but sizes stay free: instructions read the number of
tokens, sequences and logit rows when they run, so one graph serves every batch up to its limits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ruvon.kernels.cpu.arguments import (
    INSTRUCTION_BYTES,
    Address,
    Header,
    Place,
    leaves,
    words,
)
from ruvon.kernels.cpu.capture import Capture, Instruction, Value
from ruvon.kernels.cpu.compiled import Compiled
from ruvon.kernels.cpu.formats import GROUP, Form
from ruvon.kernels.cpu.layout import aligned_bytes, round_up
from ruvon.kernels.cpu.meeting import KEY
from ruvon.kernels.cpu.operations import argmax
from ruvon.kernels.cpu.params import PANEL, QUERY_TOKENS
from ruvon.kernels.cpu.thread_pool import ThreadPool
from ruvon.kernels.ops import ForwardBatch, PagedIndex, StepLimits

Forward: TypeAlias = Callable[[ForwardBatch, Sequence[tuple[Tensor, Tensor]]], Tensor]
Link: TypeAlias = tuple[Address, int, int, Address]
WORDS = INSTRUCTION_BYTES // 8


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
            if each.kernel == KEY:
                continue
            address = compiled.address(each.kernel)
            header = Header(address, each.counted, each.units, each.dynamic, *link)
            numbers = words((header, each.arguments))
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
        if line.kernel == KEY:
            yield memory[first:number], line.arguments.call
            first = number + 1
    yield memory[first:], lambda sizes: None


def new_instructions(count: int) -> Tensor:
    return aligned_bytes(count * INSTRUCTION_BYTES).view(torch.int64).view(-1, WORDS)


def places(line: Instruction) -> Iterator[tuple[Value, Form]]:
    """The memory that an instruction reads or writes and that somebody wants."""
    for leaf in leaves(line.arguments):
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
        self,
        forward: Forward,
        cache: Sequence[tuple[Tensor, Tensor]],
        limits: StepLimits,
        capture: Capture,
        finish: Callable[[Capture, Iterable[Tensor]], Program],
        *,
        draws: bool = True,
    ) -> None:
        """``capture`` is the one that the model's operations write to. With ``draws``, `argmax` is
        computed."""
        self._batch = empty_batch(limits)
        self._arrays = [getattr(self._batch, name).numpy() for name in COPIED]
        self._paged = [
            (index.slots.numpy(), index.block_tables.numpy()) for index in self._batch.paged
        ]
        logits = forward(self._batch, cache)
        likeliest = torch.zeros(limits.logit_rows, dtype=torch.int64)
        if draws:
            argmax(capture, logits, likeliest)
        self._likeliest = likeliest.numpy()
        self.program = finish(capture, [logits])
        self._logits = capture.result(logits)
        self.num_rows = 0

    def replay(self, batch: ForwardBatch) -> Tensor:
        """float32 logits [L, V] of the batch's ``logit_rows``, valid until the next replay.

        The batch may be of numpy arrays. All between two replays runs with cold caches, as weights
        have just streamed through them, and torch is a long way to a few numbers.
        """
        for (slots, tables), index in zip(self._paged, batch.paged, strict=True):
            slots[: index.slots.shape[0]] = np.asarray(index.slots)
            new = np.asarray(index.block_tables)
            tables[: new.shape[0], : new.shape[1]] = new
        given = [np.asarray(getattr(batch, name)) for name in COPIED]
        for array, numbers in zip(self._arrays, given, strict=True):
            array[: numbers.size] = numbers
        self.num_rows = given[-1].size
        self.program.run(sizes_of(given[STARTS], self.num_rows))
        return self._logits[: self.num_rows]

    @property
    def argmax(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[L]: the likeliest token of each row of the last replay; of equals, the first."""
        return self._likeliest[: self.num_rows]


COPIED = ("token_ids", "positions", "query_starts", "context_lens", "logit_rows")
STARTS = COPIED.index("query_starts")


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

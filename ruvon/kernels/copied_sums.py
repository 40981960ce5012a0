"""Sums of many rows: the cards' copy engines carry them while the multiprocessors go on.

What each rank has a summand of is multiplied some rows at a time. Rows that are done go to the
other ranks as plain copies, on a stream of their own, while the next are multiplied; a kernel then
adds up what came in the order of ranks, with the residual addition and the norm, some rows at a
time as well, while the last ones are still on their way.

Behind each part goes the number of the sum, for which that kernel waits. Before the first all ranks
meet: who has not yet added up the sum before would find the next one in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.all_reduce import LARGEST_ROW
from ruvon.kernels.mailboxes import Mailboxes, receive, seal, send, share_memory
from ruvon.kernels.mesh import Product, Store
from ruvon.kernels.norm import Norm, load_norm, normalize

MOST_RANKS = 2
"""Each sends all it has to all others: of more ranks those are more bytes than NCCL sends."""

FEWEST_PARTS, PARTS = 2, 4  # of a sum
PART_BYTES = 8_000_000  # about, in between: tiles of such a product once fill a card
LINES = 128  # rows of a part are a multiple of, as of cuBLAS's tiles

ROOM = 128 << 20  # bytes, of a sum from each of the others
FLAGS = 256  # words in front of that


class Landing(NamedTuple):
    """Memory that the other ranks copy into; all ranks', in order, as they are reached from
    here."""

    flags: tuple[Tensor, ...]  # int32 [sender, PARTS]: the number of the sum whose part has come
    rooms: tuple[Tensor, ...]  # uint8 [sender but for oneself, bytes]
    held: object = None  # the memory


class _Sum(NamedTuple):
    """A rank's summand, on its way to the others."""

    x_TC: Tensor
    sent: list[Any]  # a torch.cuda.Event for each part; None on a CPU, which copies at once


@triton.jit
def _meet_kernel(
    count_ptr, boxes, turns_ptr, LANES: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
    ROOM: tl.constexpr, SENDER: tl.constexpr, NOTHING: tl.constexpr,
):  # fmt: skip
    """Counts sums, and waits until all ranks are as far."""
    BITS: tl.constexpr = boxes[0].dtype.element_ty
    lanes = tl.arange(0, LANES)
    turn = tl.load(turns_ptr)
    at, inside = turn * SIZE * SENDER + lanes, lanes < LANES
    send(seal(lanes, BITS, NOTHING), boxes, at + RANK * SENDER, inside, 0, RANK, SIZE, False)
    for sender in tl.static_range(SIZE):
        if sender != RANK:
            receive(boxes[RANK] + at + sender * SENDER, inside, NOTHING)
    tl.store(turns_ptr, 1 - turn)
    tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit(do_not_specialize=["number"])
def _add_up_kernel(
    x_ptr, landed_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, total_ptr,
    flags_ptr, count_ptr, number, num_columns, landed_stride, flags_stride, eps,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, CENTERED: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A row of part ``number``."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    at = tl.program_id(0).to(tl.int64) * num_columns + columns
    weight, bias = load_norm(weight_ptr, bias_ptr, columns, inside)
    mine = tl.load(x_ptr + at, mask=inside, other=0.0)
    residual = mine
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
    count = tl.load(count_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    for sender in tl.static_range(SIZE):
        part = mine
        if sender != RANK:
            flag = flags_ptr + sender * flags_stride + number
            come = tl.load(flag, volatile=True)
            while come != count:
                come = tl.load(flag, volatile=True)
            landed = landed_ptr + (sender - (1 if sender > RANK else 0)) * landed_stride + at
            part = tl.load(landed, mask=inside, other=0.0, volatile=True)
        total += part.to(tl.float32)
    x = total.to(dtype)
    if HAS_RESIDUAL:
        x = x + residual
    tl.store(total_ptr + at, x, mask=inside)
    if NORM:
        normed = normalize(x, weight, bias, inside, num_columns, eps, CENTERED)
        tl.store(normed_ptr + at, normed.to(dtype), mask=inside)


class CopiedSums:
    """The sums of a rank, one at a time. All ranks call the same functions in the same order, with
    as many rows."""

    def __init__(self, mail: Mailboxes, landing: Landing) -> None:
        device = landing.flags[mail.rank].device
        self._mail = mail
        self._landing = landing
        self._count = torch.zeros(1, dtype=torch.int32, device=device)
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._sum: _Sum | None = None

    def fits(self, rows: int, columns: int, itemsize: int) -> bool:
        """Whether there is room for as many rows, of that size."""
        room = self._landing.rooms[self._mail.rank].shape[1]
        return columns <= LARGEST_ROW and 0 < rows * columns * itemsize <= room

    def multiply(self, product: Product, x_TK: Tensor, width: int) -> Tensor:
        """``product`` of x, [T, width], on its way to the other ranks: to be given to `add`."""
        y_TN = x_TK.new_empty(len(x_TK), width)
        self._sum = self._send(y_TN, lambda part: product(x_TK[part], y_TN[part]))
        return y_TN

    def add(
        self, x_TC: Tensor, residual_TC: Tensor | None = None, norm: Norm | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the norm of s + residual, s + residual), where s is the sum of all ranks' x; without a
        norm twice the latter."""
        own, self._sum = self._sum, None
        if own is None or own.x_TC is not x_TC:
            own = self._send(x_TC.contiguous(), lambda part: None)
        total_TC = torch.empty_like(own.x_TC)
        normed_TC = total_TC if norm is None else torch.empty_like(total_TC)
        for number, (part, sent) in enumerate(zip(_parts(own.x_TC), own.sent, strict=True)):
            if sent is not None:  # so this rank has met the others, for which it needs some room
                torch.cuda.current_stream().wait_event(sent)
            self._add(own.x_TC, residual_TC, norm, normed_TC, total_TC, part, number)
        return normed_TC, total_TC

    def _send(self, x_TC: Tensor, make: Callable[[slice], object]) -> _Sum:
        """To all others, each part as soon as it is made."""
        boxes, constants = self._mail.arguments(4)
        with self._behind():
            _meet_kernel[(1,)](
                self._count, boxes, self._mail.turns, LANES=16, **constants, num_warps=1
            )
        sent = []
        for number, part in enumerate(_parts(x_TC)):
            make(part)
            sent.append(self._send_part(x_TC, part, number))
        return _Sum(x_TC, sent)

    def _send_part(self, x_TC: Tensor, part: slice, number: int) -> Any:
        """→ when it is done, as `_Sum` has it."""
        rank, first = self._mail.rank, part.start * x_TC.shape[1] * x_TC.itemsize
        data = x_TC[part].view(torch.uint8).flatten()
        with self._behind():
            for other in range(self._mail.size):
                if other != rank:
                    room = self._landing.rooms[other][rank - (rank > other)]
                    room[first : first + len(data)].copy_(data)
                    self._landing.flags[other][rank, number : number + 1].copy_(self._count)
            return None if self._stream is None else self._stream.record_event()

    def _behind(self) -> AbstractContextManager[Any]:
        """The stream of copies, behind what the current one has been given."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _add(
        self,
        x_TC: Tensor,
        residual_TC: Tensor | None,
        norm: Norm | None,
        normed_TC: Tensor,
        total_TC: Tensor,
        part: slice,
        number: int,
    ) -> None:
        rank, (rows, columns) = self._mail.rank, x_TC[part].shape
        landed = self._landing.rooms[rank].view(x_TC.dtype)
        flags = self._landing.flags[rank]
        block = triton.next_power_of_2(columns)
        _add_up_kernel[(rows,)](
            x_TC[part],
            landed[:, part.start * columns :],
            None if residual_TC is None else residual_TC[part],
            None if norm is None else norm.weight_C,
            None if norm is None else norm.bias_C,
            normed_TC[part],
            total_TC[part],
            flags,
            self._count,
            number,
            columns,
            landed.stride(0),
            flags.stride(0),
            0.0 if norm is None else norm.eps,
            BLOCK=block,
            HAS_RESIDUAL=residual_TC is not None,
            NORM=norm is not None,
            CENTERED=norm is not None and norm.bias_C is not None,
            RANK=rank,
            SIZE=self._mail.size,
            num_warps=4 if block <= 2048 else 8,
        )


def _parts(x_TC: Tensor) -> Iterator[slice]:
    """Rows that go together."""
    rows = len(x_TC)
    parts = min(max(x_TC.nbytes // PART_BYTES, FEWEST_PARTS), PARTS)
    step = triton.cdiv(rows, parts * LINES) * LINES
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def share_landing(store: Store, name: str, rank: int, size: int) -> Landing:
    """Room for sums in torch's symmetric memory, of the current device. Blocks until all ranks have
    called it.

    Raises RuntimeError where a GPU cannot reach another's memory.
    """
    words = FLAGS + (size - 1) * ROOM // 4
    return make_landing(*share_memory(store, name, rank, size, words, 0))


def make_landing(memory: list[Tensor], held: object = None) -> Landing:
    """Of the ranks' memory, int32 each and zeros, as it is reached from here."""
    size = len(memory)
    flags = tuple([words[: size * PARTS].view(size, PARTS) for words in memory])
    rooms = tuple([words[FLAGS:].view(torch.uint8).view(size - 1, -1) for words in memory])
    return Landing(flags, rooms, held)

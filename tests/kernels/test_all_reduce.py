"""Sums through mailboxes and as copies: on GPUs against NCCL; without any, in Triton's interpreter,
by processes that write into each other's memory."""

from __future__ import annotations

import sys
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from cards import DEVICE, on_cards
from torch import Tensor

from ruvon.kernels.mesh import Mesh, Store

pytest.importorskip("triton")  # which is not on every platform

from ruvon.kernels import all_gather, all_reduce, copied_sums, memory_mesh
from ruvon.kernels.copied_sums import CopiedSums, make_landing
from ruvon.kernels.mailboxes import EMPTY_WIDE, make_mailboxes
from ruvon.kernels.norm import Norm

CARDS = torch.cuda.device_count()
HIDDEN, EPS = 24, 1e-5
WIDTHS = (24, 7, 0)
ROWS = (1, 3, 2, 5)
"""Of calls in a row: halves take turns, for each program at its own pace."""


def numbers(rank: int, call: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Some of which are what marks an empty mailbox: -0.0 and one of the smallest of float32."""
    generator = torch.Generator().manual_seed(100 * call + rank)
    x = torch.randn(rows, columns, generator=generator) * 10.0 ** (rank % 3)
    x.view(-1)[::5] = torch.tensor(EMPTY_WIDE.value, dtype=torch.int32).view(torch.float32)
    x.view(-1)[::7] = -0.0
    return x.to(dtype)


def expected(call: int, rows: int, columns: int, size: int, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(rows, columns)
    for rank in range(size):
        part = numbers(rank, call, rows, columns, dtype).float()
        total = total + torch.where(part.abs() < 1e-38, 0.0, part)  # the marks are sent as 0
    return total.to(dtype)


def normed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.double()
    if bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    scaled = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    return scaled if bias is None else scaled + bias.double()


def wait_politely() -> None:
    """Let others compute between two looks into a mailbox, here where all share some cores."""
    builder = sys.modules["triton.runtime.interpreter"].interpreter_builder
    load = builder.create_masked_load

    def load_later(*arguments: Any) -> Any:
        sleep(0.001 * bool(arguments[-1]))  # whether it is volatile
        return load(*arguments)

    builder.create_masked_load = load_later


def meet(rank: int, boxes: list[Tensor], two_shot: bool) -> None:
    """One rank's process: calls of different kinds and numbers of rows, one after another."""
    wait_politely()
    all_gather.COLUMNS, all_reduce.ONE_SHOT_BYTES = 16, 0 if two_shot else 1 << 30
    box, size, dtype = make_mailboxes(rank, boxes, programs=2), len(boxes), torch.float32
    weight, bias = torch.rand(HIDDEN) + 0.5, torch.rand(HIDDEN)
    for call, rows in enumerate(ROWS):
        x = numbers(rank, call, rows, HIDDEN, dtype)
        if call == 1:
            whole = all_gather.gather_ranks(x[:, : WIDTHS[rank]], WIDTHS[:size], box)
            parts = [numbers(r, call, rows, HIDDEN, dtype)[:, : WIDTHS[r]] for r in range(size)]
            assert torch.allclose(whole, torch.cat(parts, 1), atol=1e-38, rtol=0)
        total = expected(call, rows, HIDDEN, size, dtype)
        if call % 3 == 0:
            assert torch.equal(all_reduce.sum_ranks(x, box), total)
            continue
        residual = numbers(9, call, rows, HIDDEN, dtype) if call % 3 == 1 else None
        given = bias if call % 2 else None
        result, stream = all_reduce.sum_add_norm(x, residual, weight, given, EPS, box)
        assert torch.equal(stream, total if residual is None else total + residual)
        assert torch.allclose(result.double(), normed(stream, weight, given), atol=1e-5, rtol=0)
    assert (boxes[rank] == EMPTY_WIDE.value).all()


@pytest.mark.skipif(CARDS > 0, reason="a GPU's programs do not wait for another process")
@pytest.mark.usefixtures("triton_device")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("size", "two_shot"), [(2, False), (3, True)])
def test_ranks_add_up_what_they_find_in_their_mailboxes(size: int, two_shot: bool) -> None:
    count = 2 * size * 2 * 3 * HIDDEN  # two halves, programs, and three rows of each
    boxes = [torch.full((count,), EMPTY_WIDE.value, dtype=torch.int32) for _ in range(size)]
    for box in boxes:
        box.share_memory_()
    processes.start_processes(meet, (boxes, two_shot), nprocs=size, start_method="fork")


def copy(rank: int, boxes: list[Tensor], landings: list[Tensor]) -> None:
    """One rank's process: sums of products that are on their way while they are computed, and of
    what is whole already, one after another."""
    wait_politely()
    copied_sums.PART_BYTES, copied_sums.LINES = 4 * HIDDEN, 2
    copied = CopiedSums(make_mailboxes(rank, boxes, programs=1), make_landing(landings))
    size, dtype = len(boxes), torch.float32
    weight, bias = torch.rand(HIDDEN) + 0.5, torch.rand(HIDDEN)
    for call, rows in enumerate((7, 1, 8, 3, 7)):
        x, products = numbers(rank, call, rows, HIDDEN, dtype), []

        def product(x: Tensor, y: Tensor, products: list[int] = products) -> Tensor:
            products.append(len(x))
            return y.copy_(x)

        if call != 3:
            x = copied.multiply(product, x, HIDDEN)
            assert products == [2] * (rows // 2) + [1] * (rows % 2)
        total = expected(call, rows, HIDDEN, size, dtype)
        residual = numbers(9, call, rows, HIDDEN, dtype) if call % 3 == 0 else None
        wanted = total if residual is None else total + residual
        if call == 1:
            assert torch.allclose(copied.add(x)[1], wanted, atol=1e-38, rtol=0)
            continue
        given = bias if call % 2 else None
        result, stream = copied.add(x, residual, Norm(weight, given, EPS))
        assert torch.allclose(stream, wanted, atol=1e-38, rtol=0)
        assert torch.allclose(result.double(), normed(stream, weight, given), atol=1e-5, rtol=0)
    assert not copied.fits(9, HIDDEN, 4)
    assert copied.fits(8, HIDDEN, 4)


@pytest.mark.skipif(CARDS > 0, reason="a GPU's programs do not wait for another process")
@pytest.mark.usefixtures("triton_device")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_add_up_what_others_copy_to_them(size: int) -> None:
    boxes = [torch.full((2 * size * 16,), EMPTY_WIDE.value, dtype=torch.int32) for _ in range(size)]
    landings = [
        torch.zeros(copied_sums.FLAGS + (size - 1) * 8 * HIDDEN, dtype=torch.int32)
        for _ in range(size)
    ]
    for memory in (*boxes, *landings):
        memory.share_memory_()
    processes.start_processes(copy, (boxes, landings), nprocs=size, start_method="fork")


def meet_on_cards(over_nccl: Mesh, store: Store) -> None:
    """One GPU's process."""
    mesh = memory_mesh.over_memory(over_nccl, store, DEVICE)
    for shape in ((1, 64), (33, 2880), (200, 4096), (700, 4096), (3001, 2880)):
        meet_in_a_graph(mesh, over_nccl, shape, torch.bfloat16)  # the last two not by mailboxes
    for dtype in (torch.float32, torch.float16):
        meet_in_a_graph(mesh, over_nccl, (8, 2880), dtype)


def meet_in_a_graph(
    mesh: Mesh, over_nccl: Mesh, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """What a captured graph makes of other numbers at each replay is what NCCL gathers and torch
    adds up in order."""
    from ruvon.kernels.norm import add_norm

    some, columns = shape[0] // 2 + 1, shape[1]
    x, residual = (numbers(each, 0, *shape, dtype).to(DEVICE) for each in (mesh.rank, 7))
    widths = [columns - 5 * rank for rank in range(mesh.size)]
    norm: tuple[Any, ...] = (torch.rand(columns, device=DEVICE) + 0.5, None, EPS)

    def product(x: Tensor, y: Tensor | None = None) -> Tensor:
        return x.clone() if y is None else y.copy_(x)

    def calls() -> list[Any]:
        assert mesh.add_norm is not None
        return [
            mesh.add_norm(mesh.multiply(product, x, columns), residual, *norm),
            mesh.reduce(x.clone()),
            mesh.add_norm(x.clone(), residual, *norm),
            mesh.add_norm(x[:some].clone(), None, *norm),
            mesh.gather(x[:, : widths[mesh.rank]], widths),
        ]

    calls()  # kernels are compiled, and NCCL finds the others
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [*calls(), *calls()]
    for step in range(5):
        x.copy_(numbers(mesh.rank, step, *shape, dtype))
        graph.replay()
        total = over_nccl.reduce(torch.where(x.abs() < 1e-38, 0, x))
        summed = add_norm(total, residual, *norm)
        wanted = [summed, total, summed, add_norm(total[:some], None, *norm)]
        wanted.append(over_nccl.gather(x[:, : widths[mesh.rank]], widths))
        for got, want in zip(made, wanted * 2, strict=True):
            torch.testing.assert_close(got, want, atol=1e-38, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_cards_add_up_in_order_whatever_the_graph_is_replayed_with(tmp_path: Path, size) -> None:
    if size > CARDS:
        pytest.skip(f"needs {size} GPUs")
    on_cards(size, tmp_path, meet_on_cards)

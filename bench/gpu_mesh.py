"""What it costs GPUs to meet, within a CUDA graph: sums, with the norm behind them, and logits.

    python bench/gpu_mesh.py [--ranks 2] [--columns 4096] [--vocab 128256]

Microseconds a call of bfloat16 rows (of logits, float32), medians of 20 replays of 40 calls in a
row: through mailboxes (`ruvon.kernels.all_reduce`) or as copies (`ruvon.kernels.copied_sums`), over
NCCL, and torch's own kernels on symmetric memory. A norm is that of the sum and a residual. What we
make is compared with what NCCL gathers and torch adds up in order: the same bits. For many rows,
also a product by as many columns in front, its sum and the norm.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cards import DEVICE, on_cards
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from ruvon.kernels.memory_mesh import over_memory
from ruvon.kernels.mesh import Mesh, process_group_mesh
from ruvon.kernels.norm import add_norm

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MANY = 512  # rows from which on products are measured
LOGITS = (1, 8, 16, 32, 128, 256)
EPS = 1e-5


def microseconds(call: Callable[[], object], calls: int = 40, replays: int = 20) -> float:
    """Of one call among many in a graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[3:])


def torch_sums(store: Any, rank: int, size: int, count: int) -> list[Callable[[Tensor], Tensor]]:
    """torch's kernels, of the first of ``count`` numbers in memory of their own."""
    name = "bench"
    group = dist.ProcessGroup(store, rank, size)
    c10d._register_process_group(name, group)
    device = torch.device("cuda", torch.cuda.current_device())
    memory = c10d._SymmetricMemory.empty_strided_p2p((count,), (1,), torch.bfloat16, device, name)
    c10d._SymmetricMemory.rendezvous(memory, name)
    ops: Any = torch.ops.symm_mem
    return [
        lambda x, op=op: op(memory[: x.numel()], "sum", name)
        for op in (ops.one_shot_all_reduce, ops.two_shot_all_reduce_)
    ]


def run(mesh: Mesh, size: int, columns: int, vocab: int, path: str) -> None:
    """What rank 0 prints; the others take part."""
    store = dist.FileStore(path, size)
    make = partial(process_group_mesh, rank=mesh.rank, size=size, device=DEVICE)
    nccl, ordered = (
        make(dist.PrefixStore(str(in_order), store), in_order=in_order)
        for in_order in (False, True)
    )
    direct = over_memory(nccl, dist.PrefixStore("memory", store), DEVICE)
    own = torch_sums(dist.PrefixStore("torch", store), mesh.rank, size, ROWS[-1] * columns)
    tell: Callable[..., object] = print if mesh.rank == 0 else str
    tell(
        "| rows | KB | sum | and norm | NCCL | and norm | torch one-shot | two-shot "
        "| product, sum, norm | NCCL |"
    )
    tell("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for rows in ROWS:
        x = torch.randn(rows, columns, device=DEVICE).bfloat16()
        assert torch.equal(direct.reduce(x.clone()), ordered.reduce(x))
        tell(f"| {rows} | {x.nbytes / 1024:.0f} | {sums(x, direct, nccl, own)} |")
    tell("\n| rows of logits | KB of a rank | gathered | NCCL |\n|---:|---:|---:|---:|")
    for rows in LOGITS:
        x, widths = torch.randn(rows, vocab // size, device=DEVICE), [vocab // size] * size
        assert torch.equal(direct.gather(x, widths), nccl.gather(x, widths))
        times = [microseconds(partial(each.gather, x, widths), 10) for each in (direct, nccl)]
        tell(f"| {rows} | {x.nbytes / 1024:.0f} | {times[0]:.1f} | {times[1]:.1f} |")


def sums(x: Tensor, direct: Mesh, nccl: Mesh, own: list[Callable[[Tensor], Tensor]]) -> str:
    """The times of a row of the table."""
    assert direct.add_norm is not None
    norm = (torch.randn_like(x), torch.ones(x.shape[1], device=DEVICE), None, EPS)
    weight, ours = torch.randn(x.shape[1], x.shape[1], device=DEVICE).bfloat16(), direct.add_norm

    def product(x: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.mm(x, weight, out=y)

    calls: list[Callable[[], object]] = [
        partial(direct.reduce, x),
        partial(ours, x, *norm),
        partial(nccl.reduce, x),
        lambda: add_norm(nccl.reduce(x), *norm, True),
        *[partial(each, x) for each in own],
    ]
    if len(x) >= MANY:
        other = torch.randn_like(x)  # for sums over NCCL take the place of x, and grow
        calls.append(lambda: ours(direct.multiply(product, other, len(weight)), *norm))
        calls.append(lambda: add_norm(nccl.reduce(product(other)), *norm, True))
    return " | ".join(f"{microseconds(call):.1f}" for call in calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = (args.ranks, args.columns, args.vocab, str(Path(folder) / "store"))
        on_cards(args.ranks, "nccl", run, *given)


if __name__ == "__main__":
    main()

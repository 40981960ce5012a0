"""What it costs ranks to meet: sums and gathered logits, over gloo between processes of this
machine. Between its GPUs: bench/gpu_mesh.py.

    python bench/mesh.py [--ranks 2,4] [--repeats 200]

Microseconds a call, the median over its repeats of the slowest rank, for float32. Ranks check that
what they hold is the same to the last bit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from ruvon.kernels.mesh import Mesh, process_group_mesh

SUMS = ((1, 576), (1, 4096), (8, 4096), (32, 4096), (128, 4096), (512, 4096))
LOGITS = ((1, 50_257), (8, 128_256))


def measure(call: Callable[[], Tensor], repeats: int) -> list[float]:
    """Seconds of each call, after some that do not count."""
    took = []
    for _ in range(repeats + repeats // 4):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return took[-repeats:]


def run(rank: int, size: int, path: str, repeats: int, out: str) -> None:
    """What rank 0 prints; the others take part."""
    torch.set_num_threads(1)
    mesh = process_group_mesh(dist.FileStore(path, size), rank=rank, size=size)
    lines = []
    with torch.inference_mode():
        for rows, columns in SUMS:
            x = torch.randn(rows, columns)
            lines.append(line_of("sum", x, mesh.reduce, mesh, repeats))
        for rows, columns in LOGITS:
            widths = [columns // size] * size
            x = torch.randn(rows, widths[rank])
            lines.append(line_of("logits", x, partial(mesh.gather, widths=widths), mesh, repeats))
    if rank == 0:
        Path(out).write_text("\n".join(lines))
    mesh.close()


def line_of(
    name: str, x: Tensor, call: Callable[[Tensor], Tensor], mesh: Mesh, repeats: int
) -> str:
    """A row of the table. What is made may be x itself, filled, so each call gets a copy."""
    own = measure(lambda: call(x.clone()), repeats)
    took = mesh.gather(torch.tensor([own]), [repeats] * mesh.size)
    slowest = took.view(mesh.size, repeats).amax(0).tolist()
    made = call(x.clone())
    digest = torch.stack((made.double().sum(), made.double().abs().max())).view(1, 2)
    all_digests = mesh.gather(digest, [2] * mesh.size).view(mesh.size, 2)
    assert (all_digests == all_digests[0]).all(), "ranks differ"
    size = x.numel() * x.itemsize
    median = statistics.median(slowest)
    return (
        f"| {mesh.size} | {name} | {x.shape[0]} | {x.shape[1]} | {size:,} | {median * 1e6:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", default="2", type=lambda text: [*map(int, text.split(","))])
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    print("| ranks | what | rows | columns of a rank | bytes of a rank | us |")
    print("|---:|---|---:|---:|---:|---:|")
    for size in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            store, out = Path(folder) / "store", Path(folder) / "lines"
            given = (size, str(store), args.repeats, str(out))
            processes.spawn(run, given, nprocs=size)
            print(out.read_text())


if __name__ == "__main__":
    main()

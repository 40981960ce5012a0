"""Time a GPU's products of few rows by tile, beside cuBLAS and beside what the memory allows.

    python bench/gpu_tiles.py [--models gpt2,8b] [--formats dense,int8,int4] [--rows 1,8,64]

What `ruvon.kernels.tiles` chooses is marked with a star. Each product runs in a CUDA graph over
several copies of its weight, so that L2 holds none of it; the floor is its bytes over the bandwidth
of a copy measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu import DEVICE
from gpu_kernels import measure_ceilings, normal, seconds, spread
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ruvon.kernels.codes import pack_codes
from ruvon.kernels.gemv import gemv
from ruvon.kernels.linear import choose_kernel
from ruvon.kernels.matmul import Tile, matmul
from ruvon.kernels.ops import Activation, Packed, Quantized
from ruvon.kernels.split_k import SPLIT_K_PROGRAMS, Workspace, make_workspace


class Product(NamedTuple):
    outputs: int
    columns: int
    kind: str = ""  # gated, or a head, whose results are float32


PRODUCTS = {
    "gpt2": (Product(2304, 768), Product(768, 768), Product(3072, 768), Product(768, 3072),
             Product(50257, 768, "head")),
    "xl": (Product(4800, 1600), Product(1600, 1600), Product(6400, 1600), Product(1600, 6400),
           Product(50257, 1600, "head")),
    "1b": (Product(3072, 2048), Product(2048, 2048), Product(16384, 2048, "gated"),
           Product(2048, 8192)),
    "8b": (Product(6144, 4096), Product(4096, 4096), Product(28672, 4096, "gated"),
           Product(4096, 14336), Product(128256, 4096, "head")),
    "qwen3-0.6b": (Product(4096, 1024), Product(1024, 2048), Product(6144, 1024, "gated"),
                   Product(1024, 3072), Product(151936, 1024, "head")),
    "gpt-oss": (Product(5120, 2880), Product(2880, 4096), Product(128, 2880),
                Product(201088, 2880, "head")),
    "gpt-oss/2": (Product(2560, 2880), Product(2880, 2048)),
}  # fmt: skip
TILES = (  # outputs, columns, stages, warps, whether the weight is the side that takes 64
    (64, 64, 8, 4, True), (64, 128, 4, 4, True), (64, 128, 6, 4, True), (64, 256, 3, 4, True),
    (128, 64, 6, 8, True), (128, 128, 3, 8, True), (32, 128, 4, 4, False), (16, 256, 4, 4, False),
    (128, 64, 4, 8, False),
)  # fmt: skip


def tiles(rows: int, product: Product, dense: bool) -> Iterator[Tile]:
    """Those that may serve so many rows."""
    across = next(size for size in (16, 32, 64, 128) if rows <= size or size == 128)
    for outputs, columns, stages, warps, swap in TILES:
        if not swap and (not dense or across == 32):
            continue
        programs = -(-product.outputs // outputs)
        for split_k in (1, 2, 4):
            splits = product.kind != "gated" and across <= 64 and product.columns >= 512 * split_k
            if split_k == 1 or (
                splits and programs * split_k <= SPLIT_K_PROGRAMS and outputs < 128
            ):
                yield Tile(across, outputs, columns, stages, split_k, warps, swap)


def make_weight(product: Product, kind: str) -> Packed:
    n, k = product.outputs, product.columns
    if kind == "dense":
        return Packed("dense", (n, k), (normal(n, k),))
    bits = 8 if kind == "int8" else 4
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=DEVICE).view(torch.int8)
    scales = torch.full((n, k // 32), 0.01, device=DEVICE).half()
    offsets = -8 * scales if bits == 4 else None
    return pack_codes(Quantized(codes, scales, offsets, 32, 8 if bits == 8 else 4), DEVICE)


def times(
    run: Callable[[int, Tile], object], copies: int, choices: list[Tile]
) -> dict[Tile, float]:
    """Seconds of each tile that fits a multiprocessor."""
    found = {}
    for tile in choices:
        try:
            found[tile] = seconds(lambda i: run(i, tile), copies)  # noqa: B023
        except OutOfResources:
            continue
    return found


def measure(product: Product, kind: str, rows: int, workspace: Workspace) -> tuple[float, str]:
    """(bytes, a line of the table but for its share)."""
    n, k = product.outputs, product.columns
    weights = [make_weight(product, kind)]
    num_bytes = sum(tensor.nbytes for tensor in weights[0].tensors)
    weights += [make_weight(product, kind) for _ in range(spread(num_bytes) - 1)]
    gated, head = product.kind == "gated", product.kind == "head"
    activation: Activation = "silu_gated" if gated else "none"
    dtype, x = torch.float32 if head else torch.bfloat16, normal(rows, k)

    def run(i: int, tile: Tile) -> Tensor:
        return matmul(x, weights[i], None, activation, dtype, workspace, True, tile)

    chosen = choose_kernel(rows, weights[0], gated, torch.bfloat16, scores=head)
    choices = list(tiles(rows, product, kind == "dense"))
    if isinstance(chosen, Tile) and chosen not in choices:
        choices.append(chosen)
    found = sorted(times(run, len(weights), choices).items(), key=lambda item: item[1])
    line = [f"{took * 1e6:.1f} {name(tile)}{'*' * (tile == chosen)}" for tile, took in found[:3]]
    if isinstance(chosen, int):
        took = seconds(
            lambda i: gemv(x, None, None, weights[i], None, activation, dtype, True), len(weights)
        )
        line.insert(0, f"{took * 1e6:.1f} gemv*")
    if kind == "dense" and not head:
        took = seconds(lambda i: F.linear(x, weights[i].tensors[0]), len(weights))
        line.append(f"cuBLAS {took * 1e6:.1f}")
    return num_bytes, f"| {n} x {k} {product.kind} {kind} | {rows} | {' | '.join(line)}"


def name(tile: Tile) -> str:
    shape = f"{tile.rows}x{tile.outputs}x{tile.columns}"
    return f"{shape} {tile.stages} stages, {tile.split_k} splits" + (
        "" if tile.swap else ", turned"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(PRODUCTS))
    parser.add_argument("--formats", default="dense,int8,int4")
    parser.add_argument("--rows", default="1,8,32,64,128")
    args = parser.parse_args()
    workspace = make_workspace(DEVICE)
    with torch.inference_mode():
        bandwidth = measure_ceilings().bandwidth
        for product in (product for model in args.models.split(",") for product in PRODUCTS[model]):
            for kind in args.formats.split(","):
                for rows in map(int, args.rows.split(",")):
                    num_bytes, line = measure(product, kind, rows, workspace)
                    print(f"{line} | floor {num_bytes / bandwidth * 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()

"""A mesh of one machine's GPUs that meet in each other's memory rather than over NCCL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ruvon.kernels.all_gather import gather_ranks, most_rows
from ruvon.kernels.all_reduce import fits, sum_add_norm, sum_ranks
from ruvon.kernels.copied_sums import MOST_RANKS, CopiedSums, share_landing
from ruvon.kernels.mailboxes import Mailboxes, share_mailboxes
from ruvon.kernels.mesh import Mesh, Product, Store
from ruvon.kernels.norm import Norm, add_norm
from ruvon.kernels.pdl import supports_pdl

GATHERED_BYTES = 16 << 20  # of a rank: beyond that NCCL is as fast


def over_memory(mesh: Mesh, store: Store, device: torch.device) -> Mesh:
    """The same mesh, whose ranks are GPUs of one machine: few rows go through mailboxes, and the
    sums of many as copies, where two add up.

    If any GPU does not reach the memory of all others, none of them can: raises RuntimeError on
    all ranks.
    """
    if mesh.size == 1:
        return mesh
    shared, error = None, None
    if _on_all(mesh, device, _reaches_all()):  # or some would wait for others below
        try:
            shared = _share(mesh, store)
        except RuntimeError as caught:
            error = caught
    if not _on_all(mesh, device, shared is not None) or shared is None:
        raise RuntimeError("some GPU does not reach the memory of all others") from error
    return _through(mesh, *shared, supports_pdl(device))


def _reaches_all() -> bool:
    own, count = torch.cuda.current_device(), torch.cuda.device_count()
    others = (other for other in range(count) if other != own)
    return all(torch.cuda.can_device_access_peer(own, other) for other in others)


def _share(mesh: Mesh, store: Store) -> tuple[Mailboxes, CopiedSums | None]:
    rank, size, name = mesh.rank, mesh.size, f"ruvon-stage{mesh.stage}"
    boxes = share_mailboxes(_within(store, name), name, rank, size)
    if size > MOST_RANKS:
        return boxes, None
    name += "-landing"
    return boxes, CopiedSums(boxes, share_landing(_within(store, name), name, rank, size))


def _within(store: Store, name: str) -> Store:
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def _on_all(mesh: Mesh, device: torch.device, true: bool) -> bool:
    """Whether it is true on every rank."""
    return bool(mesh.reduce(torch.full((1, 1), float(true), device=device)).item() == mesh.size)


def _through(mesh: Mesh, boxes: Mailboxes, copied: CopiedSums | None, pdl: bool) -> Mesh:
    def copies(x: Tensor, width: int) -> CopiedSums | None:
        """Where sums of as many rows of ``width`` are copies."""
        fit = copied is not None and copied.fits(len(x), width, x.itemsize)
        return copied if fit and not fits(len(x), width, x.itemsize, boxes) else None

    def multiply(product: Product, x: Tensor, width: int) -> Tensor:
        if sums := copies(x, width):
            return sums.multiply(product, x, width)
        return product(x)

    def reduce(x: Tensor) -> Tensor:
        if sums := copies(x, x.shape[1]):
            return sums.add(x)[1]
        fit = fits(len(x), x.shape[1], x.itemsize, boxes)
        return sum_ranks(x, boxes, pdl) if fit else mesh.reduce(x)

    def sum_norm(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        if sums := copies(x, x.shape[1]):
            return sums.add(x, residual, Norm(weight, bias, eps))
        if fits(len(x), x.shape[1], x.itemsize, boxes):
            return sum_add_norm(x, residual, weight, bias, eps, boxes, pdl)
        return add_norm(mesh.reduce(x), residual, weight, bias, eps, pdl)

    def gather(x: Tensor, widths: Sequence[int]) -> Tensor:
        num_bytes = len(x) * max(widths) * x.itemsize
        if 0 < num_bytes <= GATHERED_BYTES and most_rows(widths, x.itemsize, boxes):
            return gather_ranks(x, widths, boxes, pdl)
        return mesh.gather(x, widths)

    return replace(mesh, reduce=reduce, gather=gather, multiply=multiply, add_norm=sum_norm)

"""The ranks that run one model between them, as one of them sees them.

A model is given a `Mesh` as it is given `Ops`, and calls its functions wherever ranks have to meet:
``reduce`` behind a product of which each rank holds some columns, ``gather`` behind one of which
each holds some rows, ``send`` and ``receive`` between stages. A mesh of one, `ALONE`, is no special
case: there the same functions give back what they are given.

``stages`` times ``size`` processes are a grid. Rank ``r`` of stage ``s`` is number ``s * size + r``
of all; it meets the other ranks of its stage in every layer, and rank ``r`` of the stages before
and behind its own once a step.

Sums are added up in the order of ranks, on every rank, so all hold the same bits and whatever
follows from them (routes, sampled tokens) is the same everywhere without being sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

ADDRESS = "127.0.0.1"
TIMEOUT = timedelta(seconds=300)
"""Ranks wait that long for one another: kernels may be compiled on one of them meanwhile."""

Store: TypeAlias = Any
"""A `torch.distributed.Store`; torch's stubs do not export it, nor most of what follows."""

Group: TypeAlias = Any
"""A `ProcessGroupGloo` or a `ProcessGroupNCCL`."""

Product: TypeAlias = Callable[..., Tensor]
"""x_TK → y_TN, whose rows do not depend on each other; or (x_TK, y_TN), and y is filled."""


def _same(x: Tensor) -> Tensor:
    return x


def _only_part(x: Tensor, widths: Sequence[int]) -> Tensor:
    return x


def _at_once(product: Product, x_TK: Tensor, width: int) -> Tensor:
    return product(x_TK)


def _no_stage(ids_T: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    raise AssertionError("there is no stage before this one")


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Mesh:
    """One rank's place, and how it meets the others. All of them call the same functions in the
    same order."""

    rank: int = 0  # among the ranks of its stage, which share every layer of it
    size: int = 1
    stage: int = 0
    stages: int = 1

    reduce: Callable[[Tensor], Tensor] = _same
    """x → the sum of the x of all ranks of this stage: the same bits on each. May be x itself,
    filled."""

    gather: Callable[[Tensor, Sequence[int]], Tensor] = _only_part
    """(x [T, my width], the widths of all ranks) → [T, their sum], in the order of ranks."""

    send: Callable[[Tensor], Tensor] = _same
    """x_TC → x_TC, which is on its way to the next stage. It may be changed afterwards."""

    receive: Callable[[Tensor, int, torch.dtype], Tensor] = _no_stage
    """(ids_T, C, dtype) → x_TC, what the stage before has sent; as many rows as ids, where they
    lie."""

    multiply: Callable[[Product, Tensor, int], Tensor] = _at_once
    """(product, x_TK, N) → the product of x [T, N], of which the next call here is to make the sum:
    for ranks that send each other some rows while they multiply the next."""

    add_norm: Callable[..., tuple[Tensor, Tensor]] | None = None
    """(x_TC, residual_TC or None, norm weight, norm bias or None, eps) → (normed, s + residual),
    where s is what ``reduce`` makes of x: for ranks that do it in one launch. None: two calls."""

    close: Callable[[], None] = _nothing
    """Lets go of the others. Nothing is called afterwards."""

    @property
    def is_first(self) -> bool:
        """Whether steps begin here, with token ids."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether steps end here, with logits."""
        return self.stage == self.stages - 1


ALONE = Mesh()


def process_group_mesh(
    store: Store,
    *,
    rank: int,
    size: int,
    stage: int = 0,
    stages: int = 1,
    device: torch.device = torch.device("cpu"),  # noqa: B008, a constant
    in_order: bool = True,
    address: str = ADDRESS,
    timeout: timedelta = TIMEOUT,
) -> Mesh:
    """A mesh over torch.distributed: NCCL where ``device`` is a GPU, else gloo. Blocks until all
    ranks have called it.

    Nothing of torch's process-wide state is touched: no default group is made, so one process may
    hold several ranks, each in a thread of its own.

    Args:
        store: where all ranks find each other: the same ``TCPStore``, ``FileStore`` or (of threads)
            ``HashStore``. It must outlive the mesh.
        in_order: whether a GPU's sums are added up in the order of ranks as well, so that a row's
            bits do not depend on how many rows there are. NCCL's own order is faster for many.
        address: of this machine, on which gloo listens for the other ranks.
        timeout: after which a call that some rank has not joined raises.

    Calls raise RuntimeError when a rank that they wait for is gone.
    """
    beside, along = (
        _group(_within(store, name), at, count, device, address, timeout)
        for name, at, count in (
            (f"stage{stage}", rank, size),
            (f"rank{rank}", stage, stages),
        )
    )
    ranks, chain = _Ranks(beside, size, in_order or device.type == "cpu"), _Chain(along, stage)

    def close() -> None:
        for peers in (ranks, chain):
            if peers.group is not None:
                peers.group.shutdown()
            peers.group = None  # the last reference holds the connections

    return Mesh(
        rank=rank,
        size=size,
        stage=stage,
        stages=stages,
        reduce=_same if beside is None else ranks.reduce,
        gather=_only_part if beside is None else ranks.gather,
        send=_same if stage == stages - 1 else chain.send,
        receive=_no_stage if stage == 0 else chain.receive,
        close=close,
    )


def _within(store: Store, name: str) -> Store:
    """The same store, for keys of one group."""
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def _group(
    store: Store, rank: int, size: int, device: torch.device, address: str, timeout: timedelta
) -> Group | None:
    if size == 1:
        return None
    if device.type == "cuda":
        nccl: Any = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    gloo._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, gloo)


class _Ranks:
    """The ranks of one stage."""

    def __init__(self, group: Group | None, size: int, in_order: bool) -> None:
        self.group = group
        self._size = size
        self._in_order = in_order

    def reduce(self, x: Tensor) -> Tensor:
        assert self.group is not None
        if not self._in_order:
            self.group.allreduce([x]).wait()
            return x
        parts = self._all(x.contiguous())
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        return total.to(x.dtype)

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        widest = max(widths)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
        parts = zip(self._all(padded.contiguous()), widths, strict=True)
        return torch.cat([part[..., :width] for part, width in parts], dim=-1)

    def _all(self, x: Tensor) -> Sequence[Tensor]:
        """Every rank's x."""
        assert self.group is not None
        rows, *rest = x.shape
        parts = x.new_empty(self._size * rows, *rest)
        self.group._allgather_base(_bytes(parts), _bytes(x)).wait()
        return parts.chunk(self._size) if rows else [x] * self._size


class _Chain:
    """The same rank of all stages."""

    def __init__(self, group: Group | None, stage: int) -> None:
        self.group = group
        self._stage = stage
        self._on_its_way: tuple[Any, Tensor] | None = None

    def send(self, x_TC: Tensor) -> Tensor:
        assert self.group is not None
        if x_TC.is_cuda:  # waits on the device, where a graph may hold it
            self.group.send([_bytes(x_TC.contiguous())], self._stage + 1, 0).wait()
            return x_TC
        if self._on_its_way is not None:  # one at a time: whoever sends faster waits here
            self._on_its_way[0].wait()
        kept = x_TC.contiguous().clone()
        self._on_its_way = self.group.send([_bytes(kept)], self._stage + 1, 0), kept
        return x_TC

    def receive(self, ids_T: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        assert self.group is not None
        x_TC = torch.empty(ids_T.shape[0], width, dtype=dtype, device=ids_T.device)
        self.group.recv([_bytes(x_TC)], self._stage - 1, 0).wait()
        return x_TC


def _bytes(x: Tensor) -> Tensor:
    """Bits are moved, whatever they mean."""
    return x.view(torch.uint8)

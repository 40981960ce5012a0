"""A mesh's functions, with ranks that are threads of this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cards import DEVICE, on_cards
from meshes import on_ranks
from torch import Tensor

from ruvon.kernels.mesh import ALONE, Mesh, Store


def numbers(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(5, 7, generator=generator) * 10.0**rank).to(dtype)


def test_alone_gives_back_what_it_is_given() -> None:
    x = numbers(0)
    assert ALONE.is_first
    assert ALONE.is_last
    assert ALONE.reduce(x) is x
    assert ALONE.gather(x, (7,)) is x
    assert ALONE.send(x) is x
    assert torch.equal(ALONE.multiply(torch.t, x, 5), x.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_added_up_in_the_order_of_ranks(dtype: torch.dtype) -> None:
    wide = [numbers(rank, dtype).float() for rank in range(3)]
    expected = (wide[0] + wide[1] + wide[2]).to(dtype)
    assert not torch.equal(expected, (wide[2] + wide[1] + wide[0]).to(dtype)) or dtype.itemsize == 2
    for total in on_ranks(3, 1, lambda mesh: mesh.reduce(numbers(mesh.rank, dtype))):
        assert torch.equal(total, expected)


def test_parts_of_unequal_widths_are_gathered() -> None:
    widths = (2, 7, 0)
    expected = torch.cat([numbers(rank)[:, :width] for rank, width in enumerate(widths)], dim=1)
    for whole in on_ranks(
        3, 1, lambda mesh: mesh.gather(numbers(mesh.rank)[:, : widths[mesh.rank]], widths)
    ):
        assert torch.equal(whole, expected)


def test_a_grid_reduces_within_stages_and_sends_between_them() -> None:
    ids = torch.zeros(5, dtype=torch.int32)

    def expected(step: int, stages: int) -> Tensor:
        return numbers(step) * 2.0**stages

    def run(mesh: Mesh) -> Tensor:
        results = []
        for step in range(3):
            x = numbers(step) if mesh.is_first else mesh.receive(ids, 7, torch.float32)
            x = mesh.reduce(x)
            results.append(x.clone())
            mesh.send(x).mul_(0)
        return torch.stack(results)

    for number, results in enumerate(on_ranks(2, 3, run)):
        stage = number // 2
        for step in range(3):
            assert torch.equal(results[step], expected(step, stage + 1))


def test_who_waits_for_a_rank_that_has_left_is_told() -> None:
    def work(mesh: Mesh) -> Tensor:
        x = mesh.reduce(numbers(0))
        if mesh.rank == 1:
            mesh.close()
            return x
        with pytest.raises(RuntimeError):
            mesh.reduce(x)
        return x

    on_ranks(2, 1, work)


def meet_in_a_graph(mesh: Mesh, store: Store) -> None:
    """One rank's process: a sum and a gathering, captured once and replayed with other numbers."""
    x, widths, rank = numbers(0, torch.bfloat16).to(DEVICE), (7, 3), mesh.rank
    for _ in range(2):  # connections are made at the first call, which no graph may hold
        mesh.gather(mesh.reduce(x.clone())[:, : widths[rank]], widths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = mesh.reduce(x.clone())
        whole = mesh.gather(total[:, : widths[rank]], widths)
    for step in range(3):
        x.copy_(numbers(rank + step, torch.bfloat16))
        graph.replay()
        parts = [numbers(each + step, torch.bfloat16).float() for each in range(2)]
        expected = (parts[0] + parts[1]).bfloat16()
        assert torch.equal(total.cpu(), expected)
        assert torch.equal(whole.cpu(), torch.cat((expected, expected[:, :3]), dim=1))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("in_order", [True, False])
def test_gpus_meet_within_a_graph(tmp_path: Path, in_order: bool) -> None:
    on_cards(2, tmp_path, meet_in_a_graph, in_order=in_order)

"""Models whose ranks add up by copies, as GPUs do with many rows, here in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_gpt_oss
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from test_shares import WIDE, run
from tiny import load, make_reference
from torch import Tensor

pytest.importorskip("triton")  # which is not on every platform

from ruvon.kernels import copied_sums, memory_mesh
from ruvon.kernels.copied_sums import CopiedSums, make_landing
from ruvon.kernels.mailboxes import EMPTY_WIDE, make_mailboxes
from ruvon.kernels.mesh import process_group_mesh

HIDDEN = 64
ROWS = 64  # at most


def compute(rank: int, folder: str, memory: list[list[Tensor]], expected: list[Tensor]) -> None:
    """One rank's process."""
    torch.set_num_threads(1)
    memory_mesh.fits = lambda *_: False  # mailboxes
    copied_sums.PART_BYTES, copied_sums.LINES = 8 * 4 * HIDDEN, 2
    boxes, landings = memory
    mail = make_mailboxes(rank, boxes, programs=1)
    store = dist.FileStore(f"{folder}/store", 2)
    gloo = process_group_mesh(store, rank=rank, size=2)
    mesh = memory_mesh._through(gloo, mail, CopiedSums(mail, make_landing(landings)), pdl=False)
    for step, one in zip(run(load(Path(folder), mesh=mesh)), expected, strict=True):
        torch.testing.assert_close(step, one, atol=1e-5, rtol=0)
    gloo.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's programs wait for no other process")
@pytest.mark.usefixtures("triton_device")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_ranks_that_copy_compute_what_one_does(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    if name == "gpt-oss":
        tiny_gpt_oss.save_gpt_oss(tmp_path)
    else:
        make_reference(name, **WIDE).save_pretrained(tmp_path)
    expected = run(load(tmp_path))
    boxes = [torch.full((64,), EMPTY_WIDE.value, dtype=torch.int32) for _ in range(2)]
    words = copied_sums.FLAGS + ROWS * HIDDEN
    landings = [torch.zeros(words, dtype=torch.int32) for _ in range(2)]
    for part in (*boxes, *landings, *expected):
        part.share_memory_()
    given = (str(tmp_path), [boxes, landings], expected)
    processes.start_processes(compute, given, nprocs=2, start_method="fork")

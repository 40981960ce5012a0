"""Compiled CPU kernels, and tables of Triton's, shared by all tests here."""

import pytest
import torch

from ruvon.kernels.cpu import CpuKernels
from ruvon.kernels.cpu.isa import supported
from ruvon.kernels.reference import make_torch_ops

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if GPU else [torch.float32]


@pytest.fixture(scope="session")
def cpu():
    kernels = CpuKernels(threads=2)
    yield kernels
    kernels.close()


@pytest.fixture(scope="session")
def portable():
    """The kernels as they are on a CPU without dot products, on one thread."""
    kernels = CpuKernels(threads=1, isa="portable")
    yield kernels
    kernels.close()


@pytest.fixture(scope="session", params=[isa.name for isa in supported()[1:]])
def lesser(request):
    """The kernels under each other instruction set that this CPU can run, on one thread."""
    kernels = CpuKernels(threads=1, isa=request.param)
    yield kernels
    kernels.close()


@pytest.fixture(scope="session")
def reference():
    return make_torch_ops(torch.float32, torch.device("cpu"))


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    """What Triton's kernels compute in; the interpreter has float32 only."""
    return request.param


@pytest.fixture
def ops(dtype):
    from ruvon.kernels.triton_ops import make_triton_ops  # triton is not on every platform

    return make_triton_ops(dtype, torch.device("cuda" if GPU else "cpu"))


@pytest.fixture
def seeded():
    torch.manual_seed(0)

"""The kernels on emulated Arm CPUs against those of the machine that we are on: the same bits."""

import pytest
import torch
from cpu_models import Prompts, random_mxfp4, random_quantized
from emulated import CPUS, MISSING, Emulator, build, run
from test_cpu_graph import SHAPES, capture
from test_cpu_ops import FORMATS

from ruvon.kernels import cpu as package
from ruvon.kernels.cpu import CpuKernels, isa
from ruvon.kernels.cpu.isa import ISAS, LINUX_WORDS, choose, linux_products
from ruvon.kernels.ops import Dense

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")

QUANTIZED = [
    *(("i8mm", name) for name in ("q4_1", "q4_0", "q5_k", "q6_k", "q8_0")),
    *(("dotprod", name) for name in ("q4_0", "q8_0")),
    ("portable", "q8_0"),
]
DENSE = [("i8mm", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
MODELS = [("i8mm", name) for name in ("qwen3, windowed", "mixture")]


@pytest.fixture(scope="module")
def arm(request, tmp_path_factory):
    """The kernels under the instruction set that the test names."""
    (chosen,) = (each for each in ISAS if each.name == request.param)
    emulator = Emulator(chosen, tmp_path_factory.mktemp("arm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "choose", lambda _: chosen)
        patch.setattr(package, "Compiled", lambda _, cores: emulator)
        patch.setattr(package, "ThreadPool", lambda *_: emulator)
        return CpuKernels(threads=1)


def assert_same(cpu, arm, weight, columns):
    """Products with a weight of 64 rows, and what can stand behind a product, on either machine."""
    packed, bias = [kernels.ops.pack(weight) for kernels in (cpu, arm)], torch.randn(64)
    for rows in (1, 7):
        x = torch.randn(rows, columns) * 10
        x[rows // 2, 32:64] = 0  # a group without a largest value
        expected = cpu.ops.linear(x, packed[0], bias, "silu_gated")
        assert torch.equal(arm.ops.linear(x, packed[1], bias, "silu_gated"), expected)


@pytest.mark.parametrize(("arm", "name"), QUANTIZED, indirect=["arm"])
def test_quantized_linear(cpu, arm, name):
    torch.manual_seed(0)
    assert_same(cpu, arm, random_quantized(64, 256, **FORMATS[name]), 256)


@pytest.mark.parametrize("arm", CPUS, indirect=True)
def test_4_bit_floats(cpu, arm):
    torch.manual_seed(0)
    assert_same(cpu, arm, random_mxfp4(64, 96), 96)


@pytest.mark.parametrize(("arm", "dtype"), DENSE, indirect=["arm"])
def test_dense_linear(portable, arm, dtype):
    torch.manual_seed(0)
    assert_same(portable, arm, Dense(torch.randn(64, 96).to(dtype)), 96)


@pytest.mark.parametrize(("arm", "name"), MODELS, indirect=["arm"])
def test_whole_model(cpu, arm, name):
    batch = Prompts([30, 4]).batch((0, 0, 30), (1, 0, 4))
    expected = capture(cpu, SHAPES[name]).replay(batch).clone()
    assert torch.equal(capture(arm, SHAPES[name]).replay(batch), expected)


WORD = """
#include <stdio.h>
#include <stdlib.h>
#include <sys/auxv.h>

int main(int argc, char **argv)
{
    printf("%lu", getauxval(atoi(argv[1])));
}
"""


@pytest.mark.parametrize("name", CPUS)
def test_linux_tells_which_instruction_set_is_best(tmp_path, monkeypatch, name):
    build(WORD, tmp_path / "word")
    features = linux_products(lambda kind: int(run(CPUS[name], tmp_path / "word", kind)))
    assert features.keys() == LINUX_WORDS.keys()
    monkeypatch.setattr(isa.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(isa, "host_features", lambda: features)
    assert choose(None).name == name

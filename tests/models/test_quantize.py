"""Quantizing at load, and stacking parts of different formats without loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import random_blocks, write_gguf, write_tensors
from tiny import load, make_reference
from transformers import LlamaConfig, LlamaForCausalLM

from ruvon.errors import LoadError
from ruvon.kernels.ops import Dense, Quantized, Stacked
from ruvon.models.gguf import GgufFile
from ruvon.models.quantize import SCHEMES, dequantize, stack, to_int4, to_int8
from ruvon.models.quantize_search import AT_ONCE


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(10, 96)


def test_int8_is_within_half_a_step(weight):
    packed = to_int8(Dense(weight))
    assert (packed.bits, packed.group, packed.offsets) == (8, 32, None)
    assert packed.codes_NK.abs().amax() == 127
    step = packed.scales.float().repeat_interleave(32, dim=1)
    assert ((packed.dequantize() - weight).abs() <= step * 0.51 + 1e-6).all()


class TestInt4:
    def test_form(self, weight):
        packed = to_int4(Dense(weight))
        assert (packed.bits, packed.group) == (4, 32)
        assert (packed.codes_NK.amin(), packed.codes_NK.amax()) == (0, 15)
        assert packed.scales.dtype == packed.offsets.dtype == torch.float16
        assert packed.scales.shape == packed.offsets.shape == (10, 3)

    @pytest.mark.parametrize("centre", [0.0, 3.0])
    def test_error_is_a_tenth_less_than_rounding_to_nearest(self, centre):
        groups = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0)) + centre
        least, greatest = groups.aminmax(dim=1, keepdim=True)
        step, least = ((greatest - least) / 15).half().float(), least.half().float()
        nearest = ((groups - least) / step).round().clamp(0, 15) * step + least
        before = (nearest - groups).square().sum(1)
        after = (to_int4(Dense(groups)).dequantize() - groups).square().sum(1)
        assert after.sum().sqrt() < 0.9 * before.sum().sqrt()
        assert (after <= before * 1.0001).all()

    @pytest.mark.parametrize("top", [7, 12, 15])
    def test_weights_on_a_grid_are_found_exactly(self, top):
        """Whichever of the codes it uses, from 0 up."""
        draws = torch.Generator().manual_seed(0)
        scales = (torch.rand(50, 3, 1, generator=draws) / 100 + 0.001).half().float()
        offsets = (torch.randn(50, 3, 1, generator=draws) / 10).half().float()
        codes = torch.randint(0, top + 1, (50, 3, 32), generator=draws)
        codes[..., 0], codes[..., 5] = top, 0
        weight = (codes * scales + offsets).flatten(1)
        packed = to_int4(Dense(weight))
        assert torch.equal(packed.dequantize(), weight)
        assert torch.equal(packed.codes_NK, codes.flatten(1).to(torch.int8))

    def test_groups_do_not_depend_on_others(self, weight):
        """Nor on how many are searched at once."""
        many = weight.repeat(AT_ONCE // 10, 1)
        packed, alone = to_int4(Dense(many)), to_int4(Dense(weight[-1:]))
        assert len(many) * 3 > AT_ONCE
        assert torch.equal(
            packed.dequantize()[9::10], alone.dequantize().expand(len(many) // 10, -1)
        )

    def test_quantized_weight_in_this_form_is_kept(self, weight):
        packed = to_int4(Dense(weight))
        assert to_int4(packed) is packed
        coarse = replace(packed, codes_NK=packed.codes_NK * 8, bits=8)
        assert to_int4(coarse).bits == 4


@pytest.mark.parametrize("scheme", [to_int8, to_int4])
def test_constant_groups(scheme):
    for value in (0.0, 0.25, -0.5):
        plain = torch.full((2, 32), value)
        torch.testing.assert_close(scheme(Dense(plain)).dequantize(), plain, atol=2e-4, rtol=0)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_columns_must_fill_groups(tmp_path, scheme):
    with pytest.raises(LoadError, match="40 columns are no multiple of 32"):
        SCHEMES[scheme].projection(Dense(torch.zeros(2, 40)))
    make_reference("llama2").save_pretrained(tmp_path)
    model = load(tmp_path, quantization=scheme)
    assert model.spec.hidden_size == 64


def test_error_names_the_weight(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="down of layer 0: cannot quantize: 40 columns"):
        load(tmp_path, quantization="int8")


def test_what_is_quantized(tmp_path):
    """Projections to four bits, table and head to eight, learned positions not at all."""
    reference = make_reference("gpt2-untied")
    reference.save_pretrained(tmp_path)
    model = load(tmp_path, quantization="int4")
    state = reference.state_dict()

    def values(packed):
        return packed.tensors[0]

    up = state["transformer.h.1.mlp.c_fc.weight"].T
    torch.testing.assert_close(
        values(model.layers[1].up.weight), to_int4(Dense(up)).dequantize(), atol=0, rtol=0
    )
    for packed, name in ((model.embed, "transformer.wte.weight"), (model.head, "lm_head.weight")):
        assert torch.equal(values(packed), to_int8(Dense(state[name])).dequantize())
    assert torch.equal(values(model.positions), state["transformer.wpe.weight"])


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_quantized_file_to_another_scheme(tmp_path, scheme):
    """none and int8 apply to what the file's codes mean."""
    reference = make_reference("llama2")
    write_gguf(tmp_path / "a.gguf", reference, "llama", GGMLQuantizationType.Q4_1)
    model = load(tmp_path / "a.gguf", quantization=scheme)
    down = Dense(reference.state_dict()["model.layers.0.mlp.down_proj.weight"])
    want = SCHEMES[scheme].projection(down)
    assert torch.equal(model.layers[0].down.weight.tensors[0], dequantize(want).weight_NK)


ROWS = 32  # a unit of the kernels


class TestStack:
    @pytest.fixture
    def parts(self, tmp_path):
        kinds = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
        tensors = {}
        for kind in kinds:
            blocks = 2 if kind.endswith("K") else 16
            raw = random_blocks(GGMLQuantizationType[kind], rows=ROWS, blocks=blocks)
            tensors[kind] = (raw, GGMLQuantizationType[kind])
        write_tensors(tmp_path / "x.gguf", tensors)
        file = GgufFile(tmp_path / "x.gguf")
        return {kind: file.read(kind, (ROWS, 512)) for kind in kinds}

    def test_one_format_stays_one(self, parts):
        for kind in parts:
            whole = stack([parts[kind]] * 3)
            assert isinstance(whole, Quantized)
            assert torch.equal(whole.dequantize(), parts[kind].dequantize().repeat(3, 1))
            assert whole.blocks is None or len(whole.blocks) == 3 * ROWS

    def test_formats_side_by_side_keep_their_bits(self, parts):
        """As q, k and v of a Q4_K_M file do."""
        chosen = [parts[kind] for kind in ("Q4_K", "Q4_K", "Q6_K")]
        whole = stack(chosen)
        assert isinstance(whole, Stacked)
        assert [part.bits for part in whole.parts] == [4, 6]
        assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in chosen]))

    def test_what_fills_no_unit_becomes_plain(self, parts):
        few = replace(
            parts["Q4_0"],
            codes_NK=parts["Q4_0"].codes_NK[:5],
            scales=parts["Q4_0"].scales[:5],
        )
        whole = stack([few, parts["Q8_0"]])
        assert isinstance(whole, Dense)
        want = torch.cat([few.dequantize(), parts["Q8_0"].dequantize()])
        assert torch.equal(whole.weight_NK, want)

    def test_plain_part_makes_all_plain(self, parts):
        plain = torch.randn(2, 512).half()
        whole = stack([Dense(plain), parts["Q8_0"]])
        assert isinstance(whole, Dense)
        want = torch.cat([plain.float(), parts["Q8_0"].dequantize()])
        assert torch.equal(whole.weight_NK, want)

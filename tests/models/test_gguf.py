"""GGUF: metadata and numbers as llama.cpp's own package gives them, models as transformers'."""

from __future__ import annotations

import contextlib
import random
import struct

import gguf
import numpy as np
import pytest
import tiny_gpt_oss
import torch
from gguf import GGMLQuantizationType, quants
from gguf_files import (
    SCALES_AT,
    finish,
    interleave,
    mxfp4_blocks,
    random_blocks,
    write_gguf,
    write_tensors,
)
from paged import PagedSequences
from tiny import VOCAB, load, make_reference

from ruvon.config import EngineConfig
from ruvon.engine.loading import stored_bytes
from ruvon.errors import LoadError
from ruvon.kernels.ops import Mxfp4, Quantized
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.gguf import GgufFile, rotate_half_rows
from ruvon.models.gguf_types import TYPE_NAMES
from ruvon.telemetry import silent

KINDS = {name: GGMLQuantizationType[name] for name in SCALES_AT}


@pytest.mark.parametrize("name", KINDS)
def test_quantized_types_hold_the_same_numbers(tmp_path, name):
    kind = KINDS[name]
    raw = random_blocks(kind, rows=6, blocks=2)
    write_tensors(tmp_path / "x.gguf", {"w": (raw, kind)})
    want = quants.dequantize(raw, kind)
    got = GgufFile(tmp_path / "x.gguf").read("w", want.shape)
    assert isinstance(got, Quantized)
    assert got.bits == int(name[1])
    np.testing.assert_array_equal(got.dequantize().numpy(), want)
    width = want.shape[1]
    for columns in (range(width // 2, width), range(32, width), range(8, 24)):
        # a whole block, groups and neither
        part = GgufFile(tmp_path / "x.gguf").read("w", want.shape, ([range(1, 3)], [columns]))
        assert isinstance(part, Quantized) == (columns != range(8, 24))
        if columns == range(width // 2, width):
            assert (part.blocks is None) == (got.blocks is None)  # as small as it was
        values = part.dequantize() if isinstance(part, Quantized) else part
        expected = want[1:3, columns.start : columns.stop]
        np.testing.assert_array_equal(values.numpy(), expected)


def test_mxfp4_holds_the_same_numbers(tmp_path):
    """Any codes, any scales that a float32 can have: 255 stands for no number."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (6, 8, 17), dtype=np.uint8)
    raw[..., 0] = np.resize([*range(48), *range(120, 130), 252, 253, 254], (6, 8))
    raw = raw.reshape(6, -1)
    kind = GGMLQuantizationType.MXFP4
    write_tensors(tmp_path / "x.gguf", {"w": (raw, kind)})
    got = GgufFile(tmp_path / "x.gguf").read("w", (6, 256))
    assert isinstance(got, Mxfp4)
    np.testing.assert_array_equal(got.dequantize().numpy(), quants.dequantize(raw, kind))


def test_mxfp4_blocks_are_those_of_hugging_face(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (2, 3, 4, 16), dtype=np.uint8)
    scales = rng.integers(100, 130, (2, 3, 4), dtype=np.uint8)
    raw = mxfp4_blocks(codes, scales)
    write_tensors(tmp_path / "x.gguf", {"w": (raw, GGMLQuantizationType.MXFP4)})
    got = GgufFile(tmp_path / "x.gguf").read("w", (2, 3, 128))
    np.testing.assert_array_equal(got.codes_NKB.numpy(), codes.reshape(6, 4, 16))
    np.testing.assert_array_equal(got.scales_NK.numpy(), scales.reshape(6, 4))
    cut = (None, [range(2, 3)], [range(32, 96)])
    part = GgufFile(tmp_path / "x.gguf").read("w", (2, 3, 128), cut)
    np.testing.assert_array_equal(part.codes_NKB.numpy(), codes[:, 2, 1:3])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
def test_plain_types(tmp_path, kind, dtype):
    want = torch.randn(3, 32).to(dtype)
    raw = want.view(torch.uint8).numpy() if kind == "BF16" else want.numpy()
    write_tensors(tmp_path / "x.gguf", {"w": (raw, GGMLQuantizationType[kind])})
    got = GgufFile(tmp_path / "x.gguf").read("w", (3, 32))
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_metadata_of_every_type(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "uint8": 200, "int8": -5, "uint16": 60000, "int16": -300, "uint32": 2**31, "int32": -7,
        "uint64": 2**40, "int64": -(2**40), "float32": 0.5, "float64": 0.1, "bool": True,
        "string": "größer",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    arrays = {"a.texts": ["a", "", "日本"], "a.ints": [1, -2], "a.floats": [0.5], "a.bools": [True]}
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.add_array("a.nested", [[1, 2], [3]])
    finish(writer)
    metadata = GgufFile(path).metadata
    assert {key.removeprefix("a."): metadata[f"a.{key}"] for key in values} == values
    assert {key: metadata[key] for key in arrays} == arrays
    assert metadata["a.nested"] == [[1, 2], [3]]


def test_text_that_is_not_utf8_is_shown_as_bytes(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "NAMENAME")
    writer.add_array("a.texts", ["ok", "ZZZZ"])
    finish(writer)
    path.write_bytes(path.read_bytes().replace(b"NAMENAME", b"NAM\xff\xfeAME"))
    path.write_bytes(path.read_bytes().replace(b"ZZZZ", b"Z\xe4\xffZ"))
    metadata = GgufFile(path).metadata
    assert metadata["general.name"] == r"NAM\xff\xfeAME"
    assert metadata["a.texts"] == ["ok", r"Z\xe4\xffZ"]


@pytest.mark.parametrize(
    ("name", "arch", "kind"),
    [
        ("llama2", "llama", "F32"),
        ("llama2", "llama", "Q4_1"),
        ("llama-tied", "llama", "Q8_0"),
        ("llama-biased", "llama", "F32"),
        ("qwen2", "qwen2", "Q4_0"),
        ("qwen3", "qwen3", "F32"),
        ("qwen3-moe", "qwen3moe", "F32"),
        ("qwen3-moe", "qwen3moe", "Q4_1"),
        ("qwen3-moe", "qwen3moe", "Q8_0"),
        ("gpt2", "gpt2", "F32"),
        ("gpt2", "gpt2", "Q8_0"),
        ("gpt2", "gpt2", "Q4_1"),
    ],
)
def test_architectures(tmp_path, name, arch, kind):
    reference = make_reference(name)
    write_gguf(tmp_path / "tiny.gguf", reference, arch, GGMLQuantizationType[kind])
    assert_same_logits(load(tmp_path / "tiny.gguf"), reference)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gemma3(tmp_path, kind):
    reference = make_reference("gemma3-untied")
    metadata = {
        "gemma3.attention.sliding_window": 5,
        "gemma3.attention.sliding_window_pattern": 2,
    }
    write_gguf(
        tmp_path / "tiny.gguf", reference, "gemma3", GGMLQuantizationType[kind], metadata=metadata
    )
    assert_same_logits(load(tmp_path / "tiny.gguf"), reference)


def test_llama3_scaling_as_a_tensor(tmp_path):
    """llama.cpp stores Llama 3's scaling as a divisor for each frequency."""
    reference = make_reference("llama3")
    frequencies = reference.model.rotary_emb.inv_freq
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = {"rope_freqs.weight": (plain / frequencies).numpy()}
    write_gguf(tmp_path / "tiny.gguf", reference, "llama", extra=divisors)
    assert_same_logits(load(tmp_path / "tiny.gguf"), reference)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_in_metadata(tmp_path, kind):
    reference = make_reference(f"llama-{kind}")
    metadata = {
        "llama.rope.scaling.type": kind,
        "llama.rope.scaling.factor": 2.0 if kind == "linear" else 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    write_gguf(tmp_path / "tiny.gguf", reference, "llama", metadata=metadata)
    assert_same_logits(load(tmp_path / "tiny.gguf"), reference)


def test_sliding_window_in_metadata(tmp_path):
    reference = make_reference("mistral")
    metadata = {"llama.attention.sliding_window": 7}
    write_gguf(tmp_path / "tiny.gguf", reference, "llama", metadata=metadata)
    assert_same_logits(load(tmp_path / "tiny.gguf"), reference)


def save_parts(folder):
    tiny_gpt_oss.save_gguf(folder / "tiny.gguf", split_max_tensors=30)
    return sorted(folder.glob("tiny-*-of-*.gguf"))


def test_a_model_in_parts(tmp_path):
    """Whichever part is named, or their folder."""
    tiny_gpt_oss.save_gguf(tmp_path / "whole.gguf")
    whole = load(tmp_path / "whole.gguf")
    (tmp_path / "parts").mkdir()
    parts = save_parts(tmp_path / "parts")
    assert len(parts) > 2
    size = sum(part.stat().st_size for part in parts)
    for path in (parts[0], parts[1], tmp_path / "parts"):
        checkpoint = open_checkpoint(EngineConfig(model=str(path)), silent)
        assert (checkpoint.path.name, stored_bytes(checkpoint)) == (parts[0].name, size)
        assert checkpoint.name == "tiny"
    tokens = list(range(3, 40))
    runs = [PagedSequences(model).step({0: tokens}) for model in (whole, load(parts[0]))]
    assert torch.equal(*runs)


def assert_same_logits(model, reference):
    tokens = random.Random(0).choices(range(VOCAB), k=40)
    with torch.inference_mode():
        want = reference(torch.tensor([tokens])).logits[0]
    got = PagedSequences(model).step({0: tokens})
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0.0)


def test_row_order_is_undone():
    weight = np.arange(24).reshape(24, 1)
    stored = interleave(weight, heads=3)
    assert (stored[rotate_half_rows(24, 3).numpy()] == weight).all()


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "tiny.gguf"
        write_gguf(path, make_reference("llama2"), "llama")
        return path

    def test_truncated_anywhere_names_the_file(self, path):
        whole = path.read_bytes()
        for keep in (0, 3, 10, 100, 1000, len(whole) // 2):
            path.write_bytes(whole[:keep])
            with pytest.raises(LoadError, match=r"tiny.gguf"):
                load(path)

    def test_truncated_tensor_is_named(self, path):
        path.write_bytes(path.read_bytes()[:-50_000])
        with pytest.raises(
            LoadError, match=r"tiny.gguf: truncated, the file ends inside \S+weight"
        ):
            load(path)

    def test_garbage(self, path):
        garbage = random.Random(0).randbytes(4096)
        for head in (b"", b"GGUF", b"GGUF" + struct.pack("<I", 3)):
            path.write_bytes(head + garbage)
            with pytest.raises(LoadError, match=r"tiny.gguf: not a readable GGUF file"):
                load(path)

    def test_flipped_bytes_of_the_header_never_crash(self, path):
        """Whatever a damaged header says, it is refused, or describes something that loads."""
        whole, dice = path.read_bytes(), random.Random(0)
        for _ in range(200):
            damaged = bytearray(whole)
            for at in dice.choices(range(3000), k=3):
                damaged[at] = dice.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(LoadError):
                load(path)

    def test_an_array_of_more_than_there_is(self, tmp_path):
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
        for kind in (4, 8, 9):
            (tmp_path / "x.gguf").write_bytes(head + struct.pack("<IIQ", 9, kind, 2**64 - 1))
            with pytest.raises(LoadError, match=r"x\.gguf: not a readable GGUF file"):
                GgufFile(tmp_path / "x.gguf")

    def test_big_endian(self, path):
        path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(100))
        with pytest.raises(LoadError, match="big-endian"):
            load(path)

    def test_more_dimensions_than_a_tensor_has(self, tmp_path):
        path = tmp_path / "x.gguf"
        write_tensors(path, {"w": (np.ones((2, 3, 4, 5), np.float32), GGMLQuantizationType.F32)})
        assert GgufFile(path).read("w", (2, 3, 4, 5)).shape == (2, 3, 4, 5)
        four, five = (b"w" + struct.pack("<I", count) for count in (4, 5))
        path.write_bytes(path.read_bytes().replace(four, five))
        with pytest.raises(LoadError, match="a tensor of 5 dimensions"):
            GgufFile(path)

    def test_types_have_the_names_that_llama_cpp_gives_them(self):
        """All but those that are newer than the last one known here."""
        theirs = {int(kind): kind.name for kind in GGMLQuantizationType}
        known = {number: name for number, name in theirs.items() if number <= max(TYPE_NAMES)}
        assert known == TYPE_NAMES

    def test_unsupported_type_is_named(self, tmp_path):
        kind = GGMLQuantizationType.Q2_K
        raw = np.zeros((4, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        write_tensors(tmp_path / "x.gguf", {"w": (raw, kind)})
        with pytest.raises(LoadError, match="w has the type Q2_K"):
            GgufFile(tmp_path / "x.gguf").read("w", (4, 256))

    def test_wrong_shape_is_named(self, path):
        with pytest.raises(LoadError, match=r"output_norm.weight has shape \(64,\), expected \(9,"):
            GgufFile(path).read("output_norm.weight", (9,))

    def test_part_of_several(self, tmp_path):
        write_gguf(
            tmp_path / "a.gguf", make_reference("llama2"), "llama", metadata={"split.count": 2}
        )
        with pytest.raises(LoadError, match=r"one part of several.*…-00001-of-00002\.gguf"):
            load(tmp_path / "a.gguf")

    def test_a_missing_part_is_named(self, tmp_path):
        parts = save_parts(tmp_path)
        parts[1].rename(tmp_path / "b.gguf")
        with pytest.raises(LoadError, match=r"tiny-00002-of-0000\d\.gguf: not a readable"):
            load(parts[0])

    def test_a_part_of_another_model_is_noticed(self, tmp_path):
        parts = save_parts(tmp_path)
        parts[1].write_bytes(parts[2].read_bytes())
        with pytest.raises(LoadError, match=r"tiny-00001-of-\d+\.gguf: \d+ tensors in all parts"):
            load(parts[0])

    def test_unknown_architecture(self, tmp_path):
        write_gguf(
            tmp_path / "a.gguf",
            make_reference("qwen2"),
            "qwen2",
            metadata={"general.architecture": "falcon"},
        )
        with pytest.raises(LoadError, match=r"a.gguf: general.architecture 'falcon'"):
            load(tmp_path / "a.gguf")


def test_open_checkpoint_knows_tokens_and_ends(tmp_path):
    write_gguf(tmp_path / "Tiny-1M.Q4_K_M.gguf", make_reference("qwen3"), "qwen3")
    config = EngineConfig(model=str(tmp_path / "Tiny-1M.Q4_K_M.gguf"))
    checkpoint = open_checkpoint(config, silent)
    assert (checkpoint.name, checkpoint.format) == ("Tiny-1M", "gguf")
    assert checkpoint.config["tokenizer.ggml.tokens"][:2] == ["t0", "t1"]
    assert checkpoint.spec.eos_token_ids == (1,)
    assert checkpoint.spec.qk_norm
    assert not checkpoint.spec.qkv_bias

"""GGUF files whose header, well formed, says what cannot be. Bytes that have changed, and what is
cut off, are in `test_gguf.TestDamage`."""

from __future__ import annotations

import contextlib
import math
import random
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from tiny import VOCAB, load, make_reference

from ruvon.config import EngineConfig
from ruvon.errors import LoadError
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.gguf import GgufFile, TensorEntry
from ruvon.models.tokenizer import load_tokenizer
from ruvon.telemetry import silent

ODD = (
    "", "x", "9" * 5000, True, False, -1, 0, 1, 3, 2**31, 2**63 - 1, 2**64 - 1, -0.5, 1e308,
    math.nan, math.inf, [], ["a"], ["a"] * 3, [0, 2**62], [1.5], [True], [[]],
)  # fmt: skip
SELDOM = (
    "split.count", "split.tensors.count", "general.alignment", "general.file_type",
    "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.dimension_count",
    "llama.attention.sliding_window", "llama.expert_count", "tokenizer.ggml.scores",
    "tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template",
)  # fmt: skip
WORDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.merges": ["t 0", "t 1"],
    "tokenizer.ggml.token_type": [1, 3] * (VOCAB // 2),
}
Q, Q8_0, F32 = "blk.0.attn_q.weight", 8, 0


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def typed(value: object) -> tuple[int, bytes]:
    """GGUF's number for a type, and the value."""
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return (11, struct.pack("<q", value)) if value < 0 else (10, struct.pack("<Q", value))
        case float():
            return 12, struct.pack("<d", value)
        case str():
            return 8, text(value)
        case list():
            items = [typed(item) for item in value]
            kind = items[0][0] if items else 8
            return 9, struct.pack("<IQ", kind, len(items)) + b"".join(raw for _, raw in items)
    raise TypeError(value)


class Original:
    """A small model's file, to write again with something changed."""

    def __init__(self, path: Path) -> None:
        write_gguf(path, make_reference("llama2"), "llama")
        file = GgufFile(path)
        entries = {name: entry for name, (_, entry) in file.tensors.items()}
        start = min(entry.offset for entry in entries.values())
        self.path, self.data = path, path.read_bytes()[start:]
        self.metadata: dict[str, Any] = {**file.metadata, **WORDS}
        self.tensors = {
            name: TensorEntry(entry.kind, entry.shape, entry.offset - start)
            for name, entry in entries.items()
        }

    def write(
        self, metadata: Mapping[str, Any] = {}, tensors: Mapping[str, TensorEntry] = {}
    ) -> None:
        values, entries = {**self.metadata, **metadata}, {**self.tensors, **tensors}
        self.write_pairs(values.items(), entries.items())

    def write_pairs(
        self, values: Iterable[tuple[str, Any]], tensors: Iterable[tuple[str, TensorEntry]]
    ) -> None:
        values, tensors = list(values), list(tensors)
        header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
        for name, value in values:
            kind, raw = typed(value)
            header += text(name) + struct.pack("<I", kind) + raw
        for name, entry in tensors:
            shape = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape[::-1])
            header += text(name) + shape + struct.pack("<IQ", entry.kind, entry.offset)
        self.path.write_bytes(header + bytes(-len(header) % 32) + self.data)


@pytest.fixture
def original(tmp_path):
    return Original(tmp_path / "tiny.gguf")


def read_all(path: Path) -> None:
    load(path)
    tokenizer = load_tokenizer(open_checkpoint(EngineConfig(model=str(path)), silent))
    tokenizer.decode(tokenizer.encode("hello é"))


def test_metadata_of_odd_values(original):
    original.write()
    read_all(original.path)
    dice = random.Random(0)
    for name in (*original.metadata, *SELDOM):
        for value in dice.sample(ODD, 4):
            original.write({name: value})
            with contextlib.suppress(LoadError):
                read_all(original.path)


@pytest.mark.parametrize("value", ["2", [2], 2**64 - 1])
def test_a_count_of_parts_that_is_none(original, value):
    original.write({"split.count": value})
    with pytest.raises(LoadError, match=r"tiny\.gguf: (split.count|one part of several)"):
        load(original.path)


def test_a_width_that_no_range_has(original):
    original.write({"llama.feed_forward_length": 2**64 - 1})
    with pytest.raises(LoadError, match="intermediate_size 18446744073709551615 makes no sense"):
        load(original.path)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"offset": 0}, "overlap"),
        ({"offset": -4}, "overlap"),
        ({"offset": 4}, "begins at no multiple of 32"),
        ({"offset": 2**63}, "truncated, the file ends inside"),
        ({"shape": (2**62, 64)}, "overlap"),
        ({"shape": (0, 64)}, "a tensor of shape"),
        ({"shape": (4096,)}, "has shape"),
        ({"shape": ()}, "has shape"),
        ({"kind": 99}, "number 99, which is not supported"),
        ({"kind": 30}, None),  # as many halves: other weights, and nothing tells
    ],
)
def test_entries_of_tensors_that_lie(original, changed, why):
    entry = original.tensors[Q]
    fields = {"kind": entry.kind, "shape": entry.shape, "offset": entry.offset, **changed}
    if changed.get("offset") in (4, -4):
        fields["offset"] = entry.offset + changed["offset"]
    original.write(tensors={Q: TensorEntry(**fields)})
    if why is None:
        load(original.path)
    else:
        with pytest.raises(LoadError, match=rf"tiny\.gguf: .*{why}"):
            load(original.path)


def test_of_two_of_a_name_neither_is_chosen(original):
    values, tensors = list(original.metadata.items()), list(original.tensors.items())
    for twice in ((values + values[:1], tensors), (values, tensors + tensors[:1])):
        original.write_pairs(*twice)
        with pytest.raises(LoadError, match="twice"):
            load(original.path)


@pytest.mark.parametrize(
    "entry",
    [
        TensorEntry(F32, (), 0),
        TensorEntry(F32, (4,), 0),
        TensorEntry(F32, (8,), 0),  # of which some are below 0
        TensorEntry(F32, (2, 4), 0),
        TensorEntry(Q8_0, (4, 32), 0),
    ],
)
def test_divisors_of_frequencies_that_are_none(original, entry):
    """Their tensor is the only one, for what is read of it is read before the weights are."""
    original.write_pairs(original.metadata.items(), [("rope_freqs.weight", entry)])
    with pytest.raises(LoadError, match=r"rope_freqs.weight is no"):
        load(original.path)


@pytest.mark.parametrize(
    ("name", "raw", "kind"),
    [
        (Q, b"\x00\x7e", GGMLQuantizationType.Q8_0),  # NaN as a float16, which a block's scale is
        (Q, b"\x00\x7c", GGMLQuantizationType.Q4_0),  # infinity
        ("output_norm.weight", b"\x00\x00\xc0\x7f", GGMLQuantizationType.F32),
        ("blk.1.attn_norm.weight", b"\x00\x00\xc0\xff", GGMLQuantizationType.Q8_0),
    ],
)
def test_scales_and_norms_that_are_no_numbers(tmp_path, name, raw, kind):
    """Products of codes would make some number of them, and a wrong answer."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, make_reference("llama2"), "llama", kind)
    at, data = GgufFile(path).tensors[name][1].offset, bytearray(path.read_bytes())
    load(path)
    data[at : at + len(raw)] = raw
    path.write_bytes(data)
    with pytest.raises(LoadError, match=r"tiny\.gguf: .* that are no numbers"):
        load(path)

"""Write gpt-oss with random weights as a GGUF: MXFP4 experts, Q8_0 for the other matrices, as the
published file has them.

    python bench/random_gpt_oss.py OUTPUT.gguf [--layers 24] [--experts 32] [--vocabulary 201088]

What is given by default is the shape of the 20b: 12 GB, which are written as they are made. A file
of 6 layers is a quarter of it. Time depends on shapes alone, but for the experts that tokens go
to, which here are as even as chance makes them. Its first tokens are those of the embedded model,
so that a prompt of words is as long as it is there; the rest stand for nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from ruvon.locate import find_embedded
from ruvon.models.gguf import GgufFile

HIDDEN, WIDTH, HEADS, GROUPS, DIM, TOP_K = 2880, 2880, 64, 8, 64, 4
MXFP4_MOE = 38  # llama.cpp's number of this kind of file
BLOCK_BYTES = {Kind.MXFP4: 17, Kind.Q8_0: 34}  # of 32 values


def main() -> None:
    args = parse()
    writer = gguf.GGUFWriter(args.output, "gpt-oss")
    describe(writer, args.layers, args.experts)
    add_tokenizer(writer, args.vocabulary)
    tensors = [*tensors_of(args.layers, args.experts, args.vocabulary)]
    for name, shape, kind in tensors:
        add_info(writer, name, shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for name, shape, kind in tensors:
        writer.write_tensor_data(values(rng, name, shape, kind))
    writer.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=201088)
    return parser.parse_args()


def describe(writer: gguf.GGUFWriter, layers: int, experts: int) -> None:
    writer.add_file_type(MXFP4_MOE)
    writer.add_context_length(131072)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(WIDTH)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(150000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(4096)
    writer.add_sliding_window(128)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(TOP_K)


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """The embedded model's, and names for nothing behind it."""
    source = GgufFile(find_embedded()).metadata
    tokens, kinds = (source[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    more = max(size - len(tokens), 0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(source["tokenizer.ggml.pre"])
    writer.add_token_list([*tokens[:size], *(f"<nothing-{n}>" for n in range(more))])
    writer.add_token_types([*kinds[:size], *[int(gguf.TokenType.NORMAL)] * more])
    writer.add_token_merges(source["tokenizer.ggml.merges"])
    writer.add_eos_token_id(source["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(False)


def tensors_of(
    layers: int, experts: int, vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...], Kind]]:
    yield "token_embd.weight", (vocabulary, HIDDEN), Kind.Q8_0
    for i in range(layers):
        yield from ((f"blk.{i}.{name}", *rest) for name, *rest in layer_of(experts))
    yield "output_norm.weight", (HIDDEN,), Kind.F32
    yield "output.weight", (vocabulary, HIDDEN), Kind.Q8_0


def layer_of(experts: int) -> Iterator[tuple[str, tuple[int, ...], Kind]]:
    heads, groups = HEADS * DIM, GROUPS * DIM
    rows = {"attn_q": heads, "attn_k": groups, "attn_v": groups, "attn_output": HIDDEN}
    for name, n in rows.items():
        yield f"{name}.weight", (n, heads if name == "attn_output" else HIDDEN), Kind.Q8_0
        yield f"{name}.bias", (n,), Kind.F32
    for name in ("attn_norm", "post_attention_norm"):
        yield f"{name}.weight", (HIDDEN,), Kind.F32
    yield "attn_sinks.weight", (HEADS,), Kind.F32
    yield "ffn_gate_inp.weight", (experts, HIDDEN), Kind.F32
    yield "ffn_gate_inp.bias", (experts,), Kind.F32
    for name, n, k in (("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
        yield f"ffn_{name}_exps.weight", (experts, n, k), Kind.MXFP4
        yield f"ffn_{name}_exps.bias", (experts, n), Kind.F32


def add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    if kind == Kind.F32:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        return
    stored = (*shape[:-1], shape[-1] // 32 * BLOCK_BYTES[kind])
    size = int(np.prod(stored))
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, raw_dtype=kind)


def values(rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Random codes with scales of which weights become some 0.02; norms are ones."""
    if kind == Kind.F32:
        plain = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return plain + 1 if "norm" in name else plain
    blocks = int(np.prod(shape)) // 32
    raw = rng.integers(0, 256, (blocks, BLOCK_BYTES[kind]), np.uint8)
    if kind == Kind.MXFP4:
        raw[:, 0] = rng.integers(119, 121, blocks, np.uint8)
    else:
        raw[:, :2] = np.full((blocks, 1), 0.02 / 74, np.float16).view(np.uint8)
    return raw


if __name__ == "__main__":
    main()

"""Write GPT-2 in a Hugging Face folder as a GGUF in bfloat16. Run by bench/peers.py with the Python
of an environment that has the package gguf:

    python bench/gpt2_to_gguf.py FOLDER OUTPUT.gguf
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize

NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def main() -> None:
    folder, output = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "gpt2":
        raise SystemExit(f"{folder} holds {config.get('model_type')}; only gpt2 can be converted")
    writer = GGUFWriter(output, "gpt2")
    describe(writer, config)
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    for name, values in read_safetensors(folder / "model.safetensors"):
        add_tensor(writer, name.removeprefix("transformer."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: GGUFWriter, config) -> None:
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def add_tokenizer(writer: GGUFWriter, tokenizer, config) -> None:
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {number: text for text, number in tokenizer["model"]["vocab"].items()} | special
    merges = (
        pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]
    )
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[i] for i in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray) -> None:
    """``h.0.attn.c_attn.weight`` becomes ``blk.0.attn_qkv.weight``."""
    if name.endswith((".attn.bias", ".masked_bias", "lm_head.weight")):
        return  # causal masks that old files hold, and the embedding once more
    stem, _, part = name.rpartition(".")
    block = ""
    if stem.startswith("h."):
        _, layer, stem = stem.split(".", 2)
        block = f"blk.{layer}."
    if values.ndim == 1 or stem == "wpe":
        writer.add_tensor(f"{block}{NAMES[stem]}.{part}", values)
        return
    if ".c_" in stem:  # Conv1D keeps its matrices as K x N
        values = np.ascontiguousarray(values.T)
    packed = quantize(values, Kind.BF16)
    writer.add_tensor(f"{block}{NAMES[stem]}.{part}", packed, raw_dtype=Kind.BF16)


def read_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors as float32; numpy has no bfloat16, so the format's own package cannot read it."""
    data = np.memmap(path, np.uint8, mode="r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        raw = data[start + first : start + last].tobytes()
        yield name, as_float32(raw, entry["dtype"]).reshape(entry["shape"])


def as_float32(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


if __name__ == "__main__":
    main()

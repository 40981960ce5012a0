"""Long prompts and large files on an NVIDIA GPU.

    python bench/gpu_large.py prompts|files [--model gpt-oss-20b] [--folder /dev/shm/random]

``prompts``: one sequence of 1,000, of 32,768 and of nearly 131,072 tokens, random weights: tokens a
second until the first one, the time of a step after it, the memory in use. ``files``: the time to
load a checkpoint of gpt-oss's shapes, random numbers in a file for each layer, which is written to
the folder first; from memory, if that is where the folder is.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import torch
from gpu import CONFIGS, DEVICE, model_folder
from safetensors.torch import save_file
from torch import Tensor

from ruvon import LLM, SamplingParams
from ruvon.config import EngineConfig
from ruvon.kernels.triton_ops import make_triton_ops
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.telemetry import silent

STEPS = 64  # after the first token


def measure_prompts(name: str) -> None:
    llm = LLM(
        str(model_folder(name, None)),
        load_format="dummy",
        enable_prefix_caching=False,
        max_num_seqs=8,
    )
    rng = random.Random(0)
    for length in (1000, 32768, 130900):
        prompt = [[rng.randrange(49000) for _ in range(length)]]
        took = {new: seconds(llm, prompt, new) for new in (1, 1 + STEPS)}
        step = (took[1 + STEPS] - took[1]) / STEPS
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info())
        print(
            f"{name}, {length:,} tokens: {length / took[1]:,.0f} tok/s, a step {step * 1e3:.2f} ms,"
            f" {total - free:.1f} GB of {total:.1f} in use",
            flush=True,
        )
    llm.close()


def seconds(llm: LLM, prompt: list[list[int]], new: int) -> float:
    """Of the second time: the first may still set things up."""
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    for _ in range(2):
        began = time.perf_counter()
        llm.generate(prompt, sampling, use_tqdm=False)
    return time.perf_counter() - began


def measure_files(name: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_checkpoint(CONFIGS[name], folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    for _ in range(2):
        began = time.perf_counter()
        config = EngineConfig(str(folder), device="cuda")
        ops = make_triton_ops(torch.bfloat16, DEVICE)
        model = load_model(open_checkpoint(config, silent), config, ops, silent)
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{name}: {size / 1e9:.1f} GB in {took:.1f} s, {size / took / 1e9:.2f} GB/s, at most "
            f"{host:.1f} GB of the host's, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB here",
            flush=True,
        )
        del model
        torch.cuda.empty_cache()


def write_checkpoint(config: dict[str, Any], folder: Path) -> None:
    """As Hugging Face has it."""
    (folder / "config.json").write_text(json.dumps(config))
    homes: dict[str, str] = {}
    names = [f"model.layers.{i}." for i in range(config["num_hidden_layers"])] + ["rest"]
    for number, name in enumerate(names):
        tensors = rest(config) if name == "rest" else layer(config, name)
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file)
        homes |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


def rest(config: dict[str, Any]) -> dict[str, Tensor]:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    tables = {name: normal(vocab, hidden) for name in ("model.embed_tokens", "lm_head")}
    return {f"{k}.weight": v for k, v in (tables | {"model.norm": normal(hidden)}).items()}


def layer(config: dict[str, Any], name: str) -> dict[str, Tensor]:
    hidden, width, count = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    heads, groups = (
        config["head_dim"] * config[f"num_{k}_heads"] for k in ("attention", "key_value")
    )
    attention, experts = name + "self_attn.", name + "mlp.experts."
    sizes = {
        attention + "q_proj": (heads, hidden),
        attention + "k_proj": (groups, hidden),
        attention + "v_proj": (groups, hidden),
        attention + "o_proj": (hidden, heads),
        name + "mlp.router": (count, hidden),
    }
    tensors = {f"{key}.weight": normal(*size) for key, size in sizes.items()}
    tensors |= {f"{key}.bias": normal(size[0]) for key, size in sizes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}{norm}.weight"] = normal(hidden)
    tensors[attention + "sinks"] = normal(config["num_attention_heads"])
    for key, rows, columns in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
        key = f"{experts}{key}_proj_"
        tensors[key + "blocks"] = whole(0, 256, count, rows, columns // 32, 16)
        tensors[key + "scales"] = whole(115, 122, count, rows, columns // 32)
        tensors[key + "bias"] = normal(count, rows)
    return tensors


def normal(*shape: int) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * 0.02).bfloat16().cpu()


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, device=DEVICE).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("prompts", "files"))
    parser.add_argument(
        "--model", default="gpt-oss-20b", choices=[k for k in CONFIGS if "oss" in k]
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/random"))
    args = parser.parse_args()
    if args.part == "prompts":
        measure_prompts(args.model)
    else:
        measure_files(args.model, args.folder)


if __name__ == "__main__":
    main()

"""Measure ruvon on an NVIDIA GPU beside vLLM's recorded figures and beside what the chip allows.

    python bench/gpu.py steps|prefill|sampling|offline|serve|load [--models gpt2,xl,smollm2]
                        [--batches 1,32,256] [--quantization int8|int4] [--beside OTHER/CHECKOUT]
                        [--tp 2 [--sums memory|nccl]] [--pp 2] [--options ...]

Random weights of the true shapes in bfloat16, greedy, 128 prompt and 128 new tokens; the models
gpt-oss-20b and gpt-oss-120b have their experts in MXFP4. ``steps`` is the time of a decode step's
graph; the floor is the bytes it must read over 3.35 TB/s. ``offline`` drives `ruvon.LLM`, token ids
in. With ``--tp``, steps, prefill and offline are those of so many ranks, a GPU each, and floors
those of what one of them reads. ``serve`` streams /v1/completions to clients in other processes;
``load`` does so at several rates of arrival (Poisson), with prompts of 16 to 900 tokens and outputs
of 16 to 500 or what the context leaves, drawn at temperature 0.8 and top-p 0.95.

vLLM's figures: 0.25.1 (torch 2.11, FlashAttention 3, CUDA graphs) on one H100 80GB HBM3, the same
work. GPT-2's vocabulary is read from --vocab (vocab.json and merges.txt), if given.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cards import on_cards
from gpu_serve import ROOT, measure_load, measure_serve
from measure import write

from ruvon import LLM, SamplingParams
from ruvon.engine.gpu.graphs import Bucket, Captured, Graphs
from ruvon.kernels import sample
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.kernels.ops import ForwardBatch, PagedIndex
from ruvon.kernels.triton_ops import make_triton_ops
from ruvon.models import MODELS, Model
from ruvon.models.cache_groups import cache_groups
from ruvon.models.quantize import SCHEMES
from ruvon.models.shares import share_of
from ruvon.models.sources import RandomTensors
from ruvon.models.spec import spec_from_config
from ruvon.models.weights import Weights
from ruvon.telemetry import silent

DEVICE = torch.device("cuda")
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second, by the datasheet
PAGE = 16
CONTEXT = 192  # tokens in the middle of such a decode

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_positions": 1024,
    "vocab_size": 50257,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 50256,
    "bos_token_id": 50256,
    "torch_dtype": "bfloat16",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 201088,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "xl": GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": 2,
        "bos_token_id": 1,
        "torch_dtype": "bfloat16",
    },
    "gpt-oss-20b": GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
}
BATCHES = {
    "gpt2": (1, 8, 32, 128, 256),
    "xl": (1, 8, 64, 256),
    "llama-8b": (1, 8, 32, 64, 128),
    "llama-1b": (1, 8, 32, 64, 128),
    "qwen3-0.6b": (1, 8, 32, 64, 128),
    "smollm2": (1, 8, 64, 256),
    "gpt-oss-20b": (1, 8, 64, 256),
    "gpt-oss-120b": (1, 8, 64),
}

VLLM_STEP_MS = {
    "gpt2": {1: 2.36, 8: 2.42, 32: 2.41, 128: 4.97, 256: 7.78},
    "xl": {1: 2.96, 8: 3.19, 64: 5.46, 256: 12.6},
    "smollm2": {1: 1.99, 8: 2.51, 64: 3.00, 256: 6.66},
    "gpt-oss-20b": {1: 3.22, 8: 3.62, 256: 7.95},
}
VLLM_TOK_S = {
    "gpt2": {1: 417, 8: 3016, 32: 12069, 128: 23990, 256: 30549},
    "xl": {1: 326, 8: 2173, 64: 10518, 256: 17722},
    "smollm2": {1: 487, 8: 2666, 64: 18792, 256: 34121},
    "gpt-oss-20b": {64: 9396, 256: 14631},
}
VLLM_PREFILL_TOK_S = {"gpt2": 435_000, "xl": 106_500, "smollm2": 191_400, "gpt-oss-20b": 51_500}


VLLM_TP2_STEP_MS = {
    "llama-8b": {1: 3.50, 8: 3.56, 32: 3.86, 128: 4.95, 256: 6.94},
    "gpt-oss-20b": {1: 2.67, 8: 2.78, 64: 2.58, 256: 5.81},
    "gpt-oss-120b": {1: 3.90, 8: 4.18, 256: 10.9},
}
VLLM_TP2_PREFILL_TOK_S = {"llama-8b": 71_400, "gpt-oss-20b": 9_600, "gpt-oss-120b": 4_400}
"""On two H200s."""


def bandwidth() -> float:
    name = torch.cuda.get_device_name()
    return next((value for card, value in BANDWIDTHS.items() if card in name), 3.35e12)


def build(name: str, quantization: str = "none", mesh: Mesh = ALONE) -> Model:
    ops = make_triton_ops(torch.bfloat16, DEVICE)
    spec = spec_from_config(CONFIGS[name])
    family = MODELS[spec.architecture]
    source = RandomTensors(
        Path(name), 0, torch.bfloat16, mxfp4="quantization_config" in CONFIGS[name], device=DEVICE
    )
    scheme = SCHEMES["auto" if quantization == "none" else quantization]
    weights = Weights(source, family.rules, scheme, ops, share_of(spec, mesh))
    return family.build(spec, weights, ops)


def make_cache(model: Model, num_blocks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    spec = model.spec
    shape = (2, num_blocks, spec.num_kv_heads, PAGE, spec.head_dim)
    layers = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in spec.windows]
    return [(layer[0], layer[1]) for layer in layers]


def milliseconds(run: Callable[[], object], repeat: int = 50) -> float:
    """Of one run, in a row of them; the median of five rows."""
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / repeat)
    return statistics.median(times)


# ---------------------------------------------------------------------------------- one step


def measure_steps(
    mesh: Mesh, name: str, batches: tuple[int, ...], quantization: str
) -> dict[str, Any]:
    model, numbers = build(name, quantization, mesh), {}
    told = mesh.rank == 0
    if told:
        print("| model | batch | floor ms | ruvon ms | vLLM ms | share of floor |")
        print("|---|---:|---:|---:|---:|---:|")
    for batch in batches:
        per_seq = -(-CONTEXT // PAGE)
        cache = make_cache(model, batch * per_seq)
        captured = decode_step(model, cache, batch, per_seq)
        step, floor = milliseconds(captured.replay), floor_ms(model, batch, quantization)
        known = VLLM_TP2_STEP_MS if mesh.size == 2 else VLLM_STEP_MS if mesh.size == 1 else {}
        vllm = known.get(name, {}).get(batch, float("nan"))
        line = f"| {name} | {batch} | {floor:.3f} | {step:.3f} | {vllm:.2f} | {floor / step:.0%} |"
        if told:
            print(line, flush=True)
        numbers[str(batch)] = {"ms": step, "floor_ms": floor, "vllm_ms": vllm}
    return numbers


def decode_step(model: Model, cache: Any, batch: int, per_seq: int) -> Captured:
    """A step of ``batch`` sequences of `CONTEXT` tokens, sampled greedily."""
    bucket = Bucket(True, batch, batch)
    state = sample.make_state(batch, model.spec.vocab_size, DEVICE)
    graphs = Graphs(
        partial(model.forward, cache=cache),
        state,
        table_width=per_seq,
        block_size=PAGE,
        num_groups=len(cache_groups(model.spec)),
        max_context=1024,
        buckets=[bucket],
        pdl=True,
    )
    with torch.inference_mode():
        captured = graphs.capture_all(silent)[bucket]
        tables = torch.randperm(batch * per_seq, dtype=torch.int32).view(batch, per_seq)
        graphs.tables[:, :, :per_seq] = tables  # each layer has a cache of its own
        slots = np.arange(batch)
        for staging in graphs.staging():
            inputs = staging.inputs[bucket]
            inputs["token_ids"][:] = np.random.default_rng(0).integers(49000, size=batch)
            inputs["positions"][:] = CONTEXT - 1
            inputs["slots"][:, :batch] = tables.numpy()[:, -1] * PAGE + (CONTEXT - 1) % PAGE
            inputs["query_starts"][:] = np.arange(batch + 1)
            inputs["context_lens"][:] = CONTEXT
            inputs["logit_rows"][:] = slots
            inputs["params"][:, sample.SLOT] = slots
            inputs["params"][:, [sample.HISTORY, sample.BIAS]] = -1
    return captured


BYTES = {"none": (2.0, 2.0), "int8": (1.0625, 1.0625), "int4": (0.625, 1.0625)}
"""A weight's, of layers and of the head."""


def floor_ms(model: Model, batch: int, quantization: str = "none") -> float:
    """Weights that a step must read, those of experts once however many tokens chose one (of which
    there are so many if all are chosen alike), and the keys and values of its sequences."""
    spec, experts = model.spec, model.spec.experts
    in_layer, in_head = BYTES[quantization]
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    plain = spec.hidden_size * (heads + spec.num_heads * spec.head_dim)
    gates = 1 if spec.architecture == "GPT2LMHeadModel" else 2
    mlp = (1 + gates) * spec.hidden_size * spec.intermediate_size
    if experts is None:
        layer = in_layer * (plain + mlp)
    else:
        read = experts.num_experts * (1 - (1 - experts.top_k / experts.num_experts) ** batch)
        layer = 2 * plain + read * mlp * (4.25 / 8 if spec.sinks else 2)
    cached = 2 * spec.num_kv_heads * spec.head_dim
    seen = sum(min(window or CONTEXT, CONTEXT) for window in spec.windows)
    nbytes = spec.num_layers * layer + in_head * len(model.share.vocabulary) * spec.hidden_size
    return (nbytes + 2 * batch * seen * cached) / bandwidth() * 1e3


def measure_prefill(mesh: Mesh, name: str) -> dict[str, Any]:
    """Eight prompts of 1,000 tokens in one step."""
    model, num, length = build(name, mesh=mesh), 8, 1000
    per_seq = -(-length // PAGE)
    cache = make_cache(model, num * per_seq)
    tables = torch.randperm(num * per_seq, dtype=torch.int32).view(num, per_seq)
    positions = torch.arange(length, dtype=torch.int32).repeat(num)
    owner = torch.arange(num).repeat_interleave(length)
    slots = tables[owner, positions // PAGE] * PAGE + positions % PAGE
    batch = ForwardBatch(
        token_ids=torch.randint(49000, (num * length,), dtype=torch.int32, device=DEVICE),
        positions=positions.to(DEVICE),
        paged=(PagedIndex(slots.to(DEVICE), tables.to(DEVICE)),) * len(cache_groups(model.spec)),
        query_starts=torch.arange(num + 1, dtype=torch.int32, device=DEVICE) * length,
        context_lens=torch.full((num,), length, dtype=torch.int32, device=DEVICE),
        logit_rows=torch.arange(1, num + 1, dtype=torch.int32, device=DEVICE) * length - 1,
        max_query=length,
        max_context=length,
    )
    with torch.inference_mode():
        model.forward(batch, cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.forward(batch, cache)
        rate = num * length / milliseconds(graph.replay, 5) * 1e3
    known = VLLM_TP2_PREFILL_TOK_S if mesh.size == 2 else VLLM_PREFILL_TOK_S
    vllm = known.get(name, 0)
    if mesh.rank == 0:
        print(f"prefill {name}: {rate:,.0f} tok/s (vLLM {vllm:,})")
    return {"tok_s": rate, "vllm_tok_s": vllm}


def measure_sampling(_: str, batches: tuple[int, ...]) -> dict[str, Any]:
    """Sampling alone, from GPT-2's vocabulary."""
    numbers, vocab = {}, GPT2["vocab_size"]
    for batch in batches:
        logits = torch.randn(batch, vocab, device=DEVICE) * 2
        state, sampled = sample.make_state(batch, vocab, DEVICE), sample.make_sampled(batch, DEVICE)
        for label, (temperature, top_k, top_p) in {
            "greedy": (0.0, 0, 1.0),
            "temperature": (0.8, 0, 1.0),
            "top_p": (0.8, 0, 0.95),
            "top_k": (0.8, 50, 1.0),
        }.items():
            words = np.zeros((batch, sample.PARAMS), dtype=np.int32)
            words.view(np.float32)[:, [sample.TEMPERATURE, sample.TOP_P]] = temperature, top_p
            words[:, sample.TOP_K] = top_k
            words[:, [sample.HISTORY, sample.BIAS]] = -1
            words[:, sample.SLOT] = np.arange(batch)
            params = torch.from_numpy(words).to(DEVICE)
            sample.sample(logits, params, state, sampled)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                sample.sample(logits, params, state, sampled)
            numbers[f"{label} {batch}"] = time_us = milliseconds(graph.replay) * 1e3
            print(f"sampling {label}, batch {batch}: {time_us:.1f} us")
    return numbers


# ---------------------------------------------------------------------------------- the engine


def model_folder(name: str, vocab: Path | None) -> Path:
    folder = Path(tempfile.mkdtemp()) / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    if vocab is not None and name != "smollm2":
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(vocab / file, folder / file)
    return folder


def measure_offline(
    name: str, batches: tuple[int, ...], folder: Path, ranks: int = 1, stages: int = 1
) -> dict[str, Any]:
    began, numbers = time.perf_counter(), {}
    llm = LLM(
        str(folder),
        load_format="dummy",
        enable_prefix_caching=False,
        tensor_parallel_size=ranks,
        pipeline_parallel_size=stages,
    )
    print(f"{name}: started in {time.perf_counter() - began:.1f} s")
    print("| model | batch | ruvon tok/s | vLLM tok/s | ms a step |\n|---|---:|---:|---:|---:|")
    rng = random.Random(0)
    sampling = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    for batch in batches:
        times = []
        for _ in range(3):
            prompts = [[rng.randrange(49000) for _ in range(128)] for _ in range(batch)]
            began = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times)
        rate, vllm = batch * 128 / seconds, VLLM_TOK_S.get(name, {}).get(batch, 0)
        print(f"| {name} | {batch} | {rate:,.0f} | {vllm:,} | {seconds / 128e-3:.3f} |")
        numbers[str(batch)] = {"tok_s": rate, "vllm_tok_s": vllm}
    llm.close()
    return numbers


PARTS = ("steps", "prefill", "sampling", "offline", "serve", "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--models", default="gpt2,xl,smollm2")
    parser.add_argument("--batches", help="Default: those of vLLM's figures.")
    parser.add_argument("--quantization", choices=BYTES, default="none", help="For steps.")
    parser.add_argument("--tp", type=int, default=1, help="Ranks; for steps, prefill, offline.")
    parser.add_argument("--pp", type=int, default=1, help="Stages; for offline.")
    parser.add_argument("--sums", choices=("memory", "nccl"), default="memory", help="Of ranks.")
    parser.add_argument("--vocab", type=Path, help="Folder with GPT-2's vocab.json and merges.txt.")
    parser.add_argument(
        "--beside", type=Path, nargs="*", default=[], help="Other checkouts, for serve."
    )
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="For ruvon serve.")
    args = parser.parse_args()
    if args.tp > 1 and args.part not in ("steps", "prefill", "offline"):
        parser.error(f"--tp: not for {args.part}; for serve, --options --tensor-parallel-size")
    if args.pp > 1 and args.part != "offline":
        parser.error(f"--pp: not for {args.part}")
    given = tuple(map(int, args.batches.split(","))) if args.batches else None
    numbers: Mapping[str, Any] = {
        name: measure_part(args, name, given or BATCHES[name]) for name in args.models.split(",")
    }
    path = write(f"gpu-{args.part}", {"device": torch.cuda.get_device_name(), "numbers": numbers})
    print(f"\nWrote {path}")


def measure_part(args: argparse.Namespace, name: str, batches: tuple[int, ...]) -> dict[str, Any]:
    match args.part:
        case "offline":
            folder = model_folder(name, args.vocab)
            return measure_offline(name, batches, folder, args.tp, args.pp)
        case "serve":
            trees = [ROOT, *(tree.resolve() for tree in args.beside)]
            return measure_serve(name, model_folder(name, args.vocab), args.options, trees)
        case "load":
            return measure_load(name, model_folder(name, args.vocab), args.options)
        case "steps":
            given = (name, batches, args.quantization)
            return on_cards(args.tp, args.sums, measure_steps, *given)
        case "prefill":
            return on_cards(args.tp, args.sums, measure_prefill, name)
        case _:
            return measure_sampling(name, batches)


if __name__ == "__main__":
    main()

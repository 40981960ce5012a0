"""The models: their mathematics, their weights, and their assets (tokenizer, chat format)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.errors import LoadError
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.kernels.ops import ForwardBatch, Ops
from ruvon.models import gemma3, gpt2, gpt_oss, llama
from ruvon.models.checkpoint import Checkpoint
from ruvon.models.mixtures import is_original
from ruvon.models.quantize import SCHEMES
from ruvon.models.shares import share_of
from ruvon.models.sources import RandomTensors, SafetensorsFolder, TensorSource
from ruvon.models.spec import ModelSpec
from ruvon.models.weights import Rule, Weights
from ruvon.telemetry import Progress


class Model(Protocol):
    """What the engine runs."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def held(self) -> range:
        """The layers of this stage."""

    @property
    def ops(self) -> Ops: ...

    def forward(self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """→ float32 logits [L, V]; on a stage before the last, what it sends on. Writes the batch's
        keys and values to ``cache``, one (keys, values) of [B, G, P, D] a layer. In two parts:"""

    def hidden(self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """→ [L, C]: the final hidden states of the batch's ``logit_rows``."""

    def logits(self, x_LC: Tensor) -> Tensor:
        """→ float32 [L, V]."""

    def streams(
        self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[Tensor]:
        """The stream [T, C] before the first layer and behind each."""

    def read_out(self, stream_TC: Tensor) -> Tensor:
        """→ float32 logits [T, V] of any of them."""


@dataclass(frozen=True, slots=True)
class Family:
    """One file of this package: how its models are built and what their tensors are called."""

    build: Callable[[ModelSpec, Weights, Ops], Model]
    rules: Mapping[str, Rule]
    ignored: tuple[str, ...]


GPT2 = Family(gpt2.build, gpt2.RULES, gpt2.IGNORED)
LLAMA = Family(llama.build, llama.RULES, llama.IGNORED)
QWEN3_MOE = Family(gpt_oss.build, gpt_oss.QWEN3_MOE_RULES, gpt_oss.IGNORED)
GPT_OSS = Family(gpt_oss.build, gpt_oss.RULES, gpt_oss.IGNORED)
GEMMA3 = Family(gemma3.build, gemma3.RULES, gemma3.IGNORED)

MODELS: Mapping[str, Family] = {
    "GPT2LMHeadModel": GPT2,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "GptOssForCausalLM": GPT_OSS,
    "Gemma3ForCausalLM": GEMMA3,
}


def load_model(
    checkpoint: Checkpoint,
    config: EngineConfig,
    ops: Ops,
    progress: Progress,
    at_once: int = 1,
    mesh: Mesh = ALONE,
) -> Model:
    """The model with its weights, packed for ``ops``, so many layers ``at_once``; of several ranks,
    this one's part of it.

    Raises LoadError, naming file and tensor, for what is missing, mis-shaped, cut off or left over,
    and ConfigError for a model that so many ranks cannot share.
    """
    progress("loading weights", 0.0)
    spec, family = checkpoint.spec, MODELS[checkpoint.spec.architecture]
    weights = Weights(
        source=_open_source(checkpoint, config, ops.device),
        rules=gpt_oss.ORIGINAL_RULES if is_original(checkpoint.config) else family.rules,
        scheme=SCHEMES[config.quantization],
        ops=ops,
        share=share_of(spec, mesh),
        ignored=family.ignored,
        progress=progress,
        is_gguf=checkpoint.format == "gguf",
        at_once=at_once,
    )
    model = family.build(spec, weights, ops)
    weights.finish()
    progress("loading weights", 1.0)
    return model


def _open_source(
    checkpoint: Checkpoint, config: EngineConfig, device: torch.device
) -> TensorSource:
    match checkpoint.format:
        case "safetensors":
            return SafetensorsFolder(checkpoint.path)
        case "gguf":
            assert checkpoint.gguf is not None
            return checkpoint.gguf
        case "dummy":
            packed = checkpoint.config.get("quantization_config") or is_original(checkpoint.config)
            return RandomTensors(
                checkpoint.path, config.seed, _dtype(checkpoint), mxfp4=bool(packed), device=device
            )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    dtype = getattr(torch, checkpoint.spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoadError(f"{checkpoint.path}: dtype {checkpoint.spec.dtype!r} is not supported")
    return dtype

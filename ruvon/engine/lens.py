"""Inside a model: what its heads attend to, and what each of its layers would say next.

For a short prompt, on demand, beside the engine: a copy of the weights in float32, computed by the
plain operations on the CPU, whatever the engine computes with. "What a layer would say" is the
logit lens (nostalgebraist, 2020): the stream as it leaves a layer, through the last norm and the
head, as if no layer followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Lock

import torch
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.errors import RequestError
from ruvon.kernels.ops import CPU, AttentionSpec, ForwardBatch, Ops, PagedIndex
from ruvon.kernels.reference import attention, attention_weights, make_torch_ops
from ruvon.models import Model, load_model
from ruvon.models.cache_groups import cache_groups
from ruvon.models.checkpoint import Checkpoint
from ruvon.models.spec import ModelSpec
from ruvon.telemetry import silent

MOST_TOKENS = 64  # of a prompt
MOST_VALUES = 800_000_000  # of a model's weights, each of which takes 4 bytes
NUM_TOP = 5  # tokens told of each layer and place
BLOCK = 1  # of the cache that holds all of the prompt


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen. The first row of the lens is the embedding's, the last is the model's own."""

    attention: Tensor  # uint8 [layers, H, T, T], in 255ths: what each query takes of each key
    top_ids: Tensor  # [layers + 1, T, NUM_TOP]
    top_probs: Tensor  # the same shape, float32


@dataclass(slots=True)
class Lens:
    """Looks into one model. Its copy of the weights is made at the first look."""

    checkpoint: Checkpoint
    config: EngineConfig
    _model: Model | None = None
    _seen: list[Tensor] = field(default_factory=list)  # a layer's attention each
    _lock: Lock = field(default_factory=Lock)

    @property
    def is_busy(self) -> bool:
        return self._lock.locked()

    def look(self, tokens: Sequence[int]) -> Look:
        """In any thread; one after the other. Raises `RequestError` for a prompt that is too long,
        and for a model of which there is no room for a copy."""
        if len(tokens) > MOST_TOKENS:
            raise RequestError(
                f"The prompt has {len(tokens)} tokens, of which {MOST_TOKENS} can be looked at.",
                "prompt",
            )
        if (num := num_values(self.checkpoint.spec)) > MOST_VALUES:
            raise RequestError(
                f"This model has {num / 1e9:.1f} billion weights; one of at most "
                f"{MOST_VALUES / 1e9:.1f} billion can be looked into."
            )
        with self._lock, torch.inference_mode():
            self._model = self._model or self._load()
            self._seen.clear()
            return self._look(self._model, tokens)

    def forget(self) -> None:
        """Give the copy's memory back, unless it is in use."""
        if self._lock.acquire(blocking=False):
            self._model = None
            self._seen.clear()
            self._lock.release()

    def _load(self) -> Model:
        config = replace(self.config, quantization="none")
        ops = replace(make_torch_ops(torch.float32, CPU), attention=self._attend)
        return load_model(self.checkpoint, config, ops, silent)

    def _attend(
        self,
        q_THD: Tensor,
        k_cache_BGPD: Tensor,
        v_cache_BGPD: Tensor,
        batch: ForwardBatch,
        spec: AttentionSpec,
        sinks_H: Tensor | None,
    ) -> Tensor:
        """As the plain operation, and keep what each query takes of each key."""
        weights = attention_weights(q_THD, k_cache_BGPD[BLOCK], spec, sinks_H)
        self._seen.append((255 * weights).round().to(torch.uint8))
        return attention(q_THD, k_cache_BGPD, v_cache_BGPD, batch, spec, sinks_H)

    def _look(self, model: Model, tokens: Sequence[int]) -> Look:
        ids, probs = [], []
        for stream_TC in model.streams(*whole_prompt(model.spec, model.ops, tokens)):
            top = model.read_out(stream_TC).softmax(-1).topk(NUM_TOP)
            ids.append(top.indices)
            probs.append(top.values)
        return Look(torch.stack(self._seen), torch.stack(ids), torch.stack(probs))


def num_values(spec: ModelSpec) -> int:
    """How many weights a model has, about."""
    heads = (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    experts = 1 if spec.experts is None else spec.experts.num_experts
    layer = spec.hidden_size * (2 * heads + 3 * experts * spec.intermediate_size)
    tables = 1 if spec.tie_embeddings else 2
    return spec.num_layers * layer + tables * spec.vocab_size * spec.hidden_size


def whole_prompt(
    spec: ModelSpec, ops: Ops, tokens: Sequence[int]
) -> tuple[ForwardBatch, list[tuple[Tensor, Tensor]]]:
    """One prompt as a batch, and a cache of a single block for it: every layer has its own."""
    num = len(tokens)
    places = torch.arange(num, dtype=torch.int32)
    paged = PagedIndex(places + BLOCK * num, torch.tensor([[BLOCK]], dtype=torch.int32))
    batch = ForwardBatch(
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        positions=places,
        paged=(paged,) * len(cache_groups(spec)),
        query_starts=torch.tensor([0, num], dtype=torch.int32),
        context_lens=torch.tensor([num], dtype=torch.int32),
        logit_rows=places,
        max_query=num,
        max_context=num,
    )
    shape = (BLOCK + 1, spec.num_kv_heads, num, spec.head_dim)
    cache = [
        (torch.zeros(shape, dtype=ops.dtype), torch.zeros(shape, dtype=ops.dtype))
        for _ in range(spec.num_layers)
    ]
    return batch, cache

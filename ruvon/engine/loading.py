"""A checkpoint's weights and words, loaded beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.engine.backends import Backend
from ruvon.engine.grammar import Grammars
from ruvon.models import Model, load_model
from ruvon.models.chat import Chat, load_chat
from ruvon.models.checkpoint import Checkpoint
from ruvon.models.sources import weight_files
from ruvon.models.tokenizer import Tokenizer, load_tokenizer
from ruvon.telemetry import Progress

SMALL_MODEL = 1 << 30
"""Bytes of weights below which torch's own threads do not help to load them: tensors are small, and
for each operation threads wait for one another, long if anybody else uses their cores."""

LAYERS_AT_ONCE = 4
BYTES_AT_ONCE = 2 << 30
"""Most that are loaded side by side on a CPU, each of which takes the memory of its largest weight
a few times: a large mixture's layers come one by one, each on all threads."""


def load_words(checkpoint: Checkpoint, *, tried: bool = False) -> tuple[Tokenizer, Chat, Grammars]:
    """All that is needed to read and to write text, and to write it by rules; ``tried`` as
    `Grammars` has it."""
    tokenizer, spec = load_tokenizer(checkpoint), checkpoint.spec
    chat = load_chat(tokenizer)
    ends = dict.fromkeys(chat.stop_ids((*spec.eos_token_ids, *tokenizer.eos_ids)))
    eos_token_ids = tuple(id for id in ends if 0 <= id < spec.vocab_size)
    return tokenizer, chat, Grammars(tokenizer, spec.vocab_size, eos_token_ids, tried=tried)


def load_on(
    checkpoint: Checkpoint, config: EngineConfig, backend: Backend, threads: int, progress: Progress
) -> Model:
    """The rank's share of the model, loaded on so many threads; torch uses that many afterwards."""
    stored = stored_bytes(checkpoint) // (backend.mesh.size * backend.mesh.stages)
    room = BYTES_AT_ONCE * checkpoint.spec.num_layers // max(stored, 1)
    on_cpu = backend.ops.device.type == "cpu"
    at_once = max(min(threads, LAYERS_AT_ONCE, room), 1) if on_cpu else 1
    small = stored <= SMALL_MODEL
    torch.set_num_threads(1 if small else max(threads // at_once, 1))
    model = load_model(checkpoint, config, backend.ops, progress, at_once, backend.mesh)
    torch.set_num_threads(threads)
    return model


def stored_bytes(checkpoint: Checkpoint) -> int:
    """The size of its weights on disk; 0 if it has none."""
    if checkpoint.format == "safetensors":
        files = [file for file in weight_files(checkpoint.path) if file.exists()]
    else:
        files = [part.path for part in checkpoint.gguf.parts] if checkpoint.gguf else []
    return sum(file.stat().st_size for file in files)


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors held by a tree of dataclasses and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, Sequence) and not isinstance(value, str | range):
        for item in value:
            yield from tensors_of(item)


def distinct(tensors: Iterator[Tensor]) -> list[Tensor]:
    """Each tensor once: tied weights share theirs."""
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())

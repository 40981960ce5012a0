"""A model whose layers see differently far, from start-up to tokens, in a cache that is too small
for what it is asked: transformers is the oracle."""

from __future__ import annotations

import pytest
import torch
from fakes import emissions_of
from tiny import VOCAB, make_reference

from ruvon.config import EngineConfig
from ruvon.engine.grouped_pool import most_blocks
from ruvon.engine.startup import start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.models.vocab import byte_vocab
from ruvon.telemetry import silent

KERNELS = ["torch", "cpu"]
if torch.cuda.is_available():
    KERNELS.append("triton")

LENGTHS = (3, 61, 75, 33, 90, 16, 64, 80)
NEW = 30  # tokens
MODELS = {  # windows of the cache groups, and bytes of a block's keys and values in float32
    "qwen2-window": ((0, 7, 7), 2 * 1 * 16 * 2 * 16 * 4),  # groups of one layer
    "gemma3": ((0, 7), 2 * 2 * 16 * 2 * 32 * 4),  # of two layers, with heads of 32
}
AMPLE = 150  # blocks


def prompt(i, length):
    """The even ones begin alike."""
    own = tuple((7 * i + 3 * at) % (VOCAB - 2) + 2 for at in range(length))
    shared = tuple((5 * at) % (VOCAB - 2) + 2 for at in range(48))
    return own if i % 2 else (*shared, *own)[:length]


PROMPTS = [prompt(i, length) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=MODELS)
def reference(request):
    model = make_reference(request.param)
    model.name = request.param
    return model


@pytest.fixture(scope="module")
def expected(reference):
    """What greedy continuation gives."""
    outputs = []
    for tokens in PROMPTS:
        whole = reference.generate(
            torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        outputs.append(whole[0, len(tokens) :].tolist())
    return outputs


@pytest.fixture(params=[(kernels, tight) for kernels in KERNELS for tight in (True, False)])
def loaded(request, reference, tmp_path):
    kernels, tight = request.param
    windows, block_bytes = MODELS[reference.name]
    num_blocks = most_blocks(128, 16, windows, 24) + 6 if tight else AMPLE
    reference.save_pretrained(tmp_path)
    byte_vocab().backend.save(str(tmp_path / "tokenizer.json"))  # any will do
    on_gpu = kernels == "triton"
    config = EngineConfig(
        model=str(tmp_path), kernels=kernels, device="cuda" if on_gpu else "cpu", threads=1,
        dtype="float32", block_size=16, max_num_seqs=6, max_num_batched_tokens=24,
        kv_cache_memory=str((num_blocks + 1) * block_bytes),
    )  # fmt: skip
    loaded = start_engine(config, silent)
    assert loaded.memory.windows == windows
    assert loaded.memory.num_blocks == num_blocks
    yield loaded
    loaded.close()


def answers(engine):
    """Output tokens by prompt, all asked at once."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for i, tokens in enumerate(PROMPTS):
        engine.add(Job(tokens, sampling), 0.0, i)
    outputs = [[] for _ in PROMPTS]
    for emission in emissions_of(engine):
        assert emission.error is None
        outputs[emission.index] += emission.tokens
    return outputs


def test_tokens_are_right_whatever_leaves_the_window(loaded, expected):
    """In chunks, with sequences preempted or prefixes found; then again, on what is left."""
    for _ in range(2):
        assert answers(loaded.engine) == expected
    counters = loaded.engine._scheduler.counters
    if loaded.memory.num_blocks < AMPLE:
        assert counters.preempted
    else:
        assert counters.cached >= sum(length // 16 * 16 - 16 for length in LENGTHS)


def test_the_cache_holds_more_than_as_many_blocks_of_all_layers_would(loaded):
    memory = loaded.memory
    assert loaded.engine.max_model_len == memory.max_model_len == 128
    needed = sum(8 if window == 0 else 2 for window in memory.windows)
    assert memory.max_concurrency == memory.num_blocks / needed
    assert needed < 8 * len(memory.windows)

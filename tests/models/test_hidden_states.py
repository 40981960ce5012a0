"""Pooled hidden states against transformers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import make_reference

from ruvon.config import EngineConfig
from ruvon.engine.startup import LoadedEngine, start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.models.vocab import byte_vocab
from ruvon.telemetry import silent

PROMPT = tuple(n * 7 % 61 + 2 for n in range(45))
CHAT = Job(PROMPT[:9], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
SCORED = SamplingParams(max_tokens=0)


def run(loaded: LoadedEngine, *jobs: Job) -> dict[int, np.ndarray]:
    """What is pooled of each job."""
    engine = loaded.engine
    for number, job in enumerate(jobs):
        engine.add(engine.prepare(job), 0.0, number)
    pooled = {}
    while (pending := engine.launch(0.0)) is not None:
        for emission in engine.collect(pending):
            assert emission.error is None
            if emission.pooled is not None:
                pooled[emission.index] = emission.pooled
    return pooled


@pytest.mark.parametrize("name", ["gpt2", "llama-biased", "qwen3", "gemma3"])
@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_pooled_states_are_those_of_transformers(tmp_path, name, kernels):
    reference = make_reference(name)
    reference.save_pretrained(tmp_path)
    byte_vocab().backend.save(str(tmp_path / "tokenizer.json"))  # any will do
    with torch.inference_mode():
        hidden = reference.base_model(torch.tensor([PROMPT])).last_hidden_state[0].double().numpy()
    config = EngineConfig(
        model=str(tmp_path), device="cpu", kernels=kernels, threads=1, dtype="float32",
        kv_cache_memory="1MiB", max_num_seqs=4, max_num_batched_tokens=20,
    )  # fmt: skip
    loaded = start_engine(config, silent)
    try:
        jobs = [Job(PROMPT, SCORED, pooling=pooling) for pooling in ("mean", "last")]
        pooled = run(loaded, CHAT, *jobs, CHAT)
        again = run(loaded, *jobs)
    finally:
        loaded.close()
    for found in ([pooled[1], pooled[2]], [again[0], again[1]]):
        np.testing.assert_allclose(found[0] / len(PROMPT), hidden.mean(0), atol=2e-4)
        np.testing.assert_allclose(found[1], hidden[-1], atol=2e-4)

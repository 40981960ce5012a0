"""A model's own sampling, as SamplingParams has it."""

from __future__ import annotations

import pytest
from gguf_files import write_gguf
from structlog.testing import capture_logs
from tiny import make_reference

from ruvon.config import EngineConfig
from ruvon.errors import LoadError
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.defaults import sampling_defaults
from ruvon.telemetry import silent


@pytest.mark.parametrize(
    ("generation", "defaults"),
    [
        ({}, {}),
        ({"top_p": None, "max_length": 20, "eos_token_id": 3}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_p": 1, "temperature": 0.0}, {"top_p": 1, "temperature": 0.0}),
        ({"temperature": "0.7", "top_k": "5"}, {"temperature": 0.7, "top_k": 5}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ],
)
def test_values_get_the_types_that_requests_have(generation, defaults):
    found = sampling_defaults(generation)
    assert found == defaults
    assert isinstance(found.get("top_k", 0), int)


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": [0.7]},
        {"top_k": 0.5},
        {"top_k": float("inf")},
        {"top_k": float("nan")},
    ],
)
def test_what_is_no_number_is_refused_by_name(generation):
    (name,) = generation
    with pytest.raises(LoadError, match=f"generation_config.json: {name}"):
        sampling_defaults(generation)


def test_what_is_not_done_is_named():
    with capture_logs() as logs:
        sampling_defaults({"num_beams": 4, "suppress_tokens": [7], "no_repeat_ngram_size": 0})
        sampling_defaults({"num_beams": 1, "guidance_scale": None})
        sampling_defaults({"max_new_tokens": 2048})
    assert [entry["keys"] for entry in logs] == [
        ["num_beams", "suppress_tokens"], ["max_new_tokens"]
    ]  # fmt: skip


def test_gguf_metadata_may_hold_them(tmp_path):
    stated = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_p": 0.95,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.05,
    }
    write_gguf(tmp_path / "a.gguf", make_reference("llama2"), "llama", metadata=stated)
    checkpoint = open_checkpoint(EngineConfig(model=str(tmp_path / "a.gguf")), silent)
    assert sampling_defaults(checkpoint.generation) == {
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05,
    }  # fmt: skip

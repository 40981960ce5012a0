"""From settings to a running engine, with a small model of random weights."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from fakes import TINY_LLAMA
from structlog.testing import capture_logs

from ruvon import models
from ruvon.config import EngineConfig
from ruvon.engine import backends, loading, startup
from ruvon.engine.backends import check_experts, choose_device
from ruvon.engine.loading import distinct, tensors_of
from ruvon.engine.ranks import start as ranks_start
from ruvon.engine.startup import start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.errors import ConfigError, LoadError
from ruvon.kernels.reference import make_torch_ops
from ruvon.models.spec import spec_from_config
from ruvon.telemetry import silent


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return tmp_path


def settings(folder, **given) -> EngineConfig:
    fixed = {"device": "cpu", "threads": 1, "kernels": "torch", "kv_cache_memory": "1MiB"}
    given = fixed | given
    return EngineConfig(model=str(folder), load_format="dummy", **given)


def drain(engine) -> list[int]:
    """Run what is queued to its end; all tokens."""
    tokens = []
    while (pending := engine.launch(0.0)) is not None:
        for emission in engine.collect(pending):
            assert emission.error is None
            tokens += emission.tokens
    return tokens


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_gpu_does_at_start_is_not_counted(folder):
    loaded = start_engine(settings(folder, device="cuda", kernels="auto"), silent)
    counts = {name: value() for name, (_, value) in loaded.runner.counters.items()}
    loaded.close()
    assert counts == {"graph_misses": 0, "kernel_compilations": 0}


def test_an_engine_starts_says_what_it_is_and_runs(folder):
    phases = []
    loaded = start_engine(settings(folder), lambda phase, share: phases.append((phase, share)))
    assert (loaded.device, loaded.kernels, loaded.dtype) == ("cpu", "torch", "float32")
    assert loaded.threads == torch.get_num_threads() == 1
    assert loaded.memory.block_bytes == 16 * 2 * 2 * 2 * 16 * 4
    assert loaded.memory.num_blocks == 2**20 // (16 * 512) - 1
    embedding = 320 * 64
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64
    rope = 2 * 128 * 8
    assert loaded.memory.weight_bytes == 4 * (embedding + 2 * layer + 64 + rope)
    assert loaded.engine.max_model_len == 128
    assert loaded.engine.config.device == "cpu"
    assert list(dict.fromkeys(phase for phase, _ in phases)) == [
        "opening model",
        "loading weights",
        "warming up",
    ]
    assert all(0 <= share <= 1 for _, share in phases)
    loaded.engine.add(Job((1, 2, 3), SamplingParams(temperature=0, max_tokens=5)), 0.0)
    assert len(drain(loaded.engine)) in range(1, 6)
    loaded.close()


MIXTURE = TINY_LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "tie_word_embeddings": False,
}


def test_a_mixture_starts_and_counts_all_its_experts(folder):
    (folder / "config.json").write_text(json.dumps(MIXTURE))
    loaded = start_engine(settings(folder), silent)
    table = 320 * 64
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 2 * 64 + 2 * 16 + 5 * 64 + 5 * 3 * 64 * 32
    rope = 2 * 128 * 8
    assert loaded.memory.weight_bytes == 4 * (2 * table + 2 * layer + 64 + rope)
    loaded.engine.add(Job((1, 2, 3), SamplingParams(temperature=0, max_tokens=5)), 0.0)
    assert len(drain(loaded.engine)) in range(1, 6)
    loaded.close()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_gpu_refuses_to_quantize_the_experts_of_a_mixture(scheme):
    spec, ops = spec_from_config(MIXTURE), make_torch_ops(torch.float32, torch.device("cpu"))
    gpu = replace(backends.eager(ops), graphs=True, quantized=True)
    with pytest.raises(ConfigError, match=f"--quantization {scheme}: a GPU computes the experts"):
        backends.refuse_idle(spec, EngineConfig(quantization=scheme), gpu)
    dense = replace(spec, experts=None)
    backends.refuse_idle(dense, EngineConfig(quantization=scheme), gpu)


def test_kernels_without_experts_refuse_them_by_name_or_make_way(folder, monkeypatch):
    def without(spec, ops):
        check_experts(spec, replace(ops, experts=None))

    (folder / "config.json").write_text(json.dumps(MIXTURE))
    monkeypatch.setattr(backends, "check_experts", without)
    before = threading.active_count()
    with pytest.raises(
        ConfigError, match=r"the kernels 'cpu.*' do not compute mixtures of experts"
    ):
        start_engine(settings(folder, kernels="cpu"), silent)
    assert threading.active_count() == before
    with capture_logs() as logs:
        loaded = start_engine(settings(folder, kernels="auto"), silent)
    loaded.close()
    assert loaded.kernels == "torch"
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["slow_kernels"]


def test_layers_of_a_large_model_are_loaded_one_by_one(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "load_model", lambda *arguments: asked.append(arguments[4]))
    monkeypatch.setattr(loading, "stored_bytes", lambda checkpoint: 14 << 30)
    with pytest.raises(AttributeError):  # there is no model
        start_engine(settings(folder, threads=4), silent)
    assert asked == [1]


def test_ends_that_are_no_tokens_end_nothing(folder):
    config = TINY_LLAMA | {"eos_token_id": [7, 320, -1]}  # of 320
    (folder / "config.json").write_text(json.dumps(config))
    loaded = start_engine(settings(folder), lambda phase, share: None)
    assert loaded.eos_token_ids == (7,)
    held_off = SamplingParams(temperature=0, max_tokens=3, min_tokens=3)
    loaded.engine.add(Job((1, 2, 3), held_off), 0.0)
    assert len(drain(loaded.engine)) == 3
    loaded.close()


def test_a_models_own_sampling_is_read_and_checked_once(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"temperature": "0.7", "top_k": 50.0, "max_length": 9}))
    loaded = start_engine(settings(folder), lambda phase, share: None)
    loaded.close()
    assert loaded.defaults == {"temperature": 0.7, "top_k": 50}
    path.write_text(json.dumps({"top_p": 1.5}))
    with pytest.raises(LoadError, match=r"sampling defaults: top_p must be from 0 to 1.*--generat"):
        start_engine(settings(folder), lambda phase, share: None)
    without = settings(folder, generation_config="none")
    loaded = start_engine(without, lambda phase, share: None)
    loaded.close()
    assert loaded.defaults == {}


@pytest.mark.parametrize(("threads", "at_once"), [(1, 1), (3, 3), (9, 4)])
def test_layers_are_loaded_side_by_side(folder, monkeypatch, threads, at_once):
    asked = []

    def load_model(*arguments):
        asked.append(arguments[4])
        return models.load_model(*arguments)

    monkeypatch.setattr(loading, "load_model", load_model)
    loaded = start_engine(settings(folder, threads=threads), lambda phase, share: None)
    loaded.close()
    assert asked == [at_once]
    assert torch.get_num_threads() == threads


def test_tensors_are_found_without_counting_through_ranges():
    tensor = torch.ones(2)
    assert [*loading.tensors_of((range(1 << 60), "text", [tensor]))] == [tensor]


def test_more_ranks_than_a_model_has_parts_for_are_refused_before_any_starts(folder, monkeypatch):
    monkeypatch.setattr(ranks_start, "spawn", None)
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 4: .* for 1 to 3"):
        start_engine(settings(folder, tensor_parallel_size=4), lambda phase, share: None)
    with pytest.raises(ConfigError, match="--pipeline-parallel-size 3: a model of 2 layers"):
        start_engine(settings(folder, pipeline_parallel_size=3), lambda phase, share: None)


def test_a_vocabulary_that_cannot_be_used_is_said(folder):
    (folder / "tokenizer.json").write_text("{}")
    before = threading.active_count()
    with pytest.raises(LoadError, match=r"tokenizer\.json"):
        start_engine(settings(folder), lambda phase, share: None)
    assert threading.active_count() == before


def test_memory_is_planned_from_what_is_free(folder, monkeypatch):
    monkeypatch.setattr(startup, "free_for_cache", lambda *_: 100 * 512)
    loaded = start_engine(settings(folder, kv_cache_memory=None), lambda phase, share: None)
    loaded.close()
    assert loaded.memory.num_tokens == 80
    assert loaded.engine.max_model_len == 80


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_a_model_that_cannot_run_leaves_no_thread(folder, monkeypatch, kernels):
    def broken(*arguments, **named):
        raise ArithmeticError("broken")

    before = threading.active_count()
    monkeypatch.setattr("ruvon.models.decoder.Decoder.forward", broken)
    with pytest.raises(ArithmeticError):
        start_engine(settings(folder, kernels=kernels, threads=2), lambda phase, share: None)
    assert threading.active_count() == before


SHORTAGES = [
    MemoryError("Unable to allocate 40.3 MiB for an array"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_too_little_memory_for_the_model_is_said(folder, monkeypatch, error):
    def load_model(*arguments):
        raise error

    monkeypatch.setattr(loading, "load_model", load_model)
    with pytest.raises(LoadError, match=r"memory does not suffice \(.*alloc"):
        start_engine(settings(folder), lambda phase, share: None)


def test_closing_ends_every_thread(folder):
    before = threading.active_count()
    loaded = start_engine(settings(folder, kernels="cpu", threads=2), lambda phase, share: None)
    assert threading.active_count() == before + 2  # one launches steps, one helps it
    loaded.close()
    assert threading.active_count() == before


def test_kernels_that_cannot_do_it_are_refused_or_replaced(folder):
    """The CPU kernels read the cache sixteen tokens at a time."""
    with pytest.raises(ConfigError, match="--block-size 8"):
        start_engine(settings(folder, kernels="cpu", block_size=8), lambda phase, share: None)
    given = settings(folder, kernels="auto", device="cpu", block_size=8)
    with capture_logs() as logs:
        loaded = start_engine(given, lambda phase, share: None)
    loaded.close()
    assert loaded.kernels == "torch"
    (warning,) = logs
    assert (warning["log_level"], warning["event"]) == ("warning", "slow_kernels")
    assert "--block-size 8" in warning["reason"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantization": "int8"}, "--quantization int8: the kernels 'torch' compute with plain"),
        ({"quantization": "int4"}, "--quantization int4: the kernels 'torch' compute with plain"),
        ({"pin_threads": "on"}, "--pin-threads on: the kernels 'torch'"),
        (
            {"cpu_isa": "portable", "kernels": "auto", "block_size": 8},
            "--block-size 8",  # not slower kernels without that set
        ),
        ({"gpu_memory_utilization": 0.5}, "--gpu-memory-utilization 0.5: there is no GPU in use"),
    ],
)
def test_what_would_do_nothing_is_refused(folder, given, message):
    with pytest.raises(ConfigError, match=message):
        start_engine(settings(folder, **given), lambda phase, share: None)


def test_an_instruction_set_is_one_for_the_cpu_kernels(folder):
    loaded = start_engine(
        settings(folder, kernels="cpu", cpu_isa="portable"), lambda phase, share: None
    )
    loaded.close()
    assert loaded.kernels == "cpu, portable"


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(LoadError, match="nowhere"):
        start_engine(settings(tmp_path / "nowhere.gguf"), lambda phase, share: None)


@pytest.mark.parametrize(
    ("given", "has_gpu", "expected"),
    [
        ({}, False, "cpu"),
        ({}, True, "cuda"),
        ({"device": "cpu"}, True, "cpu"),
        ({"device": "cuda"}, True, "cuda"),
        ({"kernels": "torch"}, True, "cuda"),
        ({"kernels": "cpu"}, True, "cpu"),
        ({"kernels": "triton"}, True, "cuda"),
        ({"device": "cuda"}, False, "--device cuda"),
        ({"kernels": "triton"}, False, "--kernels triton"),
    ],
)
def test_the_device_follows_settings_and_machine(monkeypatch, given, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = EngineConfig(**given)
    if expected.startswith("--"):
        with pytest.raises(ConfigError, match=expected):
            choose_device(config)
    else:
        assert choose_device(config).type == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(folder, dtype):
    loaded = start_engine(settings(folder, dtype=dtype), lambda phase, share: None)
    assert loaded.memory.block_bytes == 16 * 2 * 2 * 2 * 16 * 2
    loaded.engine.add(Job((1, 2, 3), SamplingParams(temperature=0, max_tokens=3)), 0.0)
    assert drain(loaded.engine)
    loaded.close()


def test_tied_weights_count_once():
    shared, own = torch.zeros(3), torch.zeros(2)
    assert len(distinct(tensors_of([(shared, "a name"), [shared, own], None]))) == 2

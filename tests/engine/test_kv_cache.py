"""How much fits, with numbers a reader can check by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ruvon.config import EngineConfig
from ruvon.engine import kv_cache
from ruvon.engine.kv_cache import (
    KVFormat,
    MemoryPlan,
    allocate_cache,
    free_for_cache,
    lazy_zeros,
    plan_memory,
    step_bytes,
)
from ruvon.errors import ConfigError
from ruvon.kernels.ops import ExpertsSpec
from ruvon.models.spec import ModelSpec

SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=64,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=128,
    max_positions=1000,
    norm="rms",
    norm_eps=1e-5,
    activation="silu_gated",
    rope=None,
    learned_positions=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(0, 0, 0, 0),
    tie_embeddings=True,
    eos_token_ids=(2,),
    dtype="float32",
)
PER_TOKEN = 2 * 4 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32: 512 bytes


def plan(free_bytes=10**9, spec=SPEC, dtype=torch.float32, **settings) -> MemoryPlan:
    config = EngineConfig(**settings)
    return plan_memory(spec, config, KVFormat(dtype), weight_bytes=7, free_bytes=free_bytes)


def test_the_given_memory_is_used_and_never_exceeded():
    found = plan(kv_cache_memory="1MiB", free_bytes=0)
    assert found.block_bytes == 16 * PER_TOKEN
    assert found.num_blocks == 2**20 // (16 * PER_TOKEN) - 1  # block 0 is nobody's
    assert found.cache_bytes == 2**20
    assert found.max_model_len == 1000
    assert found.max_concurrency == pytest.approx(127 / 63)  # of 63 blocks each
    assert found.num_tokens == 2015
    assert plan(kv_cache_memory=str(2**20 - 1)).num_blocks == found.num_blocks - 1


def test_half_the_bytes_are_twice_the_blocks():
    whole, half = (plan(kv_cache_memory="1MiB", dtype=d) for d in (torch.float32, torch.float16))
    assert half.num_blocks + 1 == 2 * (whole.num_blocks + 1)


def test_padded_heads_take_the_room_they_take():
    config = EngineConfig(kv_cache_memory="1MiB")
    kv = KVFormat(torch.float16, multiple=16)
    found = plan_memory(SPEC, config, kv, weight_bytes=0, free_bytes=0)
    assert found.block_bytes == 16 * 2 * 4 * 2 * 16 * 2
    cache = allocate_cache(SPEC, found, torch.device("cpu"))
    assert cache[0][0].shape == (found.num_blocks + 1, 2, 16, 16)


def test_without_a_size_free_memory_is_taken_up_to_what_could_be_used():
    assert plan(free_bytes=2**20).num_blocks == 127
    useful = plan(max_num_seqs=3)
    assert useful.num_blocks == 3 * 63  # 1000 tokens take 63 blocks of 16
    assert plan(max_num_seqs=3, max_model_len=32).num_blocks == 3 * 2


def test_the_greatest_length_shrinks_to_what_fits_unless_it_was_asked_for():
    assert plan(free_bytes=56 * PER_TOKEN).max_model_len == 32
    with pytest.raises(ConfigError, match=r"--kv-cache-memory.*--max-model-len"):
        plan(free_bytes=56 * PER_TOKEN, max_model_len=33)
    with pytest.raises(ConfigError, match=r"17KB holds 16 tokens.* of 32 takes 24,576 bytes"):
        plan(kv_cache_memory="17KB", max_model_len=17)
    assert plan(kv_cache_memory="24KiB", max_model_len=17).max_model_len == 17


def test_no_block_at_all_is_an_error():
    with pytest.raises(ConfigError, match="--kv-cache-memory"):
        plan(kv_cache_memory="1KiB")


def test_a_step_on_a_gpu_is_counted_by_its_tokens_sequences_and_dtype():
    def size(dtype=torch.bfloat16, quantization="none", **settings):
        config = EngineConfig(device="cuda", quantization=quantization, **settings)
        return step_bytes(SPEC, config, dtype)

    token = 10 * SPEC.hidden_size + 4 * SPEC.intermediate_size
    logits = 4 * SPEC.vocab_size
    assert size() == 2 * 8192 * 2 * token + 3 * 256 * logits
    plain = 2 * SPEC.hidden_size * SPEC.intermediate_size
    assert size(quantization="int8") - size() == 2 * 2 * plain, "one weight's plain numbers"
    assert size(max_num_batched_tokens=4096) == 2 * 4096 * 2 * token + 3 * 256 * logits
    assert size(max_num_seqs=8) == 2 * 8192 * 2 * token + 3 * 8 * logits
    assert size(torch.float32) - size() == 2 * 8192 * 2 * token
    few = {"max_num_batched_tokens": 300, "max_num_seqs": 1}
    assert size(enable_chunked_prefill=False, **few) == size(**few)


def test_a_step_of_a_mixture_holds_what_each_chosen_expert_makes():
    experts = ExpertsSpec(8, 3, SPEC.intermediate_size, "silu_gated")
    few = EngineConfig(device="cuda", max_num_batched_tokens=300, max_num_seqs=1)
    dense, mixed = (
        step_bytes(spec, few, torch.bfloat16)
        for spec in (SPEC, dataclasses.replace(SPEC, experts=experts))
    )
    per_token = 3 * (2 * SPEC.hidden_size + 4 * SPEC.intermediate_size)
    assert mixed - dense == 2 * 300 * 2 * (per_token - 4 * SPEC.intermediate_size)


def test_a_cache_on_a_gpu_takes_what_weights_and_steps_leave(monkeypatch):
    ops = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    config = EngineConfig(device="cuda", gpu_memory_utilization=0.5)
    step = step_bytes(SPEC, config, torch.bfloat16)
    used = 1000

    def free(total, config=config):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - used, total))
        return free_for_cache(ops, config, SPEC)

    assert free(2 * (step + used + 7)) == 7
    with pytest.raises(ConfigError, match=r"256 sequences and 8192 tokens.*--max-num-batched"):
        free(2 * (step + used))
    given = dataclasses.replace(config, kv_cache_memory="1MiB")
    assert free(2 * step, given) == 0  # nobody asks for it


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_memory_than_there_is_is_refused(monkeypatch, device):
    ops = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**40))
    free_for_cache(ops, EngineConfig(kv_cache_memory="1GiB"), SPEC)
    with pytest.raises(
        ConfigError, match=r"--kv-cache-memory: 900GiB is more than .*1,073,741,824"
    ):
        free_for_cache(ops, EngineConfig(kv_cache_memory="900GiB"), SPEC)


def test_memory_that_the_system_does_not_give_is_said():
    planned = plan(kv_cache_memory=str(2**52))
    with pytest.raises(ConfigError, match=r"no memory for a cache of 4,503,.*--kv-cache-memory"):
        allocate_cache(SPEC, planned, torch.device("cpu"))


def test_more_positions_than_the_model_has_are_refused():
    assert plan(max_model_len=1000).max_model_len == 1000
    with pytest.raises(ConfigError, match=r"--max-model-len 1001.*1000 positions"):
        plan(max_model_len=1001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_tensors_are_zero_aligned_and_as_planned(dtype):
    planned = plan(kv_cache_memory="64KiB", dtype=dtype)
    cache = allocate_cache(SPEC, planned, torch.device("cpu"))
    assert len(cache) == SPEC.num_layers
    tensors = [tensor for layer in cache for tensor in layer]
    assert sum(tensor.nbytes for tensor in tensors) == planned.cache_bytes
    for tensor in tensors:
        assert tensor.shape == (planned.num_blocks + 1, 2, 16, 8)
        assert tensor.dtype == dtype
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()


def test_a_gpu_s_tensors_are_one_and_as_large_as_planned():
    planned = plan(kv_cache_memory="64KiB")
    cache = allocate_cache(SPEC, planned, torch.device("meta"))  # as on any that is not the CPU
    assert len(cache) == SPEC.num_layers
    shared = cache[0][0].untyped_storage()
    assert shared.nbytes() == planned.cache_bytes
    starts = [tensor.storage_offset() for layer in cache for tensor in layer]
    assert starts == [tensor * cache[0][0].numel() for tensor in range(2 * SPEC.num_layers)]


def test_untouched_memory_is_not_taken():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    tensor = lazy_zeros((1 << 28,), torch.float32)
    assert resident() - before < 1 << 26
    assert tensor[-1] == 0


def test_a_plan_is_a_value():
    assert plan() == plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().num_blocks = 3  # type: ignore[misc]

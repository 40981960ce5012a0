"""gpt-oss against transformers', on tiny checkpoints with real MXFP4 blocks."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from paged import PagedSequences
from safetensors.torch import load_file, save_file
from tiny import load
from tiny_gpt_oss import (
    CONFIG,
    EXPERTS,
    HIDDEN,
    LAYERS,
    ORIGINAL_CONFIG,
    TOP_K,
    VOCAB,
    WIDTH,
    WINDOW,
    YARN,
    make_reference,
    save,
    save_gguf,
    save_gpt_oss,
)
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from ruvon.config import EngineConfig
from ruvon.engine.startup import start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.errors import LoadError
from ruvon.kernels.ops import AttentionSpec, ExpertsSpec, Mxfp4
from ruvon.kernels.reference import attend_one, make_torch_ops, route
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.rope import make_rope
from ruvon.models.spec import spec_from_config
from ruvon.models.tokenizer import load_tokenizer
from ruvon.models.vocab import byte_vocab
from ruvon.telemetry import silent

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
TOKENS = random.Random(0).choices(range(3, VOCAB), k=70)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return save_gpt_oss(tmp_path_factory.mktemp("gpt-oss"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def want(folder):
    """transformers' logits of `TOKENS`."""
    return logits_of(make_reference(folder))


def logits_of(reference):
    with torch.inference_mode():
        return reference(torch.tensor([TOKENS])).logits[0].float()


def logits(model, cuts=(0, 70)):
    run = PagedSequences(model)
    return torch.cat([run.step({0: TOKENS[a:b]}) for a, b in itertools.pairwise(cuts)])


@pytest.mark.parametrize(
    "cuts", [(0, 70), (0, 1, 12, 17, 33, 64, 70), (0, 60, *range(61, 71))], ids=str
)
def test_whole_in_chunks_and_cached(model, want, cuts):
    torch.testing.assert_close(logits(model, cuts), want, **TOLERANCE)


def test_openais_layout_holds_the_same_model(folder, model):
    assert torch.equal(logits(load(folder / "original")), logits(model))
    assert load(folder / "original").spec == replace(model.spec, eos_token_ids=())


def test_openais_reference_agrees(folder):
    """Where PyPI's gpt-oss is on the path; it wants Python 3.12, but its model runs on any."""
    theirs = pytest.importorskip("gpt_oss.torch.model", reason="needs PyPI's gpt-oss")
    path, device = str(folder / "original"), torch.device("cpu")
    reference = theirs.Transformer.from_checkpoint(path, device=device).float()
    with torch.no_grad():
        want = reference(torch.tensor(TOKENS))
    torch.testing.assert_close(logits(load(folder / "original")), want, **TOLERANCE)


def test_openais_layout_in_shards_beside_the_words(folder, model, tmp_path):
    """As the hub has the 120b: vocabulary and defaults lie in the folder above."""
    tensors = load_file(folder / "original" / "model.safetensors")
    save(tmp_path / "original", ORIGINAL_CONFIG, {})
    (tmp_path / "original" / "model.safetensors").unlink()
    halves = list(tensors)[::2], list(tensors)[1::2]
    for number, names in enumerate(halves, start=1):
        path = tmp_path / "original" / f"model--0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    byte_vocab().backend.save(str(tmp_path / "tokenizer.json"))
    found = load(tmp_path / "original")
    assert torch.equal(logits(found), logits(model))
    assert found.spec.eos_token_ids == (2, 5)
    config = EngineConfig(model=str(tmp_path / "original"))
    tokenizer = load_tokenizer(open_checkpoint(config, silent))
    assert tokenizer.vocab_size == byte_vocab().backend.get_vocab_size()


def test_llama_cpps_form_holds_the_same_model(model, tmp_path):
    save_gguf(tmp_path / "tiny.gguf")
    found = load(tmp_path / "tiny.gguf")
    assert found.spec.windows == model.spec.windows
    assert found.spec.experts == model.spec.experts
    assert found.spec.rope.scaling.truncate is False
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=0)


def test_bfloat16_is_near_float32(folder, want):
    """By divergence: of random weights' logits the greatest is often a near tie."""
    ops = make_torch_ops(torch.bfloat16, torch.device("cpu"))
    config = EngineConfig(model=str(folder))
    model = load_model(open_checkpoint(config, silent), config, ops, silent)
    run = PagedSequences(model)
    run.cache = [(k.bfloat16(), v.bfloat16()) for k, v in run.cache]
    found = run.step({0: TOKENS}).log_softmax(-1)
    right = want.log_softmax(-1)
    divergence = (right.exp() * (right - found)).sum(-1)
    assert divergence.mean() < 5e-3
    assert divergence.max() < 3e-2


def test_plain_experts_of_transformers(folder, model, want, tmp_path):
    """Dequantized experts come transposed, gates and ups in turns."""
    tensors = load_file(folder / "model.safetensors")
    for layer, (name, rows) in itertools.product(
        range(LAYERS), [("gate_up_proj", 2 * WIDTH), ("down_proj", HIDDEN)]
    ):
        key = f"model.layers.{layer}.mlp.experts.{name}"
        codes, scales = (tensors.pop(f"{key}_{kind}") for kind in ("blocks", "scales"))
        plain = Mxfp4(codes.flatten(0, 1), scales.flatten(0, 1)).dequantize()
        tensors[key] = plain.view(EXPERTS, rows, -1).transpose(1, 2).bfloat16()
    save(tmp_path, {**CONFIG, "quantization_config": None}, tensors)
    torch.testing.assert_close(logits(load(tmp_path)), want, **TOLERANCE)


# ------------------------------------------------- what others got wrong, a test each


def test_sinks_take_their_share():
    """Of n keys that score 0 and values of 1 a head gets n / (n + exp(sink))."""
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, scale=1.0)
    q, k, v = torch.zeros(3, 2, 4), torch.zeros(1, 3, 4), torch.ones(1, 3, 4)
    sinks = torch.tensor([0.0, 2.0])
    found = attend_one(q, k, v, spec, sinks)[..., 0]
    n = torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(found, n / (n + sinks.exp()))


def test_no_sink_is_dropped(folder, model, want):
    layers = [replace(layer, attention=replace(layer.attention, sinks_H=None))
              for layer in model.layers]  # fmt: skip
    without = replace(model, layers=tuple(layers))
    assert (logits(without) - want).abs().max() > 0.1


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_yarn_beyond_128_and_4096_positions(spelling):
    """Under both of the names that config.json has it by; exact, without whole dimensions."""
    given = {key: value for key, value in CONFIG.items() if not key.startswith("rope_")}
    if spelling == "rope_scaling":
        given |= {"rope_scaling": YARN, "rope_theta": 150000}
    else:
        given |= {"rope_parameters": {**YARN, "rope_theta": 150000}}
    spec = spec_from_config(given)
    rope = make_rope(spec.rope, spec.max_positions, torch.device("cpu"))
    assert len(rope.cos_PD) == 131072
    places = torch.tensor([[0, 1, 127, 128, 129, 4095, 4096, 4097, 40000, 131071]])
    theirs = GptOssRotaryEmbedding(GptOssConfig(**given))
    cos, sin = theirs(torch.zeros(1), places)
    torch.testing.assert_close(rope.cos_PD[places[0]], cos[0], **TOLERANCE)
    torch.testing.assert_close(rope.sin_PD[places[0]], sin[0], **TOLERANCE)
    assert theirs.attention_scaling == pytest.approx(1.3465735902799727)


def test_long_prompts_do_not_depend_on_chunk_sizes(folder, model):
    """Of 400 tokens, 25 windows."""
    tokens = random.Random(1).choices(range(3, VOCAB), k=400)
    with torch.inference_mode():
        want = make_reference(folder)(torch.tensor([tokens])).logits[0]
    for size in (23, 64, 256):
        run = PagedSequences(model)
        chunks = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        found = torch.cat([run.step({0: chunk}) for chunk in chunks])
        torch.testing.assert_close(found, want, **TOLERANCE)


def test_yarn_is_never_lost():
    given = {key: value for key, value in CONFIG.items() if not key.startswith("rope_")}
    with pytest.raises(LoadError, match="lacks 'rope_parameters'"):
        spec_from_config({**given, "rope_theta": 150000})


def test_layer_0_slides_and_layer_1_sees_everything():
    assert spec_from_config(CONFIG).windows == (WINDOW, 0) * (LAYERS // 2)
    silent_config = {**CONFIG, "layer_types": None}
    assert spec_from_config(silent_config).windows == (WINDOW, 0) * (LAYERS // 2)
    assert spec_from_config(ORIGINAL_CONFIG).windows == (WINDOW, 0) * (LAYERS // 2)


def test_router_chooses_in_float32():
    """Two logits that bfloat16 does not tell apart."""
    spec = ExpertsSpec(num_experts=3, top_k=2, width=4, activation="swiglu_clamped")
    weight = torch.tensor([[1.0, 0.0], [1.0, 2**-9], [0.0, 1.0]]).bfloat16()
    x = torch.ones(1, 2).bfloat16()
    chosen, weights = route(x, SimpleNamespace(tensors=(weight,)), None, spec)
    assert chosen[0, 0] == 1
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1))


def test_gates_are_clamped_from_above_only():
    """And so are they in these checkpoints: values beyond 7 occur."""
    ops = make_torch_ops(torch.float32, torch.device("cpu"))
    gate, up = torch.tensor([-100.0, 50.0, 50.0, 1.0]), torch.tensor([3.0, 50.0, -50.0, 0.0])
    eye = SimpleNamespace(tensors=(torch.eye(8),))
    found = ops.linear(torch.cat((gate, up)).unsqueeze(0), eye, None, "swiglu_clamped")
    seven = 7 * torch.sigmoid(torch.tensor(1.702 * 7))
    low = -100 * torch.sigmoid(torch.tensor(-170.2)) * 4
    one = torch.sigmoid(torch.tensor(1.702))
    torch.testing.assert_close(found[0], torch.stack((low, seven * 8, seven * -6, one)))


@pytest.mark.parametrize("stored", [2, [2], None])
def test_ends_of_a_turn_and_of_a_call_are_known_whatever_the_config_says(stored):
    spec = spec_from_config({**CONFIG, "vocab_size": 201088, "eos_token_id": stored})
    assert {200002, 200012, 199999} <= set(spec.eos_token_ids)


# -------------------------------------------------------------- what is refused, and kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit 5.0 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config 'gptq'"),
        (
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": "x"}},
            "modules_to_not_convert 'x' is not a list",
        ),
        ({"num_local_experts": None}, "lacks 'num_local_experts'"),
        ({"num_experts_per_tok": 9}, "9 of 8 experts a token make no sense"),
        ({"sliding_window": None}, "makes no sense"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(LoadError) as caught:
        spec_from_config({**CONFIG, **change})
    assert message in str(caught.value)


def test_mxfp4_is_gpt_oss_own():
    config = {**CONFIG, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    with pytest.raises(LoadError, match=r"'mxfp4' is not supported for LlamaForCausalLM"):
        spec_from_config(config)


def test_bytes_are_no_numbers(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name].float()
    save(tmp_path, CONFIG, tensors)
    with pytest.raises(LoadError, match=rf"{name} has the type torch\.float32"):
        load(tmp_path)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantizing_leaves_mxfp4_alone(folder, model, scheme):
    changed = load(folder, quantization=scheme)
    for mine, theirs in zip(model.layers, changed.layers, strict=True):
        assert torch.equal(mine.mixture.experts.tensors[0], theirs.mixture.experts.tensors[0])
        assert torch.equal(mine.mixture.router.tensors[0], theirs.mixture.router.tensors[0])
        assert not torch.equal(mine.qkv.weight.tensors[0], theirs.qkv.weight.tensors[0])
    plain = load(folder, quantization="none")
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("layout", [".", "original"])
def test_made_up_weights_have_the_true_form(folder, layout):
    """A benchmark's experts are packed as real ones are."""
    path = folder / layout
    first, second = (load(path, load_format="dummy", seed=seed) for seed in (0, 1))
    up, _ = (model.layers[0].mixture.experts.tensors[0] for model in (first, second))
    assert up.shape == (EXPERTS * 2 * WIDTH, HIDDEN)
    assert up.unique().numel() == 15  # values of e2m1, with one scale and one zero
    assert 0.01 < up.std() < 0.05
    assert torch.isfinite(logits(first)).all()
    assert logits(first).std() > 0.1
    assert not torch.equal(logits(first), logits(second))
    assert first.spec.experts.top_k == TOP_K


@pytest.mark.parametrize(("kernels", "error"), [("torch", 1e-3), ("cpu", 0.1)])
def test_the_engine_agrees_while_windows_move_on(folder, tmp_path, kernels, error):
    """A prompt in chunks and tokens one by one, in a cache that could not hold all that the sliding
    layers have seen: their blocks come back as they leave the window."""
    for path in folder.glob("*.*"):
        (tmp_path / path.name).symlink_to(path)
    byte_vocab().backend.save(str(tmp_path / "tokenizer.json"))
    config = EngineConfig(
        model=str(tmp_path), device="cpu", kernels=kernels, threads=1, dtype="float32",
        kv_cache_memory="192KiB", max_model_len=104, max_num_batched_tokens=20, max_num_seqs=2,
    )  # fmt: skip
    loaded = start_engine(config, silent)
    assert loaded.memory.num_blocks < 2 * 104 // config.block_size  # of two groups
    job = Job(tuple(TOKENS[:60]), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    loaded.engine.add(job, 0.0)
    drawn = []
    while (pending := loaded.engine.launch(0.0)) is not None:
        for emission in loaded.engine.collect(pending):
            assert emission.error is None
            drawn += emission.tokens
    loaded.close()
    assert len(drawn) == 40
    with torch.inference_mode():
        rows = make_reference(folder)(torch.tensor([[*TOKENS[:60], *drawn]])).logits[0, 59:-1]
    chosen = rows.gather(1, torch.tensor(drawn).unsqueeze(1))[:, 0]
    torch.testing.assert_close(chosen, rows.amax(-1), atol=error, rtol=0)

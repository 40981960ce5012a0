"""config.json and GGUF metadata to `ModelSpec`; what is not supported is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, DYNAMIC, EXPERTS, LINEAR, LLAMA3, SHAPE, YARN
from tiny_gpt_oss import CONFIG
from tiny_gpt_oss import YARN as OSS_YARN
from transformers import GptOssConfig, MistralConfig, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ruvon.errors import LoadError
from ruvon.models.rope import (
    Divisors,
    LinearScaling,
    Llama3Scaling,
    RopeSpec,
    make_rope,
    scaled_frequencies,
)
from ruvon.models.spec import spec_from_config
from ruvon.models.spec_gguf import spec_from_gguf

LLAMA = {**SHAPE, "architectures": ["LlamaForCausalLM"]}
QWEN = {**SHAPE, "architectures": ["Qwen2ForCausalLM"]}
GEMMA = {
    **SHAPE, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 168, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip


def test_real_llama_3_2_config():
    """As the hub has it: the older keys, a list of ends in generation_config.json."""
    spec = spec_from_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
        {"eos_token_id": [128001, 128009, 7]},
    )
    assert spec.rope.theta == 500000.0
    assert spec.rope.scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert spec.eos_token_ids == (128001, 128008, 128009, 7)
    assert (spec.dtype, spec.tie_embeddings, spec.head_dim) == ("bfloat16", True, 64)
    biases = (spec.qkv_bias, spec.output_bias, spec.mlp_bias)
    assert (*biases, spec.qk_norm) == (False,) * 4


@pytest.mark.parametrize("scaling", [None, LINEAR, DYNAMIC, LLAMA3, YARN], ids=str)
@pytest.mark.parametrize("old_keys", [False, True])
def test_rope_frequencies_as_transformers(scaling, old_keys):
    config = type(CONFIGS["llama2"])(**SHAPE, **({"rope_parameters": scaling} if scaling else {}))
    given = {**LLAMA, "rope_parameters": scaling}
    if old_keys and scaling:
        kind = {"type": scaling["rope_type"], **scaling}
        kind.pop("rope_type")
        given = {**LLAMA, "rope_theta": kind.pop("rope_theta"), "rope_scaling": kind}
    got, length = scaled_frequencies(spec_from_config(given).rope)
    if scaling is None:
        want, want_length = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16), 1.0
    else:
        want, want_length = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    torch.testing.assert_close(got, want, atol=0, rtol=1e-6)
    assert length == pytest.approx(want_length)


@pytest.mark.parametrize(
    "extra",
    [
        {"attention_factor": 1.5},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"beta_fast": 16, "beta_slow": 2},
        {"truncate": False},
    ],
    ids=str,
)
def test_yarn_options_as_transformers(extra):
    config = type(CONFIGS["llama2"])(**SHAPE, rope_parameters={**YARN, **extra})
    spec = spec_from_config({**LLAMA, "rope_parameters": {**YARN, **extra}})
    got, length = scaled_frequencies(spec.rope)
    want, want_length = ROPE_INIT_FUNCTIONS["yarn"](config)
    torch.testing.assert_close(got, want, atol=0, rtol=1e-6)
    assert length == pytest.approx(want_length)


def test_tables_hold_the_attention_factor():
    scaled = {**YARN, "attention_factor": 2.0}
    rope = make_rope(
        spec_from_config({**LLAMA, "rope_parameters": scaled}).rope, 10, torch.device("cpu")
    )
    assert rope.cos_PD.shape == rope.sin_PD.shape == (10, 8)
    torch.testing.assert_close(rope.cos_PD**2 + rope.sin_PD**2, torch.full((10, 8), 4.0))


def test_yarn_extends_the_context():
    short = {**LLAMA, "max_position_embeddings": 32, "rope_parameters": YARN}
    assert spec_from_config(short).max_positions == 128
    assert spec_from_config({**short, "max_position_embeddings": 500}).max_positions == 500


def test_dynamic_scaling_leaves_the_context_as_it_is():
    """Beyond it transformers turn by other frequencies, all positions anew."""
    dynamic = {**LLAMA, "rope_parameters": DYNAMIC}
    assert spec_from_config(dynamic).max_positions == SHAPE["max_position_embeddings"]
    longer = 2 * SHAPE["max_position_embeddings"]
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        type(CONFIGS["llama2"])(**SHAPE, rope_parameters=DYNAMIC), seq_len=longer
    )
    assert not torch.equal(scaled_frequencies(spec_from_config(dynamic).rope)[0], want)


def test_linear_scaling_extends_the_context():
    scaling = {"type": "linear", "factor": 4.0}
    short = {**LLAMA, "max_position_embeddings": 64, "rope_scaling": scaling}
    assert spec_from_config(short).max_positions == 256
    stated = {**scaling, "original_max_position_embeddings": 16}
    assert spec_from_config({**short, "rope_scaling": stated}).max_positions == 64


def test_original_positions_are_looked_for_where_transformers_looks():
    llama3 = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    without = spec_from_config({**LLAMA, "rope_parameters": llama3}).rope.scaling
    assert without.original_positions == SHAPE["max_position_embeddings"]
    outside = {**LLAMA, "rope_parameters": LLAMA3, "original_max_position_embeddings": 32}
    assert spec_from_config(outside).rope.scaling.original_positions == 32


def test_older_scaling_wins_as_in_transformers():
    both = {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": LLAMA3}
    assert spec_from_config({**LLAMA, **both}).rope.scaling == LinearScaling(4.0)


def test_the_mlp_of_gpt2_is_four_times_as_wide_unless_stated():
    config = CONFIGS["gpt2"].to_dict() | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
    }
    assert spec_from_config(config | {"n_inner": None}).intermediate_size == 4 * config["n_embd"]
    assert spec_from_config(config | {"n_inner": 40}).intermediate_size == 40


def test_the_heads_of_gpt2_share_its_width():
    spec = spec_from_config(CONFIGS["gpt2"].to_dict() | {"model_type": "gpt2"})
    assert spec.num_heads * spec.head_dim == spec.hidden_size


@pytest.mark.parametrize(
    ("architecture", "key", "field"),
    [
        ("MistralForCausalLM", "sliding_window", lambda spec: spec.windows[0]),
        ("Qwen3MoeForCausalLM", "norm_topk_prob", lambda spec: spec.experts.renormalize),
        ("GptOssForCausalLM", "attention_bias", lambda spec: spec.qkv_bias),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_config_does_not_say_is_as_in_transformers(architecture, key, field):
    known = {
        "MistralForCausalLM": (SHAPE, MistralConfig),
        "Qwen3MoeForCausalLM": (EXPERTS, Qwen3MoeConfig),
        "GptOssForCausalLM": (CONFIG, GptOssConfig),
    }
    config, theirs = known[architecture]
    unsaid = {name: value for name, value in config.items() if name != key}
    assert field(spec_from_config({**unsaid, "architectures": [architecture]})) == getattr(
        theirs(**unsaid), key
    )


def test_windows():
    assert spec_from_config(LLAMA).windows == (0, 0, 0)
    mistral = {**SHAPE, "architectures": ["MistralForCausalLM"]}
    assert spec_from_config({**mistral, "sliding_window": 9}).windows == (9, 9, 9)
    assert spec_from_config({**mistral, "sliding_window": None}).windows == (0, 0, 0)
    sliding = {**QWEN, "sliding_window": 9, "max_window_layers": 2}
    assert spec_from_config(sliding).windows == (0, 0, 0)
    assert spec_from_config({**sliding, "use_sliding_window": True}).windows == (0, 0, 9)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    by_layer = {**sliding, "use_sliding_window": True, "layer_types": kinds}
    assert spec_from_config(by_layer).windows == (9, 0, 9)


def test_gemma3_by_the_older_keys():
    """As the checkpoints have them that there are."""
    spec = spec_from_config(GEMMA)
    assert spec.windows == (512, 512, 0)
    assert spec.rope == RopeSpec(1e6, 256, LinearScaling(8.0))
    assert spec.local_rope == RopeSpec(1e4, 256)
    assert spec.max_positions == 128  # told after scaling
    assert spec.query_scale == 168**-0.5
    assert spec.tie_embeddings


def test_gemma3_s_older_scaling_wins_as_in_transformers():
    both = {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    spec = spec_from_config({**GEMMA, **both})
    assert spec.rope == RopeSpec(5e5, 256, LinearScaling(4.0))
    assert spec.local_rope == RopeSpec(1e4, 256)


def test_gpt_oss_turns_slowly_unless_stated():
    unsaid = {key: value for key, value in CONFIG.items() if not key.startswith("rope_")}
    unsaid["rope_scaling"] = OSS_YARN
    theirs = GptOssConfig(**unsaid).rope_parameters
    assert spec_from_config(unsaid).rope.theta == theirs["rope_theta"] == 150_000.0


def test_architecture_by_model_type():
    assert spec_from_config({**SHAPE, "model_type": "qwen3"}).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertModel"]}, "architecture 'BertModel' is not supported"),
        ({}, "architecture None"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({**EXPERTS, "model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ({**LLAMA, "rope_scaling": {"rope_type": "longrope"}}, "RoPE scaling 'longrope'"),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, "'linear' lacks 'factor'"),
        ({**LLAMA, "rope_scaling": {"factor": 2.0}}, "a factor, but no rope_type"),
        (
            {**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "RoPE of its own for 'full_attention'",
        ),
        ({**LLAMA, "rope_scaling": "linear"}, "makes no sense"),
        ({**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({**GEMMA, "final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({**GEMMA, "hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ({**GEMMA, "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({**GEMMA, "rope_parameters": {"rope_theta": 5.0}}, "rope_parameters ['rope_theta']"),
        ({**GEMMA, "num_hidden_layers": 10**12}, "1000000000000 layers"),
        ({**LLAMA, "model_type": "qwen2"}, "model_type 'qwen2' contradicts 'LlamaForCausalLM'"),
        ({**LLAMA, "architectures": 5}, "makes no sense"),
        ({**LLAMA, "eos_token_id": "</s>"}, "config.json: eos_token_id '</s>' makes no sense"),
        ({**LLAMA, "quantization_config": {"load_in_8bit": True}}, "quantization_config None"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, "quantization_config 'awq'"),
        ({**LLAMA, "transformers_weights": "x.safetensors"}, "transformers_weights"),
        ({**LLAMA, "num_key_value_heads": 3}, "4 attention heads do not divide over 3"),
        (
            {**QWEN, "use_sliding_window": True, "layer_types": ["chunked_attention"] * 3},
            "chunked_attention",
        ),
        (
            {**QWEN, "use_sliding_window": True, "layer_types": ["full_attention"]},
            "names 1 of 3 layers",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "lacks 'hidden_size'"),
        ({**LLAMA, "num_attention_heads": "four"}, "makes no sense"),
        ({**LLAMA, "num_attention_heads": 0}, "makes no sense"),
        ({**LLAMA, "max_position_embeddings": {"a": 1}}, "makes no sense"),
        ({**LLAMA, "head_dim": [16]}, "head_dim [16] makes no sense"),
        ({**LLAMA, "head_dim": 15}, "heads of 15 cannot be rotated"),
        ({**LLAMA, "head_dim": 4098}, "heads of 4098 make no sense"),
        ({**LLAMA, "num_hidden_layers": 10**12}, "1000000000000 layers"),
        ({**LLAMA, "num_hidden_layers": 4097}, "4097 layers"),
        ({**LLAMA, "num_hidden_layers": "3"}, "'3' layers"),
        ({**LLAMA, "vocab_size": 0}, "vocab_size 0 makes no sense"),
        ({**LLAMA, "tie_word_embeddings": "yes"}, "tie_embeddings 'yes' makes no sense"),
        ({**LLAMA, "torch_dtype": 16}, "dtype 16 makes no sense"),
        ({**LLAMA, "rms_norm_eps": "1e-5"}, "norm_eps '1e-5' makes no sense"),
        ({**LLAMA, "max_position_embeddings": 2**24 + 1}, "16777217 tokens makes no sense"),
        (
            {**CONFIGS["gpt2"].to_dict(), "model_type": "gpt2", "activation_function": "mish"},
            "activation 'mish'",
        ),
        (
            {**CONFIGS["gpt2"].to_dict(), "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx True",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_refusals(config, message):
    with pytest.raises(LoadError) as caught:
        spec_from_config(config)
    assert message in str(caught.value)


GGUF = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 2,
    "qwen2.context_length": 64,
    "qwen2.embedding_length": 32,
    "qwen2.feed_forward_length": 48,
    "qwen2.attention.head_count": 4,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen2.rope.freq_base": 1e6,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 2,
}


def test_gguf_metadata():
    spec = spec_from_gguf(GGUF, {"blk.0.attn_q.bias"})
    assert (spec.architecture, spec.vocab_size, spec.head_dim) == ("Qwen2ForCausalLM", 3, 8)
    assert spec.eos_token_ids == (1, 2)
    assert (spec.qkv_bias, spec.output_bias, spec.tie_embeddings) == (True, False, True)
    assert spec.rope.theta == 1e6


@pytest.mark.parametrize(
    ("tensor", "field", "value"),
    [
        ("blk.0.attn_q.bias", "qkv_bias", True),
        ("blk.0.attn_qkv.bias", "qkv_bias", True),
        ("blk.0.attn_output.bias", "output_bias", True),
        ("blk.0.ffn_up.bias", "mlp_bias", True),
        ("blk.0.attn_q_norm.weight", "qk_norm", True),
        ("output.weight", "tie_embeddings", False),
    ],
)
def test_a_gguf_file_s_tensors_say_what_its_metadata_does_not(tensor, field, value):
    with_it, without = spec_from_gguf(GGUF, {tensor}), spec_from_gguf(GGUF, {"other"})
    assert getattr(with_it, field) is value
    assert with_it == replace(without, **{field: value})


ROPE = "qwen2.rope"


@pytest.mark.parametrize(
    "stated",
    [
        {f"{ROPE}.scaling.type": "linear", f"{ROPE}.scaling.factor": 4.0},
        {f"{ROPE}.scaling.factor": 4.0},
        {f"{ROPE}.scale_linear": 4.0},
    ],
)
def test_gguf_linear_scaling(stated):
    spec = spec_from_gguf({**GGUF, **stated}, ())
    assert spec.rope.scaling == LinearScaling(4.0)
    assert spec.max_positions == 256
    both = spec_from_gguf({**GGUF, **stated}, (), (1.0, 2.0, 3.0, 4.0))
    assert both.rope.scaling == Divisors((4.0, 8.0, 12.0, 16.0))
    assert (
        spec_from_gguf({**GGUF, **stated, f"{ROPE}.scaling.type": "none"}, ()).rope.scaling is None
    )


def test_gguf_yarn():
    yarn = {**GGUF, f"{ROPE}.scaling.type": "yarn", f"{ROPE}.scaling.factor": 4.0}
    spec = spec_from_gguf(yarn, ())
    assert spec.rope.scaling.original_positions == GGUF["qwen2.context_length"]
    assert spec.max_positions == 256
    stated = spec_from_gguf({**yarn, f"{ROPE}.scaling.original_context_length": 16}, ())
    assert stated.rope.scaling.original_positions == 16
    assert stated.max_positions == 64


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "head_dim", "per_query"),
    [(48, 3840, 16, 256, 256), (62, 5376, 32, 128, 168)],
    ids=["12b", "27b"],
)
def test_gguf_gemma3_of_every_size(layers, hidden, heads, head_dim, per_query):
    """What 27B divides its scores by is stated nowhere."""
    sizes = {
        "block_count": layers, "embedding_length": hidden, "attention.head_count": heads,
        "attention.key_length": head_dim, "attention.value_length": head_dim,
        "attention.sliding_window": 1024,
    }  # fmt: skip
    shared = {key.replace("qwen2", "gemma3"): value for key, value in GGUF.items()}
    given = {f"gemma3.{key}": value for key, value in sizes.items()}
    spec = spec_from_gguf({**shared, **given, "general.architecture": "gemma3"}, ())
    assert spec.query_scale == per_query**-0.5
    assert spec.windows[:7] == (1024,) * 5 + (0, 1024)


def test_gguf_numbers_that_llama_cpp_reads_otherwise_than_they_seem():
    spec = spec_from_gguf({**GGUF, "qwen2.vocab_size": 9}, ())
    assert spec.vocab_size == 3  # as many as there are tokens
    layers = {"qwen2.attention.head_count_kv": [2, 2], "qwen2.feed_forward_length": [48, 48]}
    same = spec_from_gguf({**GGUF, **layers}, ())
    assert (same.num_kv_heads, same.intermediate_size) == (2, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "falcon"}, "general.architecture 'falcon'"),
        ({"qwen2.rope.dimension_count": 4}, "dimension_count 4 differs from the head size 8"),
        ({"qwen2.expert_count": 8}, "mixtures of experts"),
        ({"qwen2.embedding_length": "wide"}, "makes no sense"),
        ({"qwen2.attention.head_count_kv": [1, 2]}, "head_count_kv: layers of different shape"),
        ({"qwen2.feed_forward_length": [1, 2]}, "feed_forward_length: layers of different shape"),
        ({f"{ROPE}.scaling.type": "longrope"}, "scaling.type 'longrope'"),
        ({f"{ROPE}.scaling.attn_factor": 2.0}, "scaling.attn_factor 2.0 is only supported with"),
        (
            {
                f"{ROPE}.scaling.type": "yarn",
                f"{ROPE}.scaling.factor": 2.0,
                f"{ROPE}.scaling.yarn_ext_factor": 0.5,
            },
            "yarn_ext_factor 0.5",
        ),
    ],
)
def test_gguf_refusals(change, message):
    with pytest.raises(LoadError) as caught:
        spec_from_gguf({**GGUF, **change}, ())
    assert message in str(caught.value)


def test_stored_frequencies_beside_another_scaling():
    """A linear factor divides them all; with YaRN's ramp they would mean nothing."""
    linear = {f"{ROPE}.scaling.type": "linear", f"{ROPE}.scaling.factor": 2.0}
    spec = spec_from_gguf({**GGUF, **linear}, (), (1.0, 3.0, 5.0, 7.0))
    assert spec.rope.scaling == Divisors((2.0, 6.0, 10.0, 14.0))
    yarn = {f"{ROPE}.scaling.type": "yarn", f"{ROPE}.scaling.factor": 2.0}
    with pytest.raises(LoadError, match="'yarn' beside rope_freqs"):
        spec_from_gguf({**GGUF, **yarn}, (), (1.0,) * 4)


def test_gguf_lacking_a_number():
    lacking = {key: value for key, value in GGUF.items() if key != "qwen2.block_count"}
    with pytest.raises(LoadError, match=r"lacks 'qwen2.block_count'"):
        spec_from_gguf(lacking, ())

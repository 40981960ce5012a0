"""Every model family and size of head on a GPU, with the host's plain torch as the oracle.

Without a GPU this runs over Triton's interpreter, on the smallest of everything.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from ruvon.engine.batch import BlockTables, build_batch, lay_out
from ruvon.engine.types import Chunk, NewSequence, Plan, SamplingParams
from ruvon.kernels.mesh import ALONE
from ruvon.kernels.reference import make_torch_ops
from ruvon.kernels.triton_ops import make_triton_ops
from ruvon.models import MODELS
from ruvon.models.quantize import SCHEMES
from ruvon.models.shares import share_of
from ruvon.models.sources import RandomTensors
from ruvon.models.spec import spec_from_config
from ruvon.models.weights import Weights

pytestmark = [
    pytest.mark.usefixtures("triton_device"),
    pytest.mark.filterwarnings("ignore:overflow"),
    pytest.mark.filterwarnings("ignore:invalid value"),
    pytest.mark.filterwarnings("ignore:divide by zero"),
]

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CPU = torch.device("cpu")
PAGE, BLOCKS = 16, 40

NUM_EXPERTS = 5
SHAPE = {
    "vocab_size": 101,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
GPT2 = {
    "vocab_size": 101,
    "n_layer": 2,
    "n_positions": 256,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
FAMILIES = {
    "GPT2LMHeadModel": GPT2 | {"model_type": "gpt2"},
    "LlamaForCausalLM": SHAPE | {"model_type": "llama"},
    "MistralForCausalLM": SHAPE | {"model_type": "mistral", "sliding_window": 24},
    "Qwen2ForCausalLM": SHAPE | {"model_type": "qwen2"},
    "Qwen3ForCausalLM": SHAPE | {"model_type": "qwen3"},
    "Gemma3ForCausalLM": SHAPE
    | {"model_type": "gemma3_text", "sliding_window": 24, "layer_types": ["sliding_attention"] * 2},
    "Qwen3MoeForCausalLM": SHAPE
    | {
        "model_type": "qwen3_moe",
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
    "GptOssForCausalLM": SHAPE
    | {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "layer_types": ["sliding_attention"] * 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    },
}
HEADS = [64, 80, 96, 128] if GPU else [16]
CASES = [(architecture, head_dim) for architecture in FAMILIES for head_dim in HEADS]
CASES += [("Gemma3ForCausalLM", 256)] if GPU else []  # what its models have


def config_of(architecture, head_dim, scheme="none"):
    """With codes, a mixture asks all of its experts: their rounding could tip a choice."""
    shape = FAMILIES[architecture] | {"architectures": [architecture]}
    if scheme != "none" and "num_experts_per_tok" in shape:
        shape["num_experts_per_tok"] = NUM_EXPERTS
    if architecture == "GPT2LMHeadModel":
        return shape | {"n_embd": 3 * head_dim, "n_head": 3}
    return shape | {
        "hidden_size": 4 * head_dim,
        "intermediate_size": 6 * head_dim,  # an expert's, too: of 32s, as MXFP4's blocks are
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
    }


def can_be_coded(architecture, head_dim):
    """Whether all weights have whole groups of 32 columns."""
    config = config_of(architecture, head_dim)
    names = ("n_embd", "hidden_size", "intermediate_size", "moe_intermediate_size")
    return not any(config.get(name, 0) % 32 for name in names)


CODED = [(scheme, case) for scheme in ("int8", "int4") for case in CASES if can_be_coded(*case)]


class Weighty(RandomTensors):
    """Weights large enough for logits to depend on what came before."""

    def read(self, name, shape, cut=(), *, bytes_only=False):
        values = super().read(name, shape, cut, bytes_only=bytes_only)
        return values * 5 if len(shape) > 1 and not bytes_only else values


def build(architecture, head_dim, ops, scheme="none", mesh=ALONE):
    spec = spec_from_config(config_of(architecture, head_dim, scheme))
    family = MODELS[architecture]
    source = Weighty(Path("tiny"), 0, torch.float32, mxfp4=architecture == "GptOssForCausalLM")
    weights = Weights(
        source=source,
        rules=family.rules,
        scheme=SCHEMES[scheme],
        ops=ops,
        share=share_of(spec, mesh),
    )
    return family.build(spec, weights, ops)


def over_cache(model):
    """Its forward pass, over a cache of its own."""
    ops, spec = model.ops, model.spec
    shape = (2, BLOCKS, spec.num_kv_heads, PAGE, spec.head_dim)
    layers = [torch.zeros(shape, dtype=ops.dtype, device=ops.device) for _ in range(2)]
    return partial(model.forward, cache=[(layer[0], layer[1]) for layer in layers])


LENGTHS = (37, 1, 50, 18) if GPU else (19, 1)


def prompts():
    return [
        tuple((7 * i + 3 * place) % 101 for place in range(length))
        for i, length in enumerate(LENGTHS)
    ]


def mixed_steps():
    """All prompts in a step but for the end of one; then that, and a token of each other."""
    new = tuple(NewSequence(i, SamplingParams(), 1, 0) for i in range(len(LENGTHS)))
    first, second = [], []
    for i, prompt in enumerate(prompts()):
        end = 10 if i == 0 else len(prompt)
        blocks = (tuple(range(6 * i, 6 * i + 6)),)
        first.append(Chunk(i, 0, prompt[:end], 0, blocks, True))
        second.append(Chunk(i, 0, prompt[end:] or (5 + i,), end, (), True))
    return Plan(1, tuple(first), new), Plan(2, tuple(second))


def run(forward, plans, device):
    """Logits of the last token of each sequence, by step."""
    tables, logits = BlockTables(), []
    for plan in plans:
        tables.follow(plan)
        with torch.inference_mode():
            logits.append(forward(lay_out(plan, tables, PAGE).to_batch(device)).cpu())
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "head_dim"), CASES)
def test_a_gpu_computes_what_the_host_does(architecture, head_dim):
    check_against_the_host(architecture, head_dim, "none")


@pytest.mark.gpu
@pytest.mark.skipif(
    not GPU, reason="minutes in the interpreter; test_triton_codes has the products"
)
@pytest.mark.parametrize(("scheme", "case"), CODED)
def test_a_gpu_computes_with_codes_what_the_host_does_with_their_values(scheme, case):
    check_against_the_host(*case, scheme)


def check_against_the_host(architecture, head_dim, scheme):
    on_host = build(architecture, head_dim, make_torch_ops(torch.float32, CPU), scheme)
    on_gpu = build(architecture, head_dim, make_triton_ops(torch.float32, DEVICE), scheme)
    expected = run(over_cache(on_host), mixed_steps(), CPU)
    for actual, wanted in zip(
        run(over_cache(on_gpu), mixed_steps(), DEVICE), expected, strict=True
    ):
        assert (actual - wanted).abs().max() < 2e-2 * wanted.abs().max()
        assert torch.equal(actual.argmax(-1), wanted.argmax(-1))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="numpy, in the interpreter, adds as it likes")
@pytest.mark.parametrize(("scheme", "case"), [("none", case) for case in CASES] + CODED)
def test_deterministic_kernels_give_a_row_the_same_bits_among_others_and_alone(scheme, case):
    ops = make_triton_ops(torch.bfloat16, DEVICE, batch_invariant=True)
    model = build(*case, ops, scheme)
    together = run(over_cache(model), mixed_steps(), DEVICE)[-1]
    forward = over_cache(model)
    for i, prompt in enumerate(prompts()):
        tokens = prompt if i == 0 else (*prompt, 5 + i)
        chunk = Chunk(i, 0, tokens, 0, (tuple(range(6)),), True)
        plan = Plan(1, (chunk,), (NewSequence(i, SamplingParams(), 1, 0),))
        with torch.inference_mode():
            alone = forward(build_batch(plan, PAGE, DEVICE)).cpu()
        assert torch.equal(alone[0], together[i]), f"{LENGTHS[i]} tokens"

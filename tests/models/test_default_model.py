"""The embedded default model against transformers with the same dequantized weights, in float32."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from embedded import needs_model
from gguf import quants
from paged import PagedSequences
from transformers import LlamaConfig, LlamaForCausalLM

from ruvon.config import EngineConfig
from ruvon.engine.startup import start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.kernels.reference import make_torch_ops
from ruvon.locate import find_embedded
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.tokenizer import load_tokenizer
from ruvon.telemetry import silent

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "import numpy as np\n\n",
    "Q: What is the largest planet?\nA:",
    "List of colours:\n1. Red\n2.",
    "Dear Sir or Madam,",
    "E = mc^2 means that",
    "The mitochondria is",
    "SELECT name FROM users WHERE",
    "In 1969, humans first",
    "To make bread you need flour,",
    "¿Dónde está la biblioteca?",
    "<html>\n<body>",
    "The quick brown fox jumps over the lazy dog. The quick brown",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three primes.<|im_end|>\n<|im_start|>assistant\n",
]
NEW_TOKENS = 16

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_model]


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """transformers' model with the file's numbers, as the `gguf` package reads them."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tensors = {t.name: t for t in gguf.GGUFReader(find_embedded()).tensors}
    for name, parameter in model.named_parameters():
        stored = tensors[stored_name(name)]
        values = torch.from_numpy(quants.dequantize(stored.data, stored.tensor_type).copy())
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads is not None:  # from pairs side by side to halves
            values = values.view(heads, 32, 2, -1).transpose(1, 2).reshape(values.shape)
        parameter.data.copy_(values)
    return model.eval()


def stored_name(name: str) -> str:
    parts = {
        "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
        "up_proj": "ffn_up", "down_proj": "ffn_down", "embed_tokens": "token_embd",
        "norm": "output_norm",
    }  # fmt: skip
    words = name.split(".")
    layer = f"blk.{words[2]}." if words[1] == "layers" else ""
    return f"{layer}{parts[words[-2]]}.weight"


def generate(prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of our model, all prompts in one batch over the paged cache."""
    config = EngineConfig()
    ops = make_torch_ops(torch.float32, torch.device("cpu"))
    model = load_model(open_checkpoint(config, silent), config, ops, silent)
    run = PagedSequences(model, capacity=4096, block=16)
    drawn: list[list[int]] = [[] for _ in prompts]
    chunks = dict(enumerate(prompts))
    for _ in range(NEW_TOKENS):
        tokens = run.step(chunks, every_row=False).argmax(-1).tolist()
        chunks = {number: [token] for number, token in enumerate(tokens)}
        for output, token in zip(drawn, tokens, strict=True):
            output.append(token)
    return drawn


def test_greedy_tokens_equal_transformers(reference):
    """That each of our tokens is the reference's best after all before it is, by induction, that
    the reference would have generated the same."""
    tokenizer = load_tokenizer(open_checkpoint(EngineConfig(), silent))
    prompts = [tokenizer.encode(text, parse_special=True) for text in PROMPTS]
    for prompt, drawn in zip(prompts, generate(prompts), strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + drawn[:-1]])).logits[0, len(prompt) - 1 :]
        assert drawn == logits.argmax(-1).tolist()


TEXTS = [
    "The cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "Interest rates rose again in March.",
]


def test_pooled_hidden_states_are_nearly_those_of_transformers(reference):
    """Nearly, for the CPU's kernels round activations to 8 bits. And they tell topics apart."""
    loaded = start_engine(EngineConfig(device="cpu", kv_cache_memory="64MiB"), silent)
    try:
        prompts = [tuple(loaded.tokenizer.encode(text)) for text in TEXTS]
        for number, prompt in enumerate(prompts):
            job = Job(prompt, SamplingParams(max_tokens=0), pooling="mean")
            loaded.engine.add(loaded.engine.prepare(job), 0.0, number)
        pooled = {}
        while (pending := loaded.engine.launch(0.0)) is not None:
            pooled |= {each.index: each.pooled for each in loaded.engine.collect(pending)}
    finally:
        loaded.close()
    ours = [pooled[n] / np.linalg.norm(pooled[n]) for n in range(len(TEXTS))]
    for vector, prompt in zip(ours, prompts, strict=True):
        with torch.inference_mode():
            hidden_TC = reference.model(torch.tensor([prompt])).last_hidden_state[0]
        theirs = hidden_TC.mean(0).numpy()
        assert vector @ theirs / np.linalg.norm(theirs) > 0.99
    assert ours[0] @ ours[1] > ours[0] @ ours[2] + 0.05

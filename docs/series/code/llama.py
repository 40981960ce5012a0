"""The embedded model, SmolLM2-135M-Instruct, in plain torch: what all lessons share.

    x = x + W_o attention(norm(x))
    x = x + W_down (silu(W_gate norm(x)) * W_up norm(x))

Only attention looks at other tokens, so it is an argument: a lesson says where keys and values are
kept by the function `attend` that it passes. Everything else works row by row. Letters in names:
T tokens, C hidden size, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.kernels.reference import make_torch_ops
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.tokenizer import Tokenizer, load_tokenizer
from ruvon.telemetry import silent

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, H, D], k [T, G, D], v [T, G, D]) → what attention gives, [T, H, D]."""


def same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Llama:
    tokenizer: Tokenizer
    embed: Tensor  # [V, C]; also the head
    layers: tuple[Mapping[str, Tensor], ...]  # attn_norm, qkv, o, mlp_norm, gate_up, down
    norm: Tensor
    cos: Tensor  # [positions, D / 2]
    sin: Tensor
    heads: int
    groups: int
    head_dim: int
    eps: float
    end: int  # the token that ends an answer
    reduce: Callable[[Tensor], Tensor] = same  # lesson 10: a sum over ranks

    def forward(self, ids: list[int], positions: list[int], attend: Attend) -> Tensor:
        """→ logits [T, V]: row t scores every token as the one that follows token t."""
        x_TC = self.embed[ids]
        for i in range(len(self.layers)):
            x_TC = self.layer(i, x_TC, positions, attend)
        return self.logits(x_TC)

    def layer(self, i: int, x_TC: Tensor, positions: list[int], attend: Attend) -> Tensor:
        """The stream after one layer."""
        layer = self.layers[i]
        qkv = F.linear(rms_norm(x_TC, layer["attn_norm"], self.eps), layer["qkv"])
        qkv = qkv.view(len(positions), self.heads + 2 * self.groups, -1)
        q, k, v = qkv.split((self.heads, self.groups, self.groups), dim=1)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        o = attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v)
        x_TC = x_TC + self.reduce(F.linear(o.flatten(1), layer["o"]))
        both = F.linear(rms_norm(x_TC, layer["mlp_norm"], self.eps), layer["gate_up"])
        gate, up = both.chunk(2, dim=-1)
        return x_TC + self.reduce(F.linear(F.silu(gate) * up, layer["down"]))

    def logits(self, x_TC: Tensor) -> Tensor:
        """Of the stream after the last layer."""
        return F.linear(rms_norm(x_TC, self.norm, self.eps), self.embed)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def ask(self, question: str) -> list[int]:
        """A question as the model was trained to see one. Markers are tokens, the rest is text."""
        before = self.tokenizer.encode("<|im_start|>user\n", parse_special=True)
        after = "<|im_end|>\n<|im_start|>assistant\n"
        return [*before, *self.encode(question), *self.tokenizer.encode(after, parse_special=True)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs of dimensions by an angle that grows with the position."""
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, hidden_TS: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v for each head; ``hidden`` is True where a query may not look."""
    share = q_THD.shape[1] // k_SGD.shape[1]
    k, v = k_SGD.repeat_interleave(share, dim=1), v_SGD.repeat_interleave(share, dim=1)
    scores = torch.einsum("thd,shd->hts", q_THD, k) * q_THD.shape[-1] ** -0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden_TS, -torch.inf).softmax(-1), v)


def causal(queries: int, keys: int) -> Tensor:
    """The last ``queries`` of ``keys`` positions: each sees itself and what is before it."""
    at = torch.arange(keys - queries, keys).unsqueeze(1)
    return torch.arange(keys).unsqueeze(0) > at


@cache
def load() -> Llama:
    """Reads the file that comes with ruvon and multiplies its 4-bit weights out: 0.5 GB.

    From here on torch has one thread: then processor time says what a step costs, whatever else
    the machine does, and steps as small as these lose little by it.
    """
    torch.set_num_threads(1)
    config = EngineConfig()
    checkpoint = open_checkpoint(config, silent)
    ops = make_torch_ops(torch.float32, torch.device("cpu"))
    model = load_model(checkpoint, config, ops, silent)
    rope, spec = model.layers[0].attention.rope, checkpoint.spec
    layers = tuple(
        {
            "attn_norm": layer.attn_norm.weight_C,
            "qkv": layer.qkv.weight.tensors[0],
            "o": layer.attn_out.weight.tensors[0],
            "mlp_norm": layer.mlp_norm.weight_C,
            "gate_up": layer.gate_up.weight.tensors[0],
            "down": layer.down.weight.tensors[0],
        }
        for layer in model.layers
    )
    return Llama(
        tokenizer=load_tokenizer(checkpoint),
        embed=model.embed.tensors[0],
        layers=layers,
        norm=model.norm.weight_C,
        cos=rope.cos_PD,
        sin=rope.sin_PD,
        heads=spec.num_heads,
        groups=spec.num_kv_heads,
        head_dim=spec.head_dim,
        eps=spec.norm_eps,
        end=spec.eos_token_ids[0],
    )

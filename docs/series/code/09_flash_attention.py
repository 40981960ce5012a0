"""Lesson 9: exact attention that never writes the matrix of scores down.

python docs/series/code/09_flash_attention.py
"""

from __future__ import annotations

from time import process_time

import llama
import torch
from torch import Tensor

TILE = 64


def flash(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, tile: int = TILE) -> Tensor:
    """Causal attention of the last T of S positions, one tile of queries and of keys at a time."""
    outs = [
        one_tile(q_THD[first : first + tile], k_SGD, v_SGD, len(k_SGD) - len(q_THD) + first, tile)
        for first in range(0, len(q_THD), tile)
    ]
    return torch.cat(outs)


def one_tile(q_QHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, first: int, tile: int) -> Tensor:
    """The queries at positions ``first`` and on. Kept for each: the largest score so far, the sum
    of the weights, and the weighted sum of the values, both relative to that score."""
    num, heads, dim = q_QHD.shape
    share = heads // k_SGD.shape[1]
    most_HQ = torch.full((heads, num), -torch.inf)
    sum_HQ, out_HQD = torch.zeros(heads, num), torch.zeros(heads, num, dim)
    query_at = torch.arange(first, first + num).unsqueeze(1)
    for at in range(0, first + num, tile):  # what lies after the last query is never read
        k = k_SGD[at : at + tile].repeat_interleave(share, dim=1)
        v = v_SGD[at : at + tile].repeat_interleave(share, dim=1)
        scores_HQK = torch.einsum("qhd,khd->hqk", q_QHD, k) * dim**-0.5
        future = torch.arange(at, at + len(k)) > query_at
        scores_HQK = scores_HQK.masked_fill(future, -torch.inf)
        new_HQ = torch.maximum(most_HQ, scores_HQK.amax(-1))
        shrink_HQ = (most_HQ - new_HQ).exp()  # what was summed up before was relative to less
        weights_HQK = (scores_HQK - new_HQ.unsqueeze(-1)).exp()
        sum_HQ = sum_HQ * shrink_HQ + weights_HQK.sum(-1)
        out_HQD = out_HQD * shrink_HQ.unsqueeze(-1) + torch.einsum("hqk,khd->hqd", weights_HQK, v)
        most_HQ = new_HQ
    return (out_HQD / sum_HQ.unsqueeze(-1)).transpose(0, 1)


def plain(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> Tensor:
    return llama.attention(q_THD, k_SGD, v_SGD, llama.causal(len(q_THD), len(k_SGD)))


def main() -> None:
    model = llama.load()
    prompt = model.encode("Tiles make the same sum in another order, and nobody can tell. " * 6)
    positions = list(range(len(prompt)))
    before, after = (
        model.forward(prompt, positions, lambda layer, q, k, v, way=way: way(q, k, v))
        for way in (plain, flash)
    )
    same = torch.equal(before.argmax(-1), after.argmax(-1))
    print(f"the model's {len(prompt)} choices over a prompt are the same: {same}")

    torch.manual_seed(0)
    print("\none layer of random queries, keys and values, 9 heads:")
    for length in (256, 512, 1024):
        q, k, v = torch.randn(length, 9, 64), torch.randn(length, 3, 64), torch.randn(length, 3, 64)
        start = process_time()
        exact = plain(q, k, v)
        middle = process_time()
        tiled = flash(q, k, v, 128)
        end = process_time()
        close = torch.allclose(exact, tiled, atol=1e-5)
        print(
            f"  {length:>5} tokens: before, scores of {9 * length**2 * 4 / 1e6:>5.1f} MB,", end=" "
        )
        print(
            f"~{(middle - start) * 1000:.0f} ms; after, of {9 * 128**2 * 4 / 1e6:.1f} MB,", end=" "
        )
        print(f"~{(end - middle) * 1000:.0f} ms; equal to 1e-5: {close}")


if __name__ == "__main__":
    main()

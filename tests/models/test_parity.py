"""Our logits against transformers', however the tokens come: at once, in chunks, one by one."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from paged import PagedSequences
from tiny import CONFIGS, VOCAB, load, make_reference

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(our model, transformers' model) of one config."""
    torch.set_num_threads(1)
    reference = make_reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return load(folder), reference


def draw(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=count)


def expected(reference, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0]


def test_whole_prompt(pair):
    model, reference = pair
    tokens = draw(45)
    torch.testing.assert_close(
        PagedSequences(model).step({0: tokens}), expected(reference, tokens), **TOLERANCE
    )


def test_prompt_in_chunks(pair):
    model, reference = pair
    tokens, run = draw(45), PagedSequences(model)
    cuts = [0, 1, 12, 15, 31, 45]
    got = [run.step({0: tokens[a:b]}) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(got), expected(reference, tokens), **TOLERANCE)


def test_token_by_token(pair):
    model, reference = pair
    tokens, run = draw(20), PagedSequences(model)
    got = [run.step({0: [token]}) for token in tokens]
    torch.testing.assert_close(torch.cat(got), expected(reference, tokens), **TOLERANCE)


def test_ragged_batch_of_prompts_and_decodes(pair):
    """Three sequences: one decoding, one mid-prompt, one just beginning; last rows only."""
    model, reference = pair
    run, prompts = PagedSequences(model), {n: draw(40, seed=n) for n in range(3)}
    run.step({0: prompts[0][:17]})
    run.step({0: prompts[0][17:18], 1: prompts[1][:9]})
    got = run.step({1: prompts[1][9:20], 2: prompts[2][:30], 0: prompts[0][18:19]}, every_row=False)
    ends = [prompts[1][:20], prompts[2][:30], prompts[0][:19]]
    want = torch.stack([expected(reference, tokens)[-1] for tokens in ends])
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_step_that_wants_no_logits_still_fills_the_cache(pair):
    model, reference = pair
    tokens, run = draw(12), PagedSequences(model)
    batch = run.batch({0: tokens[:-1]}, every_row=False)
    nothing = batch.logit_rows[:0]
    with torch.inference_mode():
        fields = {name: getattr(batch, name) for name in batch.__slots__}
        silent_batch = type(batch)(**{**fields, "logit_rows": nothing})
        assert model.forward(silent_batch, run.cache).shape == (0, VOCAB)
    got = run.step({0: tokens[-1:]})
    torch.testing.assert_close(got[0], expected(reference, tokens)[-1], **TOLERANCE)

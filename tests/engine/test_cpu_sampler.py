"""The compiled sampler against `ruvon.engine.sampler`, which is its meaning."""

import math

import numpy as np
import pytest
import torch

from ruvon.engine.cpu_sampler import CpuSampler, is_compiled
from ruvon.engine.sampler import sample
from ruvon.engine.types import SamplingParams, SamplingRow
from ruvon.grammars import regex
from ruvon.kernels.cpu import CpuKernels

EOS = (2, 3)
MOST_ROWS = 48

KINDS = (
    {},
    {"temperature": 0.3},
    {"temperature": 1e-38},
    {"temperature": 1e-60},  # 0 in float32
    {"temperature": 1.9, "top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.01},
    {"top_p": 0.999},
    {"temperature": 0.2, "top_p": 0.9},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 600},
    {"top_k": 10**6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.9},
    {"temperature": 1.5, "top_k": 40, "min_p": 0.02, "top_p": 0.9},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "temperature": 0},
    {"frequency_penalty": 0.7, "presence_penalty": -0.2, "top_p": 0.8},
    {"presence_penalty": 1.5, "temperature": 0},
    {"logit_bias": {5: 8.0, 0: -100.0, 9: 7.5}},
    {"logit_bias": {5: 8.0}, "repetition_penalty": 2.0, "frequency_penalty": 0.1},
    {"allowed_token_ids": (1, 4, 11)},
    {"allowed_token_ids": (4,), "logit_bias": {4: -100.0}},
    {"bad_words": ((4,), (7, 9), (8, 9))},
    {"min_tokens": 9, "stop_token_ids": (1,), "temperature": 0},
    {"min_tokens": 9, "ignore_eos": True},
    {"temperature": 0},
    {"temperature": 0, "logprobs": 0},
    {"logprobs": 3, "top_k": 4, "logit_bias": {6: 50.0}},
    {"logprobs": 10**6},
    {"temperature": 0, "logprobs": 2, "logprob_token_ids": (7, 0, 3)},
)


@pytest.fixture(scope="module", params=[1, 2], ids=["one thread", "two threads"])
def kernels(request):
    made = CpuKernels(request.param)
    yield made
    made.close()


def sampler(kernels: CpuKernels, vocab: int) -> CpuSampler:
    def unwanted():
        raise AssertionError("the step's own argmax is for steps of greedy rows only")

    return CpuSampler(kernels.sampler(vocab, MOST_ROWS), unwanted)


def padded(logits_LV: torch.Tensor) -> torch.Tensor:
    """With rows of whole vectors, as a graph has them; what stands between rows is wild."""
    rows, vocab = logits_LV.shape
    wide = torch.full((rows, -(-vocab // 32) * 32), math.nan)
    wide[:, :vocab] = logits_LV
    return wide[:, :vocab]


def some_logits(vocab: int, spread: float = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return padded(torch.randn(len(KINDS), vocab, generator=generator) * spread)


def some_rows(seed: int = 0) -> list[SamplingRow]:
    return [
        SamplingRow(n, SamplingParams(**kind), [4, 8, 7, 9, 9, 11, 7], 4, seed - n)
        for n, kind in enumerate(KINDS)
    ]


def assert_same(found, expected):
    assert found.tokens == expected.tokens
    assert found.errors == expected.errors
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert (ours is None) == (theirs is None)
        for mine, other in zip(ours or (), theirs or (), strict=True):
            assert (mine.token, mine.rank) == (other.token, other.rank)
            assert mine.logprob == pytest.approx(other.logprob, abs=2e-6)
            assert [token for token, _ in mine.top] == [token for token, _ in other.top]
            assert [p for _, p in mine.top] == pytest.approx([p for _, p in other.top], abs=2e-6)


@pytest.mark.parametrize("vocab", [13, 16, 129, 4099])
def test_every_kind_of_row_draws_what_its_meaning_draws(kernels, vocab):
    draw, logits_LV = sampler(kernels, vocab), some_logits(vocab)
    for seed in (0, 7, 2**63):
        assert_same(draw(logits_LV, some_rows(seed), EOS), sample(logits_LV, some_rows(seed), EOS))


def test_what_has_no_kernel_is_rare():
    without = [kind for kind in KINDS if not is_compiled(SamplingParams(**kind))]
    assert without == [{"typical_p": 0.9}]
    assert is_compiled(SamplingParams(grammar=regex("a")))
    assert not is_compiled(SamplingParams(grammar=regex("a"), logprobs=0))


@pytest.mark.parametrize("spread", [0.0, 0.01, 30.0])
def test_flat_and_pointed_distributions(kernels, spread):
    """A flat one has nothing but ties, of which filters keep the lowest ids."""
    draw, logits_LV = sampler(kernels, 1000), some_logits(1000, spread)
    for seed in range(4):
        assert_same(draw(logits_LV, some_rows(seed), EOS), sample(logits_LV, some_rows(seed), EOS))


def test_ties_and_zeros_of_both_signs(kernels):
    """Logits rounded to whole numbers: each has hundreds of equals, zero with either sign."""
    draw, logits_LV = sampler(kernels, 3000), some_logits(3000, 2)
    logits_LV.round_()
    assert (logits_LV.view(torch.int32) == -(2**31)).any()  # there are negative zeros
    for seed in range(4):
        assert_same(draw(logits_LV, some_rows(seed), EOS), sample(logits_LV, some_rows(seed), EOS))


def test_positions_of_one_seed(kernels):
    """Hundreds of random numbers, all of which find the token that they find in numpy."""
    draw, logits_LV = sampler(kernels, 500), some_logits(500)
    for first in range(1, 300, MOST_ROWS):
        rows = [
            SamplingRow(n, SamplingParams(top_p=0.95), [1] * (first + n), 1, 99)
            for n in range(MOST_ROWS)
        ]
        logits = logits_LV[:1].expand(MOST_ROWS, -1)
        assert draw(logits, rows, EOS).tokens == sample(logits, rows, EOS).tokens


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_fail_their_own_row(kernels, bad):
    draw, logits_LV = sampler(kernels, 200), some_logits(200)
    logits_LV[::2, 177] = bad  # -inf is a token ruled out, no failure
    found, expected = draw(logits_LV, some_rows(), EOS), sample(logits_LV, some_rows(), EOS)
    assert_same(found, expected)
    assert len(found.errors) == (0 if bad == -math.inf else len(KINDS[::2]))


def test_no_token_left(kernels):
    draw, logits_LV = sampler(kernels, 64), some_logits(64)[:2]
    banned = SamplingParams(allowed_token_ids=(2,), min_tokens=5)
    rows = [SamplingRow(0, banned, [1, 1], 1, 0), SamplingRow(1, SamplingParams(), [1], 1, 0)]
    logits_LV[1] = -math.inf
    found = draw(logits_LV, rows, EOS)
    assert_same(found, sample(logits_LV, rows, EOS))
    assert sorted(found.errors) == [0, 1]


def test_a_row_draws_the_same_bits_alone_and_in_any_batch(kernels):
    draw, logits_LV = sampler(kernels, 2000), some_logits(2000)
    rows = some_rows()
    together = draw(logits_LV, rows, EOS)
    backwards = draw(padded(logits_LV.flip(0)), rows[::-1], EOS)
    assert backwards.tokens == together.tokens[::-1]
    assert backwards.logprobs == together.logprobs[::-1]
    for n in range(len(rows)):
        alone = sample_alone(draw, logits_LV, rows, n)
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[n], together.logprobs[n])


def sample_alone(draw, logits_LV, rows, n):
    """With a companion that keeps the step from being all greedy."""
    pair = padded(logits_LV[[n, 0]])
    return draw(pair, [rows[n], SamplingRow(99, SamplingParams(), [1], 1, 0)], EOS)


def test_logits_and_what_lies_behind_them_are_left_alone(kernels):
    draw, logits_LV = sampler(kernels, 100), some_logits(100)
    whole = torch.as_strided(logits_LV, (len(KINDS), 128), (128, 1))
    before = whole.clone()
    draw(logits_LV, some_rows(), EOS)
    np.testing.assert_array_equal(whole.numpy(), before.numpy())


def test_greedy_steps_take_what_the_model_step_has_found(kernels):
    logits_LV = some_logits(50)[:3]
    logits_LV[1, 7] = math.nan
    rows = [SamplingRow(n, SamplingParams(temperature=0), [1], 1, 0) for n in range(3)]
    draw = CpuSampler(kernels.sampler(50, 4), lambda: torch.tensor([4, 7, 9, 1]))
    found = draw(logits_LV, rows, EOS)
    assert found.tokens == ((4,), (), (9,))
    assert list(found.errors) == [1]


def test_rows_with_grammars(kernels):
    """What a mask rules out is never drawn, and logprobs are of the model all the same."""
    kinds = (
        {}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}, {"logprobs": 2}, {"typical_p": 0.8},
        {"min_tokens": 9, "frequency_penalty": 1.0},
    )  # fmt: skip
    vocab = 700
    random = np.random.default_rng(3)
    allowed = [random.choice(vocab, 9, replace=False) for _ in kinds]
    rows = []
    for n, (kind, ids) in enumerate(zip(kinds, allowed, strict=True)):
        row = SamplingRow(n, SamplingParams(**kind, grammar=regex("a")), [5, 6, 7], 2, 40 + n)
        bits = np.zeros(-(-vocab // 32) * 32, dtype=np.uint8)
        bits[ids] = 1
        row.mask = np.packbits(bits, bitorder="little").view(np.int32)
        rows.append(row)
    logits_LV = some_logits(vocab)[: len(rows)]
    expected = sample(logits_LV.clone(), rows, EOS)
    got = sampler(kernels, vocab)(logits_LV, rows, EOS)
    assert got.tokens == expected.tokens
    assert not got.errors
    assert all(tokens[0] in ids for tokens, ids in zip(got.tokens, allowed, strict=True))
    (told,) = got.logprobs[4]
    assert told == expected.logprobs[4][0]
    assert told.rank > 1
    assert told.top[0][0] not in allowed[4]

"""Every transform and filter against its definition, draws against their distribution."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ruvon.engine.draw import distribution, invert, largest, nucleus, uniform
from ruvon.engine.logprobs import LOWEST_LOGPROB, score_prompts, token_logprobs
from ruvon.engine.sampler import sample
from ruvon.engine.transforms import transforms_of
from ruvon.engine.types import PromptRow, SamplingParams, SamplingRow

EOS = (2, 3)


def row(history=(5, 6, 7), num_prompt=2, seq_id=0, seed=0, **sampling):
    return SamplingRow(seq_id, SamplingParams(**sampling), list(history), num_prompt, seed)


def some_logits(num_rows: int, vocab: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * 3


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def probabilities(logits_V: np.ndarray, **sampling) -> np.ndarray:
    """What `sample` draws from, as probabilities over the whole vocabulary."""
    ids, weights = distribution(logits_V, SamplingParams(**sampling))
    found = np.zeros(len(logits_V))
    found[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return found


def only(p: np.ndarray, kept: set[int]) -> np.ndarray:
    masked = np.where(np.isin(np.arange(len(p)), list(kept)), p, 0)
    return masked / masked.sum()


# ---------------------------------------------------------------- filters, against definitions


def naive_top_k(p, k):
    return set(np.argsort(-p, kind="stable")[:k].tolist())


def naive_top_p(p, mass):
    kept, total = set(), 0.0
    for token in np.argsort(-p, kind="stable").tolist():
        kept.add(token)
        total += p[token]
        if total >= mass:
            break
    return kept


def naive_min_p(p, share):
    return {token for token, q in enumerate(p) if q >= share * p.max()}


def naive_typical(p, mass):
    entropy = -sum(q * math.log(q) for q in p if q > 0)
    distance = [abs(-math.log(q) - entropy) if q > 0 else math.inf for q in p]
    total = 0.0
    for token in sorted(range(len(p)), key=distance.__getitem__):
        total += p[token]
        last = distance[token]
        if total >= mass:
            break
    return {token for token, d in enumerate(distance) if d <= last}


@pytest.mark.parametrize("vocab", [7, 128, 1000, 4099])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("sampling", "naive"),
    [
        ({"top_k": 1}, lambda p: naive_top_k(p, 1)),
        ({"top_k": 5}, lambda p: naive_top_k(p, 5)),
        ({"top_k": 600}, lambda p: naive_top_k(p, 600)),  # more than tiles
        ({"top_p": 0.001}, lambda p: naive_top_p(p, 0.001)),
        ({"top_p": 0.5}, lambda p: naive_top_p(p, 0.5)),
        ({"top_p": 0.99}, lambda p: naive_top_p(p, 0.99)),
        ({"min_p": 0.1}, lambda p: naive_min_p(p, 0.1)),
        ({"typical_p": 0.2}, lambda p: naive_typical(p, 0.2)),
        ({"typical_p": 0.95}, lambda p: naive_typical(p, 0.95)),
    ],
)
def test_a_filter_keeps_what_its_definition_keeps(vocab, temperature, sampling, naive):
    logits_V = some_logits(1, vocab, seed=vocab)[0].numpy()
    expected = softmax(logits_V.astype(np.float64) / temperature)
    found = probabilities(logits_V, temperature=temperature, **sampling)
    np.testing.assert_allclose(found, only(expected, naive(expected)), rtol=1e-4, atol=1e-9)


def test_filters_apply_one_after_the_other_each_to_what_the_last_left():
    logits_V = some_logits(1, 500)[0].numpy()
    p = softmax(logits_V.astype(np.float64) / 1.5)
    p = only(p, naive_top_k(p, 40))
    p = only(p, naive_min_p(p, 0.02))
    p = only(p, naive_top_p(p, 0.9))
    p = only(p, naive_typical(p, 0.8))
    found = probabilities(logits_V, temperature=1.5, top_k=40, min_p=0.02, top_p=0.9, typical_p=0.8)
    np.testing.assert_allclose(found, p, rtol=1e-4, atol=1e-9)


def test_a_flat_distribution_is_cut_by_lowest_id():
    flat = np.zeros(1000, dtype=np.float32)
    assert nucleus(np.ones(1000, dtype=np.float32), 0.25).tolist() == list(range(250))
    assert largest(flat, 3).tolist() == [0, 1, 2]
    assert np.flatnonzero(probabilities(flat, top_k=700)).tolist() == list(range(700))


def test_the_likeliest_token_always_stays():
    logits_V = some_logits(1, 300)[0].numpy()
    best = logits_V.argmax()
    for sampling in ({"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}):
        assert np.flatnonzero(probabilities(logits_V, **sampling)).tolist() == [best]


def test_a_temperature_near_zero_is_greedy_and_overflows_nothing():
    logits_LV = some_logits(1, 300)
    found = sample(logits_LV, [row(temperature=1e-38)], EOS)
    assert found.tokens == ((int(logits_LV.argmax()),),)


# ---------------------------------------------------------------- transforms, against definitions


def greedy_after(logits: list[float], **given) -> tuple[int, ...]:
    """The token drawn greedily, which shows the order of the changed scores."""
    return sample(torch.tensor([logits]), [row(temperature=0, **given)], EOS).tokens[0]


def test_bias_is_added():
    assert greedy_after([1.0, 0.0, 0.0, 0.0, 0.5], logit_bias={4: 0.6}) == (4,)
    assert greedy_after([1.0, 0.0, 0.0, 0.0, 0.5], logit_bias={0: -100}) == (4,)


def test_only_allowed_tokens_are_drawn():
    assert greedy_after([3.0, 2.0, 1.0, 0.0], allowed_token_ids=(3, 2)) == (2,)


def test_a_bad_word_is_not_completed():
    logits = [5.0, 4.0, 3.0, 2.0]
    assert greedy_after(logits, bad_words=((0,),)) == (1,)
    assert greedy_after(logits, bad_words=((7, 0), (1,))) == (2,)  # history ends with 7
    assert greedy_after(logits, bad_words=((6, 7, 0),)) == (1,)
    assert greedy_after(logits, bad_words=((5, 7, 0),)) == (0,)
    assert greedy_after(logits, bad_words=((1, 5, 6, 7, 0),)) == (0,)  # longer than the history


def test_stop_tokens_wait_for_min_tokens():
    logits = [0.0, 1.0, 9.0, 8.0, 7.0]
    assert greedy_after(logits, min_tokens=2) == (4,)  # one output token so far
    assert greedy_after(logits, min_tokens=1) == (2,)
    assert greedy_after(logits, min_tokens=2, stop_token_ids=(4,)) == (1,)
    assert greedy_after(logits, min_tokens=2, ignore_eos=True) == (2,)
    assert greedy_after(logits, min_tokens=2, ignore_eos=True, stop_token_ids=(2,)) == (3,)


def penalized(logits_V: Tensor, history, num_prompt, **sampling) -> np.ndarray:
    """Scores after penalties, read back from the distribution they leave."""
    scores = logits_V.clone().numpy()
    given = row(history, num_prompt, **sampling)
    for transform in transforms_of(given):
        transform(scores, given, EOS)
    return scores


def test_penalties_follow_their_definitions():
    logits_V = some_logits(1, 50)[0]
    history, num_prompt = [1, 2, 2, 3, 9, 9, 9, 4], 4
    found = penalized(
        logits_V,
        history,
        num_prompt,
        repetition_penalty=1.3,
        frequency_penalty=0.7,
        presence_penalty=-0.2,
    )
    expected = logits_V.double().numpy()
    for token in set(history):
        expected[token] *= 1.3 if expected[token] < 0 else 1 / 1.3
    for token, times in Counter(history[num_prompt:]).items():
        expected[token] -= 0.7 * times - 0.2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_scores_around_zero_get_less_likely_too():
    found = penalized(torch.tensor([0.5, 0.0, -0.5, 0.5]), [0, 1, 2], 1, repetition_penalty=2.0)
    np.testing.assert_allclose(found, [0.25, 0.0, -1.0, 0.5])


def test_penalties_leave_an_output_that_is_empty_alone():
    logits_V = some_logits(1, 50)[0]
    found = penalized(logits_V, [1, 2], 2, frequency_penalty=1.0, presence_penalty=1.0)
    np.testing.assert_array_equal(found, logits_V.numpy())


def test_transforms_come_in_order():
    """Bias before the repetition penalty, which then sees its sign; bans cannot be biased away."""
    logits_V = torch.tensor([0.0, -1.0, 0.5])
    found = penalized(
        logits_V, [1], 1, logit_bias={1: 3.0, 2: 100.0}, repetition_penalty=2.0, bad_words=((2,),)
    )
    np.testing.assert_allclose(found, [0.0, 1.0, -math.inf])


def test_the_logits_given_are_not_changed():
    logits_LV = some_logits(1, 20)
    before = logits_LV.clone()
    sample(logits_LV, [row(repetition_penalty=2.0, logit_bias={3: 5.0}, logprobs=2)], EOS)
    assert torch.equal(logits_LV, before)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.7}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05, "top_p": 0.95}],
    ids=str,
)
def test_draws_follow_the_distribution(sampling):
    """4,000 positions of one seed; chi-squared, with rare tokens taken together."""
    logits_V = some_logits(1, 300, seed=4)[0]
    expected = probabilities(logits_V.numpy(), **sampling)
    num = 4000
    drawn = Counter(
        sample(logits_V[None], [row([0] * n, 0, seed=11, **sampling)], EOS).tokens[0][0]
        for n in range(1, num + 1)
    )
    assert all(expected[token] > 0 for token in drawn)
    common = [token for token in range(300) if expected[token] * num >= 5]
    observed = [drawn[token] for token in common]
    wanted = [expected[token] * num for token in common]
    if num - sum(wanted) > 1e-6 * num:
        observed.append(num - sum(observed))
        wanted.append(num - sum(wanted))
    wanted[-1] += num - sum(wanted)
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_uniform_numbers_are_uniform_over_seeds_and_positions():
    over_positions = [uniform(7, n) for n in range(4000)]
    over_seeds = [uniform(seed, 0) for seed in range(4000)]
    for numbers in (over_positions, over_seeds):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(over_positions, over_seeds)[0, 1]) < 0.06
    assert uniform(2**64 + 3, 1) == uniform(3, 1)
    assert 0 <= uniform(-1, 0) < 1


@pytest.mark.parametrize("size", [1, 3, 128, 129, 5000])
def test_inverting_finds_every_token_with_weight_and_no_other(size):
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    weights[::3] *= 1e-6
    weights[1::5] = 0
    running = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    for share in (0.0, 1e-9, 0.1, 0.25, 0.5, 0.77, 0.999, 1 - 2.0**-48):
        found = invert(weights, share)
        assert weights[found] > 0
        assert running[found] >= share - 1e-5
        assert found == 0 or running[found - 1] <= share + 1e-5


def mixed_rows() -> list[SamplingRow]:
    kinds = (
        {"temperature": 0},
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 20, "logprobs": 3},
        {"typical_p": 0.9, "repetition_penalty": 1.2},
        {"min_p": 0.05, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"temperature": 0, "min_tokens": 9, "logprobs": 0},
    )
    return [
        row([4, 8, 15, 16, 23][: 3 + n % 3], 2, seq_id=n, seed=100 + n, **kinds[n % len(kinds)])
        for n in range(21)
    ]


def test_a_row_draws_the_same_alone_as_in_a_batch():
    rows = mixed_rows()
    logits_LV = some_logits(len(rows), 2000)
    together = sample(logits_LV, rows, EOS)
    for n, one in enumerate(rows):
        alone = sample(logits_LV[n : n + 1].clone(), [one], EOS)
        assert alone.tokens[0] == together.tokens[n]
        assert alone.logprobs[0] == together.logprobs[n]
    shuffled = sample(logits_LV.flip(0), rows[::-1], EOS)
    assert shuffled.tokens == together.tokens[::-1]


def test_the_seed_and_the_position_decide():
    logits_LV = torch.zeros(1, 50_000)
    drawn = {
        sample(logits_LV, [row([1] * n, 1, seed=seed)], EOS).tokens[0]
        for seed in range(20)
        for n in range(1, 20)
    }
    assert len(drawn) > 360  # of 380; all of 50,000 are equally likely
    again = [sample(logits_LV, [row([1, 1], 1, seed=3)], EOS).tokens for _ in range(2)]
    assert again[0] == again[1]


def test_positions_count_from_the_start_of_the_output():
    """The prompt's length has no say in which number is drawn."""
    logits_LV = torch.zeros(2, 50_000)
    rows = [row([1] * 9 + [5, 6], 9, seed=3), row([1, 5, 6], 1, seed=3)]
    first, second = sample(logits_LV, rows, EOS).tokens
    assert first == second


def test_greedy_takes_the_lowest_id_of_equals():
    logits_LV = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    rows = [row(temperature=0, seq_id=n) for n in range(2)]
    assert sample(logits_LV, rows, EOS).tokens == ((1,), (0,))
    with_logprobs = [row(temperature=0, logprobs=2, seq_id=n) for n in range(2)]
    found = sample(logits_LV, with_logprobs, EOS)
    assert found.tokens == ((1,), (0,))
    assert [token for token, _ in found.logprobs[0][0].top] == [1, 2]


def test_no_rows_draw_nothing():
    assert sample(torch.empty(0, 10), [], EOS).tokens == ()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"logprobs": 1, "top_p": 0.5}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_fail_their_own_row(sampling, bad):
    logits_LV = some_logits(3, 200)
    expected = sample(logits_LV, [row(seq_id=n, **sampling) for n in range(3)], EOS)
    logits_LV[1, 77] = bad
    found = sample(logits_LV, [row(seq_id=n, **sampling) for n in range(3)], EOS)
    assert found.tokens == (expected.tokens[0], (), expected.tokens[2])
    assert found.logprobs[1] is None
    assert list(found.errors) == [1]


def test_a_row_without_any_token_left_is_an_error():
    rows = [row(allowed_token_ids=(2,), min_tokens=5), row(seq_id=1)]
    found = sample(torch.zeros(2, 8), rows, EOS)
    assert found.tokens[0] == ()
    assert "ruled out" in found.errors[0]
    assert len(found.tokens[1]) == 1


# ---------------------------------------------------------------- logprobs


def test_logprobs_are_the_models_own():
    logits_LV = some_logits(1, 700)
    expected = torch.log_softmax(logits_LV[0].double(), dim=-1)
    given = row(temperature=0.5, top_k=3, logprobs=4, logit_bias={9: 50.0})
    found = sample(logits_LV, [given], EOS)
    (entry,) = found.logprobs[0]
    assert found.tokens[0] == (9,)
    assert entry.token == 9
    assert entry.logprob == pytest.approx(float(expected[9]), abs=1e-5)
    assert entry.rank == 1 + int((expected > expected[9]).sum())
    best = torch.argsort(expected, descending=True, stable=True)[:4].tolist()
    assert [token for token, _ in entry.top] == best
    assert [p for _, p in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_logprobs_of_named_tokens_are_told_in_place_of_the_likeliest():
    logits_LV = some_logits(1, 700)
    expected = torch.log_softmax(logits_LV[0].double(), dim=-1)
    given = row(temperature=0, logprobs=2, logprob_token_ids=(699, 3, 50))
    (entry,) = sample(logits_LV, [given], EOS).logprobs[0]
    assert [token for token, _ in entry.top] == [699, 3, 50]
    wanted = expected[[699, 3, 50]].tolist()
    assert [p for _, p in entry.top] == pytest.approx(wanted, abs=1e-5)
    assert entry.logprob == pytest.approx(float(expected.max()), abs=1e-5)


def test_logprobs_are_finite_and_no_more_than_there_are_tokens():
    logits_V = np.array([0.0, -math.inf, -1e6], dtype=np.float32)
    entry = token_logprobs(logits_V, 1, 99)
    assert entry.logprob == LOWEST_LOGPROB
    assert [token for token, _ in entry.top] == [0, 2, 1]
    assert [p for _, p in entry.top] == [0.0, LOWEST_LOGPROB, LOWEST_LOGPROB]
    assert entry.rank == 3


def test_zero_logprobs_are_the_drawn_token_alone():
    assert sample(some_logits(1, 30), [row(logprobs=0)], EOS).logprobs[0][0].top == ()


def test_prompts_are_scored_across_pieces_and_fail_alone():
    logits_QV = some_logits(6, 40)
    logits_QV[4, 0] = math.nan
    rows = (PromptRow(7, 0, (1, 2, 3), 2), PromptRow(8, 1, (4, 5), 0), PromptRow(9, 2, (6,), 1))
    found = score_prompts(iter((logits_QV[:2], logits_QV[2:])), rows)
    expected = torch.log_softmax(logits_QV.double(), dim=-1)
    assert [entry.token for entry in found.logprobs[7]] == [1, 2, 3]
    for position, entry in enumerate(found.logprobs[7]):
        wanted = float(expected[position, entry.token])
        assert entry.logprob == pytest.approx(wanted, abs=1e-5)
        assert len(entry.top) == 2
    assert list(found.errors) == [8]
    assert found.logprobs[9][0].logprob == pytest.approx(float(expected[5, 6]), abs=1e-5)

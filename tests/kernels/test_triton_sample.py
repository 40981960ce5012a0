"""Sampling on the device: against the definitions, and against the distribution."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from ruvon.kernels import sample as kernels
from ruvon.kernels.scores import IN_PROMPT, score
from ruvon.kernels.staging import load_inputs, load_masks, store_outputs

pytestmark = pytest.mark.usefixtures("triton_device", "seeded")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
VOCAB = 5000  # more than one block, and not a multiple of it


def draw(logits, *, state=None, repeat=1, wants_logprob=False, **fields):
    """``repeat`` draws from one row of logits with these parameters."""
    state = state or kernels.make_state(repeat, logits.shape[-1], DEVICE)
    words = np.zeros((repeat, kernels.PARAMS), dtype=np.int32)
    floats = words.view(np.float32)
    floats[:, kernels.TEMPERATURE] = fields.get("temperature", 1.0)
    floats[:, kernels.TOP_P] = fields.get("top_p", 1.0)
    floats[:, kernels.MIN_P] = fields.get("min_p", 0.0)
    floats[:, kernels.REPETITION] = fields.get("repetition", 1.0)
    floats[:, kernels.PRESENCE] = fields.get("presence", 0.0)
    floats[:, kernels.FREQUENCY] = fields.get("frequency", 0.0)
    words[:, kernels.TOP_K] = fields.get("top_k", 0)
    words[:, kernels.SEED_LOW] = fields.get("seed", 7)
    words[:, kernels.DRAW] = np.arange(repeat)
    words[:, kernels.HISTORY] = 0 if fields.get("history") else -1
    words[:, kernels.BIAS] = 0 if fields.get("bias") else -1
    words[:, kernels.WANTS_LOGPROB] = wants_logprob
    words[:, kernels.SLOT] = np.arange(repeat)
    sampled = kernels.make_sampled(repeat, DEVICE)
    rows = logits.to(DEVICE).expand(repeat, -1).contiguous()
    kernels.sample(rows, torch.from_numpy(words).to(DEVICE), state, sampled)
    return sampled


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.randn(VOCAB)
    logits[[4600, 321, 322]] = 9.0
    assert draw(logits, temperature=0.0).tokens.tolist() == [321]


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity minus infinity, on its way out
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_give_no_token(bad):
    logits = torch.randn(VOCAB)
    logits[4321] = bad
    expected = kernels.NOT_A_NUMBER if np.isnan(bad) else kernels.INFINITE
    for temperature in (0.0, 1.0):
        assert draw(logits, temperature=temperature).tokens.tolist() == [expected]


def test_nothing_left():
    logits = torch.full((VOCAB,), float("-inf"))
    assert draw(logits).tokens.tolist() == [kernels.NOTHING_LEFT]


def test_logprob_and_rank_are_the_models_own():
    logits = torch.randn(VOCAB)
    drawn = draw(logits, temperature=3.0, wants_logprob=True, repeat=4)
    expected = logits.log_softmax(-1)
    for token, logprob, rank in zip(*(t.tolist() for t in drawn), strict=True):
        assert logprob == pytest.approx(expected[token].item(), abs=1e-4)
        assert rank == 1 + int((logits > logits[token]).sum())


def test_scores_are_the_models_and_those_of_a_row_alone():
    logits = torch.randn(5, VOCAB, device=DEVICE) * 3
    tokens = torch.tensor([0, 4999, 17, 800, 3], dtype=torch.int32, device=DEVICE)
    norms, ranks = score(logits, tokens)
    torch.testing.assert_close(norms, logits.logsumexp(-1))
    chosen = logits.gather(-1, tokens[:, None].long())
    assert ranks.tolist() == (1 + (logits > chosen).sum(-1)).tolist()
    alone = [score(logits[i : i + 1], tokens[i : i + 1])[0] for i in range(5)]
    assert torch.equal(torch.cat(alone), norms)


def test_a_nucleus_of_nothing_is_the_likeliest():
    logits = torch.randn(VOCAB)
    drawn = draw(logits, top_p=0.0, repeat=8).tokens.tolist()
    assert drawn == [int(logits.argmax())] * 8


def keep_only(probs, kept):
    probs = np.where(kept, probs, 0.0)
    return probs / probs.sum()


def filtered(logits, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0):
    """The distribution by sorting, as the filters are defined."""
    probs = (logits.double() / temperature).softmax(-1).numpy()
    if top_k:
        probs = keep_only(probs, probs >= np.sort(probs)[-top_k])
    if min_p:
        probs = keep_only(probs, probs >= min_p * probs.max())
    if top_p < 1:
        order = np.argsort(-probs, kind="stable")
        before = np.cumsum(probs[order]) - probs[order]
        kept = np.zeros(len(probs), dtype=bool)
        kept[order[before < top_p]] = True
        probs = keep_only(probs, kept)
    return probs


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_k": 1},
        {"top_p": 0.6},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.01, "temperature": 1.3},
    ],
    ids=str,
)
def test_distribution(filters):
    logits = torch.full((VOCAB,), -30.0) + torch.randn(VOCAB)
    likely = torch.randperm(VOCAB)[:40]
    logits[likely] = torch.randn(40) * 1.5
    expected = filtered(logits, **filters)
    repeat = 4000 if GPU else 30
    tokens = draw(logits, repeat=repeat, **filters).tokens.cpu().numpy()
    assert expected[tokens].min() > 1e-7, "a token outside of what the filters keep"
    counts = np.bincount(tokens, minlength=VOCAB)
    often = expected * repeat >= 5
    observed, wanted = counts[often], expected[often] * repeat
    rest = repeat - wanted.sum()
    if rest > 1:
        observed, wanted = np.append(observed, repeat - observed.sum()), np.append(wanted, rest)
    if len(wanted) > 1:
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


def test_seeds_and_draws_decide_alone():
    logits = torch.randn(VOCAB)
    many = draw(logits, repeat=8).tokens.tolist()
    assert many == draw(logits, repeat=8).tokens.tolist()
    assert many[:1] == draw(logits, repeat=1).tokens.tolist()
    assert many != draw(logits, repeat=8, seed=8).tokens.tolist()
    assert len(set(many)) > 4


def test_penalties_and_bias():
    logits = torch.randn(VOCAB)
    state = kernels.make_state(1, VOCAB, DEVICE)
    counts = torch.zeros(VOCAB)
    counts[torch.randperm(VOCAB)[:900]] = torch.randint(1, 4, (900,)).float()
    prompt = torch.rand(VOCAB) < 0.3
    state.counts[0] = (counts.short() | (prompt * int(IN_PROMPT)).short()).to(DEVICE)
    bias = torch.randn(VOCAB).half()
    bias[100] = float("-inf")
    state.bias[0] = bias.to(DEVICE)
    scores = logits + bias.float()
    seen = prompt | (counts > 0)
    scores = torch.where(seen, torch.where(scores > 0, scores / 1.5, scores * 1.5), scores)
    scores -= 0.3 * counts + 0.4 * (counts > 0)
    expected = int(scores.argmax())
    before = int(state.counts[0, expected])
    drawn = draw(
        logits, state=state, temperature=0.0, history=True, bias=True,
        repetition=1.5, presence=0.4, frequency=0.3,
    )  # fmt: skip
    assert drawn.tokens.tolist() == [expected]
    assert state.last_tokens.tolist() == [expected]
    assert int(state.counts[0, expected]) == before + 1


@pytest.mark.parametrize("temperature", [1e-39, 1e-44, 2.0**-126])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature):
    logits = torch.randn(VOCAB)
    assert draw(logits, temperature=temperature).tokens.tolist() == [int(logits.argmax())]


@pytest.mark.parametrize("top_p", [0.0, 1e-45, 1e-30])
def test_every_top_p_ends(top_p):
    """Among many equals too, each of which weighs more than is wanted."""
    logits = torch.zeros(VOCAB)
    logits[7:] = 3.0
    tokens = draw(logits, top_p=top_p, repeat=3).tokens.tolist()
    assert all(token >= 7 for token in tokens)


class Inputs:
    """Two rows of two sequences, in slots 2 and 0, as words on the device and two staging buffers;
    tables of three blocks of four tokens."""

    def __init__(self):
        self.staging = torch.full((2, 52), -1, dtype=torch.int32, device=DEVICE)
        self.turn = torch.ones(1, dtype=torch.int32, device=DEVICE)
        self.words = torch.zeros(50, dtype=torch.int32, device=DEVICE)
        self.last = torch.tensor([50, 60, 70], dtype=torch.int32, device=DEVICE)
        self.tables = torch.zeros(1, 3, 3, dtype=torch.int32, device=DEVICE)

    def load(self, words):
        self.staging[1, : len(words)] = torch.tensor(words, dtype=torch.int32)
        ids, positions, slots, contexts, rows, params, mode, new_blocks, patches = (
            torch.split(self.words, (2, 2, 2, 3, 2, 2 * kernels.PARAMS, 1, 2, 4))
        )  # fmt: skip
        inputs = {
            "token_ids": ids, "positions": positions, "slots": slots[None],
            "context_lens": contexts, "logit_rows": rows, "params": params.view(2, -1),
            "mode": mode, "new_blocks": new_blocks[None], "patches": patches.view(2, 2),
        }  # fmt: skip
        load_inputs(self.staging, self.turn, self.words, inputs, self.last, self.tables, 4)
        return self.words.tolist()


def params(slot, draw):
    words = [0] * kernels.PARAMS
    words[kernels.SLOT], words[kernels.DRAW] = slot, draw
    return words


# ids, positions, cache slots, context lengths by slot, logit rows, parameters of a row each
FIRST = [-1, 5, 3, 6, 31, 22, 4, 0, 7, 1, 0, *params(2, 8), *params(0, 9)]


def test_a_step_begins_with_what_only_the_device_knows():
    inputs = Inputs()
    words = [*FIRST, 0, -1, -1, 6, 5, -1, 9]
    assert inputs.load(words) == [50, *words[1:]]
    assert inputs.tables.tolist() == [[[0, 0, 0], [0, 0, 0], [5, 0, 0]]]


def test_a_steady_step_goes_on_by_itself():
    """Each row with the token its slot has sampled, one position on; one begins a new block."""
    inputs = Inputs()
    inputs.load([*FIRST, 0, -1, -1, 6, 4, 7, 5])
    inputs.load([*[99] * len(FIRST), 1, -1, 8])
    positions, contexts = [4, 7], [5, 0, 8]
    slots = [8 * 4, 5 * 4 + 3]
    rows = [1, 0, *params(2, 9), *params(0, 10)]
    assert inputs.words.tolist()[: len(FIRST)] == [50, 70, *positions, *slots, *contexts, *rows]
    assert inputs.tables.tolist() == [[[0, 8, 0], [0, 0, 0], [4, 5, 0]]]


def test_a_step_stores_its_results_and_passes_the_turn_on():
    results = torch.arange(600, dtype=torch.int32, device=DEVICE)
    staging = torch.zeros(3, 600, dtype=torch.int32, device=DEVICE)
    turn = torch.ones(1, dtype=torch.int32, device=DEVICE)
    store_outputs(results, staging, turn)
    store_outputs(results + 1, staging, turn)
    assert turn.tolist() == [0]
    assert [buffer[1].item() for buffer in staging] == [0, 1, 2]
    assert torch.equal(staging[1], results)
    assert torch.equal(staging[2], results + 1)


def test_masks_are_for_rows_that_have_one_and_only_in_their_turn():
    """Rows 0 and 2 of three; a mask leaves an odd token here and there."""
    state, sampled = kernels.make_state(3, VOCAB, DEVICE), kernels.make_sampled(3, DEVICE)
    logits = torch.randn(3, VOCAB)
    params = torch.zeros(3, kernels.PARAMS, dtype=torch.int32)
    params[:, [kernels.HISTORY, kernels.BIAS]] = -1
    params[:, kernels.SLOT] = torch.arange(3)
    params[:, kernels.MASK] = torch.tensor([2, 0, 1])
    params[:, kernels.WANTS_LOGPROB] = 1
    allowed = torch.rand(2, VOCAB) < 0.01
    padded = np.zeros((2, state.masks.shape[1] * 32), dtype=np.uint8)
    padded[:, :VOCAB] = allowed
    staged = torch.zeros_like(state.masks, device="cpu", pin_memory=GPU)
    staged[:2] = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))
    params, rows = params.to(DEVICE), logits.to(DEVICE)
    kernels.sample(rows, params, state, sampled)
    assert sampled.tokens[1] == logits[1].argmax()
    assert state.last_tokens.tolist() == [0, logits[1].argmax(), 0]
    sampled.tokens[1] = -9  # which is not written again
    load_masks(staged, state.masks, params)
    kernels.sample(rows, params, state, sampled, masked=True)
    expected = [
        logits[i].masked_fill(~allowed[j], -torch.inf).argmax() for i, j in ((0, 1), (2, 0))
    ]
    assert sampled.tokens.tolist() == [expected[0], -9, expected[1]]
    assert state.last_tokens.tolist() == [expected[0], logits[1].argmax(), expected[1]]
    of_model = logits.log_softmax(-1)  # not of what the mask leaves
    assert sampled.logprobs[0].item() == pytest.approx(of_model[0, expected[0]].item(), abs=1e-4)
    assert sampled.ranks[2] == 1 + (logits[2] > logits[2, expected[1]]).sum()


def test_a_mask_that_allows_nothing_gives_no_token():
    state, sampled = kernels.make_state(1, VOCAB, DEVICE), kernels.make_sampled(1, DEVICE)
    params = torch.zeros(1, kernels.PARAMS, dtype=torch.int32)
    params[:, [kernels.HISTORY, kernels.BIAS]], params[:, kernels.MASK] = -1, 1
    logits = torch.randn(1, VOCAB).to(DEVICE)
    kernels.sample(logits, params.to(DEVICE), state, sampled, masked=True)
    assert sampled.tokens.tolist() == [kernels.NOTHING_LEFT]

"""Drawing on the device: against the definitions, and against the distribution."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from ruvon.kernels import sample as kernels
from ruvon.kernels.begin import begin, end

pytestmark = pytest.mark.usefixtures("triton_device")

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
    words[:, kernels.SEAT] = np.arange(repeat)
    drawn = kernels.make_drawn(repeat, DEVICE)
    rows = logits.to(DEVICE).expand(repeat, -1).contiguous()
    kernels.sample(rows, torch.from_numpy(words).to(DEVICE), state, drawn)
    return drawn


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
    state.counts[0] = (counts.short() | (prompt * int(kernels.IN_PROMPT)).short()).to(DEVICE)
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


def test_a_step_begins_with_what_only_the_device_knows():
    ids, patches = [5, -1, -3, 0], [3, 9, -1, 4, 0, 7]
    boxes = torch.full((2, 12), -1, dtype=torch.int32, device=DEVICE)
    boxes[1] = torch.tensor([*ids, -7, 8, *patches], dtype=torch.int32)
    turn = torch.ones(1, dtype=torch.int32, device=DEVICE)
    words = torch.zeros(12, dtype=torch.int32, device=DEVICE)
    last = torch.tensor([50, 60, 70], dtype=torch.int32, device=DEVICE)
    tables = torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    begin(boxes, turn, words, last, tables, 4, (6, 12))
    assert words.tolist() == [5, 50, 70, 0, -7, 8, *patches]
    assert tables.tolist() == [[7, 0, 0], [9, 0, 0]]


def test_a_step_ends_in_its_box_and_passes_the_turn_on():
    results = torch.arange(600, dtype=torch.int32, device=DEVICE)
    boxes = torch.zeros(3, 600, dtype=torch.int32, device=DEVICE)
    turn = torch.ones(1, dtype=torch.int32, device=DEVICE)
    end(results, boxes, turn)
    end(results + 1, boxes, turn)
    assert turn.tolist() == [0]
    assert [box[1].item() for box in boxes] == [0, 1, 2]
    assert torch.equal(boxes[1], results)
    assert torch.equal(boxes[2], results + 1)

"""The GPU's runner: on a GPU as it is, without one over Triton's interpreter and no graphs."""

import pickle
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ruvon.config import EngineConfig
from ruvon.engine.batch import build_batch
from ruvon.engine.draw import distribution
from ruvon.engine.engine import Engine
from ruvon.engine.gpu.graphs import Bucket, Graphs, StepWords, mixed_buckets, single_buckets
from ruvon.engine.gpu.persistent_batch import PersistentBatch
from ruvon.engine.gpu.runner import GpuRunner
from ruvon.engine.gpu.sampling_state import params_of
from ruvon.engine.gpu.scoring import Scorer, alternatives
from ruvon.engine.gpu.typical import narrow_masks
from ruvon.engine.grammar import Grammars
from ruvon.engine.matching import Matchers, ban
from ruvon.engine.runner import Runner
from ruvon.engine.sampler import sample
from ruvon.engine.types import (
    BEING_SAMPLED,
    Chunk,
    Job,
    NewSequence,
    Plan,
    PooledRows,
    PromptRow,
    SamplingParams,
    SamplingRow,
)
from ruvon.grammars import regex
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.kernels.reference import make_torch_ops
from ruvon.kernels.sample import BIAS, HISTORY, PARAMS, make_state
from ruvon.kernels.triton_ops import make_triton_ops
from ruvon.models import MODELS
from ruvon.models.quantize import SCHEMES
from ruvon.models.shares import share_of
from ruvon.models.sources import RandomTensors
from ruvon.models.spec import spec_from_config
from ruvon.models.weights import Weights
from ruvon.telemetry import silent

# Rows of padding hold whatever was in memory, and the interpreter computes with numpy.
pytestmark = [
    pytest.mark.usefixtures("triton_device"),
    pytest.mark.filterwarnings("ignore:overflow"),
    pytest.mark.filterwarnings("ignore:invalid value"),
    pytest.mark.filterwarnings("ignore:divide by zero"),
]

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PAGE, BLOCKS, LONGEST, SLOTS = 16, 24, 128, 3

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": LONGEST,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


class Weighty(RandomTensors):
    """Weights large enough for tokens to depend on what came before."""

    def read(self, name, shape, cut=(), *, bytes_only=False):
        values = super().read(name, shape, cut, bytes_only=bytes_only)
        return values * 10 if len(shape) > 1 else values


def build_model(ops, mesh=ALONE):
    spec, family = spec_from_config(LLAMA), MODELS["LlamaForCausalLM"]
    source = Weighty(Path("tiny"), 0, torch.float32)
    weights = Weights(
        source=source, rules=family.rules, scheme=SCHEMES["none"], ops=ops,
        share=share_of(spec, mesh),
    )  # fmt: skip
    return family.build(spec, weights, ops)


def make_cache(model):
    shape = (BLOCKS + 1, model.spec.num_kv_heads, PAGE, model.spec.head_dim)
    return [tuple(torch.zeros(shape, device=DEVICE) for _ in range(2)) for _ in model.held]


class Letters:
    """One character a token, ``%`` and up; 2 ends."""

    vocab_size, bos_id, special_ids = 97, 1, frozenset({1, 2})

    def token_bytes(self, id):
        return bytes([35 + id])

    def encode(self, text, *, add_special_tokens):
        return [byte - 35 for byte in text.encode()]


@pytest.fixture(scope="module")
def letters():
    made = Grammars(Letters(), 97, (2,))
    yield made
    made.close()


@pytest.fixture(scope="module")
def gpu_runner(triton_device, letters):
    runner = runner_over(ALONE, Matchers(letters, at_once=False))
    yield runner
    runner.close()


def runner_over(mesh, matchers):
    ops = make_triton_ops if GPU else make_torch_ops  # what the runner itself does is Triton's
    model = build_model(ops(torch.float32, DEVICE), mesh)
    cache = make_cache(model)
    scorer = Scorer(
        partial(model.hidden, cache=cache),
        model.logits if matchers else None,
        device=DEVICE,
        block_size=PAGE,
        max_logit_rows=16,
    )
    return GpuRunner(
        partial(model.forward, cache=cache),
        scorer,
        device=DEVICE,
        block_size=PAGE,
        vocab_size=97,
        max_model_len=LONGEST,
        max_seqs=SLOTS,
        max_tokens=40,
        eos_token_ids=(2,),
        matchers=matchers,
        progress=silent,
    )


@pytest.fixture(scope="module")
def expected(letters):
    """Greedy continuation by plain torch, one sequence at a time: (prompt, count) → tokens."""
    ops = make_torch_ops(torch.float32, DEVICE)
    model = build_model(ops)
    runner = Runner(
        partial(model.forward, cache=make_cache(model)),
        partial(sample, eos_token_ids=(2,)),
        block_size=PAGE,
        device=DEVICE,
        max_logit_rows=64,
        matchers=Matchers(letters),
    )

    def continue_(prompt, count, sampling=None):
        story = Story(0, prompt, list(range(LONGEST // PAGE)), sampling)
        for _ in range(count):
            plan = plan_of((story, story.chunk()))
            story.tokens += runner.launch(plan).result().tokens[0]
        return story.tokens[len(prompt) :]

    yield continue_
    runner.close()


class Story:
    """One sequence, as a scheduler would keep it."""

    def __init__(self, seq_id, prompt, blocks, sampling=None):
        self.id, self.tokens, self.blocks = seq_id, list(prompt), (tuple(blocks),)
        self.num_prompt, self.num_computed = len(prompt), 0
        self.sampling = sampling or SamplingParams(temperature=0)

    def chunk(self, limit=None, *, ahead=False):
        """What is pending, or ``limit`` tokens of it; or a token that nobody knows yet."""
        start = self.num_computed
        tokens = BEING_SAMPLED if ahead else tuple(self.tokens[start:][:limit])
        self.num_computed += len(tokens)
        samples = ahead or self.num_computed == len(self.tokens)
        return Chunk(self.id, 0, tokens, start, () if start else self.blocks, samples)

    def new(self):
        return NewSequence(self.id, self.sampling, self.num_prompt, 5)

    def sample(self, token):
        self.tokens.append(token)


def take(stories, plan, result):
    by_id = {story.id: story for story in stories}
    for seq_id, tokens in zip(plan.rows, result.tokens, strict=True):
        by_id[seq_id].sample(tokens[0])


def plan_of(*parts):
    chunks = tuple(chunk for _, chunk in parts)
    return Plan(0, chunks, tuple(story.new() for story, chunk in parts if not chunk.start))


PROMPTS = ([3, 5, 8, 13], list(range(10, 45)), [60] * 17)


def make_stories(sampling=None):
    blocks = ([7 * i + j for j in range(7)] for i in range(len(PROMPTS)))
    return [
        Story(10 + i, prompt, own, sampling)
        for i, (prompt, own) in enumerate(zip(PROMPTS, blocks, strict=True))
    ]


def test_steps_overlap_and_mix(gpu_runner, expected):
    """Whole prompts, a chunked one, tokens being sampled, and a sequence that ends among others."""
    a, b, c = stories = make_stories()
    misses = gpu_runner.num_misses
    plans = [
        plan_of((a, a.chunk()), (b, b.chunk(20))),
        plan_of((a, a.chunk(ahead=True)), (b, b.chunk()), (c, c.chunk())),
        plan_of(*((s, s.chunk(ahead=True)) for s in stories)),
        plan_of((b, b.chunk(ahead=True)), (c, c.chunk(ahead=True))),
        plan_of((c, c.chunk(ahead=True))),
        plan_of((c, c.chunk(ahead=True))),
    ]
    before: tuple[Plan, Future] | None = None
    for plan in plans:
        future = gpu_runner.launch(plan)
        if before is not None:
            take(stories, before[0], before[1].result())
        before = (plan, future)
    take(stories, before[0], before[1].result())
    assert gpu_runner.num_misses == misses
    for story, prompt, count in zip(stories, PROMPTS, (3, 3, 5), strict=True):
        assert story.tokens[len(prompt) :] == expected(prompt, count)


def test_rows_with_bad_words(gpu_runner, expected):
    """They look at several tokens. Other rows of the step, and later ones, do not notice."""
    banned = expected(PROMPTS[0], 2)
    sampling = SamplingParams(temperature=0, bad_words=(tuple(banned),))
    story, other = Story(50, PROMPTS[0], [1, 2], sampling), Story(51, PROMPTS[2], [3, 4])
    misses, results = gpu_runner.num_misses, []
    plan = plan_of((story, story.chunk()), (other, other.chunk()))
    for _ in range(4):
        results.append((plan, gpu_runner.launch(plan).result()))
        if len(results) > 1:  # one step late, as an engine would
            take([story, other], *results[-2])
        plan = plan_of(*((s, s.chunk(ahead=True)) for s in (story, other)))
    take([story, other], *results[-1])
    assert gpu_runner.num_misses == misses
    assert story.tokens[len(PROMPTS[0]) :] == expected(PROMPTS[0], 4, sampling)
    assert story.tokens[len(PROMPTS[0]) :][:2] != banned
    assert other.tokens[len(PROMPTS[2]) :] == expected(PROMPTS[2], 4)


RULE = regex("([F-Z]abc|[^A]def){2,3}")


def launch_ahead(gpu_runner, stories, count):
    """So many steps, each launched before the one before is read; all results."""
    plan, launched, results = plan_of(*((s, s.chunk()) for s in stories)), [], []
    for _ in range(count):
        launched.append((plan, gpu_runner.launch(plan)))
        plan = plan_of(*((s, s.chunk(ahead=True)) for s in stories))
        if len(launched) > 1:
            results.append(launched[-2][1].result())
            take(stories, launched[-2][0], results[-1])
    results.append(launched[-1][1].result())
    take(stories, launched[-1][0], results[-1])
    return results


@pytest.mark.parametrize(
    "sampling",
    [
        {"frequency_penalty": 2.0, "min_tokens": 3},  # forced tokens count for both
        {"logprobs": 2},  # so nothing is forced
        {"typical_p": 0.9, "bad_words": ((40, 41),)},
    ],
    ids=str,
)
def test_rows_with_grammars(gpu_runner, expected, sampling):
    """Beside a row without, in steps that overlap; forced tokens come one by one."""
    misses, sampling = (
        gpu_runner.num_misses,
        SamplingParams(temperature=0, grammar=RULE, **sampling),
    )
    story, other = Story(55, PROMPTS[0], [1, 2], sampling), Story(56, PROMPTS[2], [3, 4])
    for result in launch_ahead(gpu_runner, (story, other), 5):
        assert not result.errors
        assert bool(result.logprobs[0]) == (sampling.logprobs is not None)
    assert (gpu_runner.num_misses == misses) == (sampling.typical_p == 1)
    assert story.tokens[len(PROMPTS[0]) :] == expected(PROMPTS[0], 5, sampling)[:5]
    assert other.tokens[len(PROMPTS[2]) :] == expected(PROMPTS[2], 5)


def test_a_grammar_that_is_complete_gets_no_token_more(gpu_runner):
    """Of the step that was launched before anybody knew."""
    sampling = SamplingParams(temperature=0, grammar=regex("[F-Z]a"))
    story, other = Story(57, PROMPTS[0], [1, 2], sampling), Story(58, PROMPTS[2], [3, 4])
    first = plan_of(*((s, s.chunk()) for s in (story, other)))
    rest = [plan_of(*((s, s.chunk(ahead=True)) for s in (story, other))) for _ in range(2)]
    futures = [gpu_runner.launch(plan) for plan in (first, *rest)]
    results = [future.result() for future in futures]
    assert [result.ended for result in results] == [set(), {57}, set()]
    assert [len(result.tokens[0]) for result in results] == [1, 1, 0]
    assert all(len(result.tokens[1]) == 1 for result in results)
    assert [*results[2].errors] == [57]


@pytest.mark.parametrize(("masks", "error"), [("wrong", "not allow"), ("panic", "BaseException")])
def test_a_row_whose_mask_fails_fails_alone(gpu_runner, monkeypatch, masks, error):
    """And so does one that is sampled against its grammar."""
    sampling = SamplingParams(temperature=0, grammar=RULE)
    stories = Story(65, PROMPTS[0], [1], sampling), Story(66, PROMPTS[0], [3])
    compute = gpu_runner._matchers._compute

    def compute_wrongly(live, masks_RW):
        compute(live, masks_RW)
        masks_RW[:] = 0
        masks_RW[:, 0] = 1 << 30  # for an A
        if masks == "panic":
            raise BaseException("as a panic of the library's")

    monkeypatch.setattr(gpu_runner._matchers, "_compute", compute_wrongly)
    result = gpu_runner.launch(plan_of(*((s, s.chunk()) for s in stories))).result()
    assert [len(tokens) for tokens in result.tokens] == [0, 1]
    assert list(result.errors) == [65]
    assert error in result.errors[65]


def test_pooled_hidden_states(gpu_runner):
    """Of two prompts in two chunks, one after the other, and a decode between them."""
    prompt, beside = Story(62, PROMPTS[2], [1, 2]), Story(63, PROMPTS[0], [3])
    gpu_runner.launch(plan_of((beside, beside.chunk()))).result()
    sums = []
    for _ in range(2):
        chunk = prompt.chunk(len(PROMPTS[2]) // 2 + 1)
        plan = plan_of((beside, beside.chunk(ahead=True)), (prompt, chunk))
        rows = (PooledRows(62, 1, 0, len(chunk.tokens)),)
        sums.append(gpu_runner.launch(replace(plan, pooled_rows=rows)).result().pooled[62])
    model = build_model(make_torch_ops(torch.float32, DEVICE))
    whole = Story(0, PROMPTS[2], [1, 2])
    batch = build_batch(plan_of((whole, whole.chunk())), PAGE, DEVICE)
    every_row = torch.arange(len(PROMPTS[2]), dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        hidden_QC = model.hidden(replace(batch, logit_rows=every_row), make_cache(model))
    expected = hidden_QC.double().sum(0).numpy(force=True)
    np.testing.assert_allclose(sum(sums), expected, atol=1e-2)


def test_prompt_logprobs(gpu_runner):
    prompt, beside = Story(60, PROMPTS[2], [1, 2]), Story(61, PROMPTS[0], [3])
    beside_plan = plan_of((beside, beside.chunk()))
    token = gpu_runner.launch(beside_plan).result().tokens[0][0]
    chunk = prompt.chunk()
    plan = replace(
        plan_of((beside, beside.chunk(ahead=True)), (prompt, chunk)),
        prompt_rows=(PromptRow(60, 1, chunk.tokens[1:], 2),),
    )
    result = gpu_runner.launch(plan).result()
    scores = result.prompt_logprobs[60]
    assert [score.token for score in scores] == PROMPTS[2][1:]
    assert len(result.tokens) == 2
    assert token == gpu_runner.launch(beside_plan).result().tokens[0][0]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0, repetition_penalty=1.7, frequency_penalty=0.5),
        SamplingParams(temperature=0, presence_penalty=2.0),
        SamplingParams(temperature=0, allowed_token_ids=(4, 9, 30, 31)),
        SamplingParams(temperature=0, logit_bias={40: 50.0}),
        SamplingParams(temperature=0, min_tokens=2, stop_token_ids=tuple(range(90))),
    ],
    ids=str,
)
def test_what_the_device_samples_is_what_the_host_would(gpu_runner, expected, sampling):
    story = Story(70, PROMPTS[2], [4, 5, 6], sampling)
    futures = []
    plan = plan_of((story, story.chunk()))
    for _ in range(4):
        futures.append(gpu_runner.launch(plan))
        plan = plan_of((story, story.chunk(ahead=True)))
    sampled = [future.result().tokens[0][0] for future in futures]
    assert sampled == expected(PROMPTS[2], 4, sampling)


def test_a_rows_alternatives_do_not_depend_on_its_place(triton_device):
    """A row of an odd vocabulary begins anywhere in memory."""
    row_V = torch.linspace(-9, 9, 5027).sin() * 9
    tops = alternatives(row_V.repeat(7, 1).to(triton_device), dict.fromkeys(range(7), 4))
    assert len({tuple(logprobs.tolist()) for _, logprobs in tops.values()}) == 1
    expected = row_V.log_softmax(-1).topk(4)
    assert torch.allclose(tops[0][1], expected.values, atol=1e-5)
    assert not len(alternatives(row_V[None].to(triton_device), {0: 0})[0][0])


def test_logprobs(gpu_runner):
    story = Story(80, PROMPTS[0], [4, 5], SamplingParams(temperature=0, logprobs=3))
    result = gpu_runner.launch(plan_of((story, story.chunk()))).result()
    (scores,) = result.logprobs[0]
    assert scores.rank == 1
    assert scores.top[0] == (scores.token, pytest.approx(scores.logprob, abs=1e-4))
    assert [value for _, value in scores.top] == sorted((v for _, v in scores.top), reverse=True)


def test_logprobs_of_named_tokens(gpu_runner):
    everything = SamplingParams(temperature=0, logprobs=97)
    named = SamplingParams(temperature=0, logprobs=0, logprob_token_ids=(5, 96, 0))
    told = []
    for seq_id, sampling in ((81, everything), (82, named)):
        story = Story(seq_id, PROMPTS[0], [4, 5], sampling)
        result = gpu_runner.launch(plan_of((story, story.chunk()))).result()
        told.append(dict(result.logprobs[0][0].top))
    assert list(told[1]) == [5, 96, 0]
    assert told[1] == pytest.approx({token: told[0][token] for token in told[1]}, abs=1e-5)


# ------------------------------------------------------------------- driven by an engine

STOPS = tuple(range(0, 97, 4))
SAMPLINGS = (
    SamplingParams(temperature=0, max_tokens=4),
    SamplingParams(temperature=1.5, seed=5, max_tokens=20, stop_token_ids=STOPS),
    SamplingParams(temperature=0, max_tokens=12),  # to be aborted
    SamplingParams(temperature=1, seed=2, max_tokens=5, top_p=0.9, presence_penalty=1.0),
    SamplingParams(temperature=2, seed=3, max_tokens=20, stop_token_ids=STOPS, logprobs=0),
)
LENGTHS = (3, 17, 5, 20, 4)  # of prompts
ABORTED, LATE = 2, 3  # from the latter on they come later


class Watched:
    """A runner of one depth, and what it was given."""

    long_step, grammar_depth = GpuRunner.long_step, GpuRunner.depth

    def __init__(self, runner, depth):
        self._runner, self.depth, self.plans = runner, depth, []

    def launch(self, plan):
        self.plans.append(plan)
        return self._runner.launch(plan)

    @property
    def ahead(self):
        """(sequence, position) of tokens that nobody knew yet when they were given to it."""
        chunks = (chunk for plan in self.plans for chunk in plan.chunks)
        return {(chunk.seq_id, chunk.start) for chunk in chunks if chunk.tokens == BEING_SAMPLED}


def drive(gpu_runner, depth):
    """More jobs than slots; some join when others are under way and one is aborted under way.
    Tokens and finish by job, and the runner, which knows sequences by the numbers of their jobs."""
    runner = Watched(gpu_runner, depth)
    config = EngineConfig(block_size=PAGE, max_num_seqs=SLOTS, max_num_batched_tokens=40)
    engine = Engine(
        runner, config,
        max_model_len=LONGEST, num_blocks=BLOCKS, vocab_size=97, eos_token_ids=(),
    )  # fmt: skip
    jobs = [
        Job(tuple(range(i + 3, i + 3 + length)), sampling)
        for i, (length, sampling) in enumerate(zip(LENGTHS, SAMPLINGS, strict=True))
    ]
    tokens, finishes, pending = {i: [] for i in range(len(jobs))}, {}, deque()
    for i, job in enumerate(jobs[:LATE]):
        assert engine.add(job, 0.0, i) == [i]
    while engine.has_work or pending:
        while (step := engine.launch(0.0)) is not None:
            pending.append(step)
            if step.plan.step == 4:
                for i, job in enumerate(jobs[LATE:], LATE):
                    assert engine.add(job, 0.0, i) == [i]
            if step.plan.step == 5:
                engine.abort([ABORTED])
        for emission in engine.collect(pending.popleft()):
            assert emission.error is None
            tokens[emission.index] += emission.tokens
            finishes[emission.index] = emission.finish
    return tokens, finishes, runner


@pytest.mark.slow
def test_launched_ahead_or_not_the_same_is_sampled(gpu_runner):
    tokens, finishes, one_by_one = drive(gpu_runner, 1)
    tokens_ahead, finishes_ahead, ahead = drive(gpu_runner, 2)
    aborted, aborted_ahead = tokens.pop(ABORTED), tokens_ahead.pop(ABORTED)
    assert tokens_ahead == tokens
    assert finishes_ahead == finishes
    assert 0 < min(len(aborted), len(aborted_ahead)) < SAMPLINGS[ABORTED].max_tokens
    assert all(a == b for a, b in zip(aborted, aborted_ahead, strict=False))
    # What this is about has happened: stops in the middle, found when one token too many was
    # under way, and only then.
    stopped = {i for i, finish in finishes.items() if finish == "stop"}
    assert stopped
    assert all(1 < len(tokens[i]) < SAMPLINGS[i].max_tokens for i in stopped)
    assert not one_by_one.ahead
    for i in stopped:
        last = LENGTHS[i] + len(tokens[i]) - 1
        assert (i, last) in ahead.ahead


# ------------------------------------------------------------------------------------- parts


def test_stages_sample_what_one_runner_does(gpu_runner, letters, expected):
    """What the first sends is what the last receives, of scored and pooled rows as well."""
    on_its_way = deque()

    def send(x_TC):
        on_its_way.append(x_TC.clone())
        return x_TC

    first = Mesh(stage=0, stages=2, send=send)
    # A launch, as what receives is: see ruvon.kernels.pdl.
    last = Mesh(stage=1, stages=2, receive=lambda ids_T, width, dtype: on_its_way.popleft().clone())
    matchers = (None, Matchers(letters, at_once=False))
    stages = [runner_over(*each) for each in zip((first, last), matchers, strict=True)]
    story = Story(0, PROMPTS[1], range(LONGEST // PAGE), SamplingParams(temperature=0, logprobs=1))
    scored = (PromptRow(0, 0, tuple(PROMPTS[1][1:]), 1),)
    for step in range(4):
        plan = plan_of((story, story.chunk()))
        if step == 0:
            plan = replace(plan, prompt_rows=scored, pooled_rows=(PooledRows(0, 0, 0, 9),))
        sent, sampled = (stage.launch(plan).result() for stage in stages)
        assert sent.tokens == ((),)
        assert bool(sampled.prompt_logprobs and sampled.pooled) == (step == 0)
        story.tokens += sampled.tokens[0]
    assert not on_its_way
    assert story.tokens[len(PROMPTS[1]) :] == expected(PROMPTS[1], 4)
    for stage in stages:
        stage.close()


def test_buckets():
    singles, mixed = single_buckets(20), mixed_buckets(100, 20)
    assert [b.tokens for b in singles] == [1, 2, 4, 8, 16, 20]
    assert {b.tokens for b in mixed} == {16, 32, 64, 100}


def test_a_step_runs_in_the_smallest_bucket_that_holds_it(gpu_runner):
    """Of `SLOTS` = 3 sequences and 40 tokens at most."""
    choose = gpu_runner._choose_bucket
    assert [choose(n, n) for n in (1, 2, 3)] == [Bucket(True, n, n) for n in (1, 2, 3)]
    assert [choose(n, 2).tokens for n in (3, 16, 17, 33, 40)] == [16, 16, 32, 40, 40]


@pytest.mark.skipif(not GPU, reason="only captured steps have memory of their own")
def test_captured_steps_share_memory(gpu_runner):
    places = [step.logits_LV.data_ptr() for step in gpu_runner._captured.values()]
    assert len(set(places)) < len(places)


def test_layout_keeps_inputs_apart_and_aligned():
    layout = StepWords(Bucket(False, 19, 3))
    words = np.zeros(layout.size, dtype=np.int32)
    for i, view in enumerate(layout.views(words).values(), 1):
        assert (view.ctypes.data - words.ctypes.data) % 16 == 0
        assert not view.any()
        view[...] = i


def test_slots_stay_low_and_changes_only_are_sent():
    batch, blocks = (
        PersistentBatch(4, 8, PAGE),
        {i: [10 * i + j for j in range(8)] for i in range(4)},
    )

    def assign(*chunks, highest, new=(), ended=()):
        """Chunks as (sequence, how many blocks it has then)."""
        known = {i: [] for i in new}
        added = {i: tuple(blocks[i][len(known.get(i, has.get(i, []))) : num]) for i, num in chunks}
        plan = Plan(
            0,
            tuple(Chunk(i, 0, (0,), 0, (new,) if new else (), True) for i, new in added.items()),
            tuple(NewSequence(i, SamplingParams(), 1, 0) for i in new),
            ended,
        )
        has.update({i: blocks[i][:num] for i, num in chunks})
        return batch.assign(plan, highest)

    has = {}
    first = assign((0, 2), (1, 2), (2, 2), (3, 2), highest=4, new=range(4))
    assert first.slots.tolist() == first.newcomers == [0, 1, 2, 3]
    assert not first.moves
    assert len(first.patches_N2) == 8
    assert not len(assign((0, 2), (1, 2), (2, 2), (3, 2), highest=4).patches_N2)
    grown = assign((0, 3), (1, 3), (2, 3), (3, 3), highest=4)
    assert grown.patches_N2.tolist() == [[2, 2], [10, 12], [18, 22], [26, 32]]
    moved = assign((3, 3), (1, 3), highest=2)
    assert (moved.slots.tolist(), moved.newcomers, moved.moves) == ([0, 1], [], [(3, 0)])
    assert moved.sources.tolist() == [3, 1]
    assert moved.patches_N2.tolist() == [[0, 30], [1, 31], [2, 32]]
    back = assign((0, 3), (3, 3), highest=2)
    assert (back.slots.tolist(), back.newcomers) == ([1, 0], [0])
    again = assign((0, 3), (3, 3), highest=2, new=[3], ended=(3,))
    assert again.newcomers == [3]
    assert again.patches_N2.tolist() == [[0, 30], [1, 31], [2, 32]]


# ------------------------------------------------------------------- plans as values


@pytest.mark.slow
def test_a_moved_row_keeps_its_counts_and_plans_can_be_replayed(gpu_runner, expected):
    """The last of three goes on alone, in another slot; then all of it again, from a file."""
    sampling = SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=2.0)
    a, b = (Story(90 + i, PROMPTS[0], [7 * i + j for j in range(7)]) for i in range(2))
    c = Story(92, PROMPTS[2], [14 + j for j in range(7)], sampling)
    plans = [
        plan_of(*((s, s.chunk()) for s in (a, b, c))),
        plan_of(*((s, s.chunk(ahead=True)) for s in (a, b, c))),
        *(plan_of((c, c.chunk(ahead=True))) for _ in range(5)),
    ]
    first = [gpu_runner.launch(plan).result().tokens for plan in plans]
    tokens = [step[-1][0] for step in first]
    assert tokens == expected(PROMPTS[2], 7, sampling)
    assert tokens != expected(PROMPTS[2], 7)
    read = [pickle.loads(pickle.dumps(plan)) for plan in plans]
    assert [gpu_runner.launch(plan).result().tokens for plan in read] == first


def test_a_typical_row_and_its_logprob_come_from_the_device(gpu_runner):
    """Of a distribution cut to a share, only the most typical tokens are sampled."""
    sampling = SamplingParams(typical_p=1e-6, seed=3, logprobs=1)
    story = Story(95, PROMPTS[2], [4, 5, 6], sampling)
    result = gpu_runner.launch(plan_of((story, story.chunk()))).result()
    (token,), ((score,),) = result.tokens[0], result.logprobs
    chunk = replace(Story(96, PROMPTS[2], [4, 5, 6]).chunk(), samples=False)
    scored = PromptRow(96, 0, (*PROMPTS[2][1:], token), 97)
    new = (NewSequence(96, SamplingParams(), 18, 0),)
    plan = Plan(0, (chunk,), new, prompt_rows=(scored,))
    alternatives = gpu_runner.launch(plan).result().prompt_logprobs[96][-1]
    logprobs = np.array([value for _, value in sorted(alternatives.top)])
    entropy = -(np.exp(logprobs) * logprobs).sum()
    assert token == np.abs(-logprobs - entropy).argmin()
    assert score.logprob == pytest.approx(alternatives.logprob, abs=1e-4)
    assert score.rank == alternatives.rank


@pytest.mark.parametrize("seed", range(4))
def test_masks_keep_what_the_host_would(seed):
    """Of a row with all filters, one token of which is banned, and of one with a penalty."""
    generator = torch.Generator().manual_seed(seed)
    logits_LV = 3 * torch.randn(3, 97, generator=generator)
    filters = {"top_k": 40, "min_p": 0.003, "top_p": 0.95, "typical_p": 0.6}
    samplings = (
        SamplingParams(temperature=0.8, **filters),
        SamplingParams(typical_p=0.7, frequency_penalty=1.5),
    )
    best = int(logits_LV[2].argmax())
    rows = {
        place: SamplingRow(7 + place, sampling, [1, best], 1, 0)
        for place, sampling in zip((0, 2), samplings, strict=True)
    }
    state = make_state(3, 97, DEVICE)
    state.counts[2, best] = 1
    params = np.zeros((3, PARAMS), dtype=np.int32)
    params[[0, 2]] = [params_of(row, place) for place, row in rows.items()]
    staged_RW = torch.full((3, 4), -1, dtype=torch.int32, pin_memory=GPU)
    ban(staged_RW[0].numpy(), [int(logits_LV[0].argmax())])
    narrow_masks(rows, staged_RW, logits_LV.to(DEVICE), torch.from_numpy(params).to(DEVICE), state)
    if GPU:
        torch.cuda.synchronize()
    expected = logits_LV.numpy().copy()
    expected[0, expected[0].argmax()] = -np.inf
    expected[2, best] -= 1.5
    for mask_W, place, sampling in zip(staged_RW.numpy(), (0, 2), samplings, strict=False):
        bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little")
        ids, _ = distribution(expected[place], sampling)
        assert bits.nonzero()[0].tolist() == ids.tolist()


def test_logits_may_be_changed_between_two_graphs():
    """What a mask that the host computes will need: a step captured in two parts."""
    bucket, table = Bucket(True, 1, 1), torch.randn(97, 97, device=DEVICE)
    graphs = Graphs(
        lambda batch: table[batch.token_ids.long()],
        make_state(1, 97, DEVICE),
        table_width=1, block_size=PAGE, max_context=PAGE, buckets=[bucket], pdl=False,
    )  # fmt: skip
    staging = graphs.staging()
    for buffer in staging:
        inputs = buffer.inputs[bucket]
        inputs["token_ids"][:] = 5
        inputs["query_starts"][:] = 0, 1
        inputs["context_lens"][:] = 1
        inputs["params"][0, [HISTORY, BIAS]] = -1
    first = partial(graphs.forward, bucket)
    second = partial(graphs.sample, bucket)
    second(first())  # compiles
    if GPU:
        torch.cuda.synchronize()
        one, two = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(one):
            logits = first()
        with torch.cuda.graph(two):
            second(logits)
        one.replay()
    else:
        logits = first()
    best, next_best = table[5].topk(2).indices.tolist()
    logits[0, best] = -torch.inf
    two.replay() if GPU else second(logits)
    if GPU:
        torch.cuda.synchronize()
    assert [buffer.results[0, 0].item() for buffer in staging[:2]] == [best, next_best]

"""The one task and its streams: waking, leaving, dying, draining."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from itertools import chain, groupby
from types import SimpleNamespace

import pytest
from fakes import LETTERS, FakeMetrics, FakeRunner

from ruvon.engine.admission import MOST_ARRIVALS, Admission
from ruvon.engine.coalescing import FEW_READERS, MOST_STEPS, Coalescer
from ruvon.engine.draw import NOT_A_NUMBER
from ruvon.engine.loop import EngineLoop
from ruvon.engine.stream import Stream
from ruvon.engine.types import Job, SamplingParams
from ruvon.errors import (
    ContextLengthError,
    EngineDeadError,
    NotReadyError,
    QueueFullError,
    RequestError,
    ShuttingDownError,
)

LONG = SamplingParams(max_tokens=100, ignore_eos=True)
MANY = MOST_STEPS * FEW_READERS


class Clock:
    """Time that moves when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(params=[1, 2], ids=["depth 1", "depth 2"])
def depth(request) -> int:
    """How many steps are launched at once."""
    return request.param


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics():
    return FakeMetrics()


@pytest.fixture
def running(make_engine, depth, metrics, clock):
    """A running loop over a `FakeRunner`; checks that nothing is left behind."""

    @asynccontextmanager
    async def start(runner=None, *, by_hand=False, **config):
        runner = runner or FakeRunner(16, by_hand=by_hand, depth=depth)
        loop = EngineLoop(make_engine(runner, **config), metrics, clock)
        loop.start()
        yield loop, runner
        stopping = asyncio.create_task(loop.stop(0))
        while not stopping.done():
            await turn(runner if by_hand else None)
        await stopping
        assert loop.num_open == 0
        if loop.dead is None:
            assert_clean(loop)

    return start


def assert_clean(loop):
    assert not loop.engine.has_work
    assert loop.load == (0, 0, 0.0)


async def turn(runner=None):
    """Let everyone react; with a runner, also finish the step in flight."""
    await settle()
    if runner is not None and runner.num_held:
        runner.finish_step()
        await settle()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def read(stream):
    return [emission async for news in stream for emission in news]


async def read_while(runner, stream):
    """Read a stream to its end, finishing steps as they come."""
    reading = asyncio.create_task(read(stream))
    while not reading.done():
        await turn(runner)
    return await reading


def tokens(emissions, index=0):
    return [token for e in emissions if e.index == index for token in e.tokens]


async def test_a_stream_ends_with_its_last_sequence(running):
    async with running() as (loop, _):
        stream = loop.generate([Job((97,), SamplingParams(max_tokens=5), n=2)])
        emissions = await read(stream)
        assert len(tokens(emissions, 0)) == len(tokens(emissions, 1)) == 5
        assert [e.finish for e in emissions if e.finish] == ["length", "length"]
        assert await read(stream) == []


async def test_indices_count_over_all_jobs(running):
    async with running() as (loop, _):
        job = Job((97,), SamplingParams(max_tokens=1), n=2)
        emissions = await read(loop.generate([job, job]))
        assert sorted(e.index for e in emissions) == [0, 1, 2, 3]


async def test_no_jobs_no_news(running):
    async with running() as (loop, _):
        assert await read(loop.generate([])) == []


async def test_all_jobs_are_queued_or_none(running):
    async with running(by_hand=True) as (loop, runner):
        with pytest.raises(ContextLengthError):
            loop.generate([Job((97,)), Job((97,) * 10_000)])
        with pytest.raises(RequestError, match="at most 1088 completions"):
            loop.generate([Job((97,), n=8)] * 200)
        await turn(runner)
        assert runner.plans == []
        assert_clean(loop)


async def test_a_full_queue_says_when_to_come_again(running, clock):
    async with running(by_hand=True, max_num_seqs=1, max_num_queued_reqs=1) as (loop, runner):
        two = [Job((97,), SamplingParams(max_tokens=1))] * 2
        await read_while(runner, loop.generate(two))
        stream = loop.generate(two)
        clock.now += 10
        with pytest.raises(QueueFullError) as caught:
            loop.generate(two)
        assert caught.value.retry_after == 10
        with pytest.raises(QueueFullError) as caught:
            loop.generate(two[:1])
        assert caught.value.retry_after == 5
        clock.now += 1000
        with pytest.raises(QueueFullError) as caught:
            loop.generate(two)
        assert caught.value.retry_after == 60
        await read_while(runner, stream)


async def test_a_slow_reader_gets_everything_at_once_and_stalls_nobody(running):
    async with running(by_hand=True) as (loop, runner):
        slow = loop.generate([Job((97, 98), LONG)])
        fast = loop.generate([Job((99, 98), LONG)])
        first = asyncio.create_task(anext(slow))
        await turn(runner)
        assert len((await first)[0].tokens) == 1
        for _ in range(30):
            await turn(runner)
            await anext(fast)
        news = await anext(slow)
        assert len(tokens(news)) == 30
        await slow.aclose()
        await fast.aclose()


async def test_a_reader_wakes_once_a_step_however_many_sequences_it_has(running):
    async with running(by_hand=True) as (loop, runner):
        stream = loop.generate([Job((97,), LONG, n=8)])
        await turn()
        reading = asyncio.create_task(anext(stream))
        await turn(runner)
        assert len(await reading) == 8
        await stream.aclose()


async def test_where_steps_outrun_many_readers_each_takes_several_tokens_at_once(running):
    async with running(max_num_seqs=MANY, num_blocks=8 * MANY) as (loop, _):
        streams = [loop.generate([Job((97,), LONG)]) for _ in range(MANY)]
        # Steps of this runner are done when they are launched.
        sizes = [len(tokens(await anext(streams[0]))) for _ in range(12)]
        assert sizes[0] == 1  # the first token waits for no other
        assert sizes[-4:] == [MOST_STEPS] * 4
        for stream in streams:
            await stream.aclose()


async def test_a_step_that_ends_while_readers_write_has_outrun_them(running):
    async with running(by_hand=True, max_num_seqs=MANY, num_blocks=8 * MANY) as (loop, runner):
        streams = [loop.generate([Job((97,), LONG)]) for _ in range(MANY)]

        async def write(stream):
            async for news in stream:
                sizes.append(len(tokens(news)))
                if len(sizes) == 12 * MANY:
                    enough.set()
                if runner.num_held:
                    runner.finish_step()

        sizes, enough = [], asyncio.Event()
        writers = [asyncio.create_task(write(stream)) for stream in streams]
        await turn(runner)
        await asyncio.wait_for(enough.wait(), 30)
        assert sizes[-MANY:] == [MOST_STEPS] * MANY
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def test_a_few_readers_hear_of_every_step(running):
    async with running() as (loop, _):
        stream = loop.generate([Job((97,), LONG)])
        sizes = [len(tokens(await anext(stream))) for _ in range(12)]
        assert sizes == [1] * 12
        await stream.aclose()


def test_readers_that_are_outrun_take_turns():
    coalescer, heard = Coalescer(), []
    streams = [listener(number, heard) for number in range(8)]
    for _ in range(4 * MOST_STEPS):
        coalescer.begin_step(behind=True, num_readers=MANY)
        for stream in streams:
            coalescer.add(stream, urgent=False)
        coalescer.end_step()
        heard.append(None)
    rounds = [list(group) for new, group in groupby(heard, lambda item: item is None) if not new]
    assert [len(numbers) for numbers in rounds[-MOST_STEPS:]] == [2] * MOST_STEPS
    assert sorted(chain(*rounds[-MOST_STEPS:])) == list(range(8))


def test_readers_that_keep_up_are_woken_every_step():
    coalescer, heard = Coalescer(), []
    streams = [listener(number, heard) for number in range(3)]
    for behind in [True] * 9 + [False] * 9:
        coalescer.begin_step(behind, num_readers=MANY)
        heard.clear()
        for stream in streams:
            coalescer.add(stream, urgent=False)
        coalescer.end_step()
    assert sorted(heard) == [0, 1, 2]


def test_news_that_wait_go_out_though_no_others_follow():
    coalescer, heard = Coalescer(), []
    for _ in range(MOST_STEPS):
        coalescer.begin_step(behind=True, num_readers=MANY)
    for number in range(MOST_STEPS):
        coalescer.add(listener(number, heard), urgent=False)
    for _ in range(MOST_STEPS):
        coalescer.end_step()
        coalescer.begin_step(behind=True, num_readers=MANY)
    assert sorted(heard) == list(range(MOST_STEPS))


# -------------------------------------------------------------------- arrivals


class Arrivals:
    """As many as there are at a gate; ``let_in`` are the numbers of those that passed."""

    def __init__(self, enter, number):
        self.let_in = []
        self._enter = enter
        self.tasks = [asyncio.create_task(self._come(i)) for i in range(number)]

    async def _come(self, i):
        await self._enter()
        self.let_in.append(i)


async def test_arrivals_wait_for_a_step_that_is_over_and_come_in_a_few_at_a_time():
    admission = Admission(lambda: True)
    arrivals = Arrivals(admission.enter, 5)
    await settle()
    assert arrivals.let_in == []
    arrivals.tasks[0].cancel()
    await settle()
    admission.admit(2)
    await settle()
    assert arrivals.let_in == [1, 2]
    admission.admit_all()
    await settle()
    assert arrivals.let_in == [1, 2, 3, 4]


async def test_arrivals_of_many_do_not_keep_out_those_of_one():
    admission = Admission(lambda: True)
    greedy = Arrivals(lambda: admission.enter("greedy"), 5)
    await settle()
    modest = Arrivals(lambda: admission.enter("modest"), 2)
    await settle()
    admission.admit(4)
    await settle()
    assert (greedy.let_in, modest.let_in) == ([0, 1], [0, 1])
    admission.admit_all()
    await settle()
    assert greedy.let_in == [0, 1, 2, 3, 4]


async def test_arrivals_come_in_one_by_one_while_no_step_is_over():
    over = iter([True, False, False, False, True])
    admission = Admission(lambda: next(over))
    arrivals = Arrivals(admission.enter, 5)
    await settle()
    admission.admit_meanwhile()
    await settle()
    assert arrivals.let_in == [0, 1, 2]


async def test_nobody_is_left_waiting_when_the_engine_is_idle_or_dead(running, depth):
    async with running(by_hand=True) as (loop, runner):
        stream = loop.generate([Job((97,), SamplingParams(max_tokens=1))])
        await turn()
        arrivals = Arrivals(loop.admission, 3 * MOST_ARRIVALS)
        await settle()
        assert len(arrivals.let_in) == 3 * MOST_ARRIVALS  # no step is over
        runner.finish_step()
        late = Arrivals(loop.admission, 3 * MOST_ARRIVALS)
        await turn()
        assert len(late.let_in) == 3 * MOST_ARRIVALS  # nothing is left to do
        await stream.aclose()
        stream = loop.generate([Job((97,), LONG)])
        runner.broken, runner.lost = RuntimeError("broken"), True
        await turn(runner)
        await turn(runner)
        assert loop.dead
        await asyncio.wait_for(loop.admission(), 5)


def listener(number, heard):
    """A stream that tells when its reader is woken."""
    stream = Stream(lambda *_: None, number)
    stream.wake = lambda: heard.append(number)
    return stream


async def test_a_first_token_overtakes_what_others_gather(running):
    async with running() as (loop, _):
        first = loop.generate([Job((97,), LONG)])
        for _ in range(8):
            await anext(first)
        second = loop.generate([Job((98,), LONG)])
        assert len(tokens(await anext(second))) == 1
        await first.aclose()
        await second.aclose()


async def test_a_reader_that_gave_up_waiting_loses_nothing(running):
    async with running(by_hand=True) as (loop, runner):
        stream = loop.generate([Job((97,), SamplingParams(max_tokens=2))])
        await turn()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0)
        waiting = asyncio.create_task(anext(stream))
        await turn()
        waiting.cancel()
        await turn(runner)
        await turn(runner)
        assert len(tokens(await read(stream))) == 2


async def test_the_event_loop_turns_while_a_step_runs(running):
    async with running(by_hand=True) as (loop, runner):
        stream = loop.generate([Job((97,), SamplingParams(max_tokens=1))])
        for _ in range(100):
            await turn()
        assert len(runner.plans) == 1
        await turn(runner)
        assert len(await read(stream)) == 1


# -------------------------------------------------------------------- a step ahead


async def test_as_many_steps_are_under_way_as_the_runner_takes(running, depth):
    async with running(by_hand=True) as (loop, runner):
        stream = loop.generate([Job((97,), SamplingParams(max_tokens=5, ignore_eos=True))])
        await turn()
        under_way = []
        while runner.num_held:
            under_way.append(runner.num_held)
            await turn(runner)
        assert under_way == [depth] * (6 - depth) + [1] * (depth - 1)
        assert len(tokens(await read(stream))) == len(runner.plans) == 5


async def test_an_arrival_joins_the_next_launch(running, depth):
    async with running(by_hand=True) as (loop, runner):
        first = loop.generate([Job((97,), LONG)])
        await turn(runner)
        num_plans = len(runner.plans)
        second = loop.generate([Job((98,), LONG)])
        await turn()
        assert len(runner.plans) == num_plans
        await turn(runner)
        assert [len(plan.chunks) for plan in runner.plans[num_plans:]] == [2]
        reading = asyncio.create_task(anext(second))
        for _ in range(depth):
            await settle()
            assert not reading.done()
            await turn(runner)
        assert len(await reading) == 1
        await first.aclose()
        await second.aclose()


async def test_what_is_drawn_after_the_end_reaches_nobody(running, depth):
    """The second token is a stop token, which nobody knows when the third is launched."""
    counting = FakeRunner(16, by_hand=True, depth=depth, next_token=lambda tokens, _: len(tokens))
    async with running(counting) as (loop, runner):
        sampling = SamplingParams(max_tokens=9, stop_token_ids=(LETTERS[2],))
        stream = loop.generate([Job((97,), sampling)])
        emissions = await read_while(runner, stream)
        assert tokens(emissions) == [LETTERS[1], LETTERS[2]]
        assert [e.finish for e in emissions] == [None, "stop"]
        assert len(runner.plans) == depth + 1
        await turn(runner)
        assert_clean(loop)


# -------------------------------------------------------------------- leaving


async def test_leaving_while_waiting(running):
    async with running(by_hand=True, max_num_seqs=1) as (loop, runner):
        stays, leaves = (loop.generate([Job((97,), LONG)]) for _ in range(2))
        await turn(runner)
        await leaves.aclose()
        assert loop.num_open == 1
        await stays.aclose()


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
async def test_leaving_in_flight_frees_the_blocks_with_the_last_step(running, depth, num_steps):
    """A prompt of three chunks: aborted in each of them, and while decoding."""
    async with running(by_hand=True, max_num_batched_tokens=64) as (loop, runner):
        async with aclosing(loop.generate([Job(tuple(range(150)), LONG)])):
            await turn()
            for _ in range(num_steps):
                await turn(runner)
        for _ in range(depth):
            assert loop.load[2] > 0
            await turn(runner)
        assert loop.load[2] == 0
        assert_clean(loop)
        num_plans = len(runner.plans)
        await turn()
        assert len(runner.plans) == num_plans == num_steps + depth


async def test_blocks_in_flight_are_not_given_to_the_next_request(running):
    """`FakeRunner` would find another's tokens in the cache."""
    async with running(by_hand=True, num_blocks=4, max_model_len=64) as (loop, runner):
        gone = loop.generate([Job((97,) * 40, SamplingParams(max_tokens=10))])
        await turn()
        await gone.aclose()
        stream = loop.generate([Job((98,) * 40, SamplingParams(max_tokens=3))])
        while loop.num_open:
            await turn(runner)
        assert len(tokens(await read(stream))) == 3


async def test_leaving_twice_or_after_the_end_is_nothing(running, metrics):
    async with running() as (loop, _):
        stream = loop.generate([Job((97,), SamplingParams(max_tokens=1))])
        await read(stream)
        await stream.aclose()
        await stream.aclose()
        (finished,) = metrics.all("finished")
        assert finished["reason"] == "length"


async def test_leaving_ends_a_reader_that_still_waits(running):
    async with running(by_hand=True) as (loop, _):
        stream = loop.generate([Job((97,), LONG)])
        reading = asyncio.create_task(read(stream))
        await turn()
        await stream.aclose()
        assert await reading == []


async def test_a_thousand_come_and_go_and_leave_nothing(running, metrics):
    async with running(max_num_seqs=8, num_blocks=64, max_num_queued_reqs=2000) as (loop, _):

        async def visit(number):
            prompt = (97 + number % 7,) * (1 + number % 50)
            async with aclosing(loop.generate([Job(prompt, LONG, n=1 + number % 3)])) as stream:
                if number % 5:
                    await anext(stream)

        async def visits(numbers):
            for number in numbers:
                await visit(number)

        await asyncio.gather(*(visits(range(start, 1000, 50)) for start in range(50)))
        await turn()
        assert loop.num_open == 0
        assert_clean(loop)
        assert {c["reason"] for c in metrics.all("finished")} == {"abort"}


async def test_a_reader_may_end_one_sequence_of_several(running, metrics):
    async with running(by_hand=True) as (loop, runner):
        stream = loop.generate([Job((97,), SamplingParams(max_tokens=4, ignore_eos=True), n=2)])
        await turn(runner)
        first, _ = await anext(stream)
        stream.stop(first.seq_id)
        stream.stop(first.seq_id)
        emissions = await read_while(runner, stream)
        assert {e.index for e in emissions} == {1}
        assert len(tokens(emissions, 1)) == 3
        reasons = [finished["reason"] for finished in metrics.all("finished")]
        assert reasons == ["stop", "length"]


# -------------------------------------------------------------------- dying


async def test_a_failed_step_ends_its_streams_and_the_next_is_served(running):
    async with running(by_hand=True, max_num_seqs=1) as (loop, runner):
        hit, waits = (loop.generate([Job((97 + k,), SamplingParams(max_tokens=3))]) for k in (0, 1))
        runner.failing = {2: "run"}
        emissions = await read_while(runner, hit)
        assert [emission.finish for emission in emissions] == [None, "error"]
        emissions = await read_while(runner, waits)
        assert [emission.finish for emission in emissions] == [None, None, "length"]
        assert loop.ready


async def test_a_dead_engine_ends_every_stream_and_readiness_before_it_is_logged(
    running, monkeypatch
):
    def unwritable(event, **facts):
        seen.append((event, loop.dead, loop.num_open))
        raise BrokenPipeError

    seen = []
    monkeypatch.setattr("ruvon.engine.loop.log", SimpleNamespace(error=unwritable))
    async with running(by_hand=True) as (loop, runner):
        one = loop.generate([Job((97,), LONG)])
        await turn(runner)
        two = loop.generate([Job((98,), LONG)])
        runner.broken, runner.lost = RuntimeError("the device is gone"), True
        reading = asyncio.create_task(read(two))
        await turn(runner)
        with pytest.raises(EngineDeadError, match="RuntimeError"):
            await reading
        assert len(await anext(one)) == 1  # what had arrived is not lost
        with pytest.raises(EngineDeadError):
            await anext(one)
        assert not loop.ready
        assert loop.dead is runner.broken
        assert seen == [("engine_dead", runner.broken, 0)]
        with pytest.raises(EngineDeadError):
            loop.generate([Job((97,))])
        await one.aclose()
        await two.aclose()


async def test_an_error_of_one_sequence_is_its_own(running):
    async with running(by_hand=True) as (loop, runner):
        bad, good = (loop.generate([Job((97 + k,), SamplingParams(max_tokens=2))]) for k in (0, 1))
        runner.errors = {0: "its logits are not numbers"}
        await turn()
        await turn(runner)
        (emission,) = await anext(bad)
        assert (emission.finish, emission.error) == ("error", "its logits are not numbers")
        await turn(runner)
        assert len(tokens(await read(good))) == 2


# -------------------------------------------------------------------- starting and stopping


async def test_before_the_start_nothing_is_taken(make_engine):
    loop = EngineLoop(make_engine(), FakeMetrics())
    assert not loop.ready
    with pytest.raises(NotReadyError):
        loop.generate([Job((97,))])
    await loop.stop(0)


async def test_stopping_waits_for_what_runs_and_takes_no_more(running):
    async with running(by_hand=True) as (loop, runner):
        stream = loop.generate([Job((97,), SamplingParams(max_tokens=3))])
        assert loop.ready
        stopping = asyncio.create_task(loop.stop(3600))
        await turn()
        assert not loop.ready
        with pytest.raises(ShuttingDownError):
            loop.generate([Job((97,))])
        for _ in range(3):
            assert not stopping.done()
            await turn(runner)
        await stopping
        assert [e.finish for e in await read(stream)] == [None, None, "length"]


async def test_stopping_aborts_what_takes_too_long(running, depth):
    async with running(by_hand=True) as (loop, runner):
        stream = loop.generate([Job((97,), LONG, n=2)])
        await turn(runner)
        stopping = asyncio.create_task(loop.stop(0.01))
        emissions = await read(stream)  # ends only because of the abort: the step is held
        assert [e.finish for e in emissions if e.finish] == ["abort", "abort"]
        assert {e.index for e in emissions if e.finish} == {0, 1}
        for _ in range(depth):
            assert not stopping.done()
            await turn(runner)
        await stopping


async def test_stopping_gives_up_on_a_step_that_is_stuck(running):
    async with running(by_hand=True) as (loop, _):
        stream = loop.generate([Job((97,), LONG)])
        await turn()
        await loop.stop(0, patience=0.01)
        assert [e.finish for e in await read(stream)] == ["abort"]
        assert isinstance(loop.dead, TimeoutError)
        with pytest.raises(EngineDeadError):
            loop.generate([Job((97,))])


async def test_stopping_an_idle_loop(running):
    async with running() as (loop, _):
        await turn()
        await loop.stop(3600)
        assert "engine-loop" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_progress_can_be_watched(running, clock):
    async with running(by_hand=True) as (loop, runner):
        await turn()
        clock.now += 50
        assert loop.stalled_for == 0
        stream = loop.generate([Job((97,), LONG)])
        assert loop.stalled_for == 0
        await turn()
        clock.now += 7
        assert loop.stalled_for == 7
        await turn(runner)
        assert loop.stalled_for == 0
        await stream.aclose()


# -------------------------------------------------------------------- metrics


async def test_what_is_recorded_of_a_request(running, clock, metrics):
    async with running(by_hand=True) as (loop, runner):
        job = Job((97,) * 20, SamplingParams(max_tokens=3))
        stream = loop.generate([job])
        clock.now += 1
        await turn()
        for _ in range(3):
            clock.now += 2
            await turn(runner)
            assert metrics.all("prompt") == [{"num_prompt": 20, "num_cached": 0}]
        await read(stream)
        assert metrics.all("first_token") == [{"seconds": 3}]
        assert metrics.all("inter_token") == [{"seconds": 2}] * 2
        assert metrics.all("finished") == [
            {
                "reason": "length",
                "num_prompt": 20,
                "num_output": 3,
                "num_cached": 0,
                "max_tokens": 3,
                "n": 1,
                "arrived_at": 100,
                "queue": 1,
                "prefill": 2,
                "decode": 4,
                "num_before": 0,
                "waits": {"step": 1},
                "num_chunks": 1,
                "num_preempted": 0,
                "corrupted": False,
            }
        ]
        steps = metrics.all("step")
        assert [step["num_tokens"] for step in steps] == [20, 1, 1]
        assert [step["num_running"] for step in steps] == [1, 1, 0]
        assert steps[0]["kv_usage"] == 2 / 64
        assert steps[-1]["kv_usage"] == 0
        assert steps[0]["num_queried"] == 20


async def test_a_prompt_that_is_only_scored_counts_too(running, metrics):
    async with running() as (loop, _):
        await read(loop.generate([Job((97,) * 20, SamplingParams(max_tokens=0))]))
        assert metrics.all("prompt") == [{"num_prompt": 20, "num_cached": 0}]


async def test_what_is_recorded_of_one_that_left_the_queue(running, clock, metrics):
    async with running(by_hand=True, max_num_seqs=1) as (loop, runner):
        stays, leaves = (loop.generate([Job((97,), LONG)]) for _ in range(2))
        await turn(runner)
        clock.now += 4
        await leaves.aclose()
        (finished,) = metrics.all("finished")
        assert finished["reason"] == "abort"
        assert (finished["queue"], finished["prefill"], finished["decode"]) == (4, 0, 0)
        assert len(metrics.all("prompt")) == 1
        await stays.aclose()


async def test_what_is_no_number_is_told_from_other_errors(running, metrics):
    async with running() as (loop, runner):
        runner.errors.update({0: NOT_A_NUMBER, 1: "refused"})
        for _ in range(3):
            await read(loop.generate([Job((97,), SamplingParams(max_tokens=2))]))
        ended = [(f["reason"], f["corrupted"]) for f in metrics.all("finished")]
        assert ended == [("error", True), ("error", False), ("length", False)]


async def test_tokens_that_come_at_once_share_their_time(make_engine):
    """As those of accepted drafts do."""
    runner = FakeRunner(by_hand=True, at_once=2)
    loop = EngineLoop(make_engine(runner), FakeMetrics(), Clock())
    loop.start()
    stream = loop.generate([Job((97,), SamplingParams(max_tokens=6, ignore_eos=True))])
    await turn()
    for _ in range(3):
        loop._clock.now += 4
        await turn(runner)
    assert sum(len(emission.tokens) for emission in await read(stream)) == 6
    assert loop._metrics.all("inter_token") == [{"seconds": 2}] * 4
    await loop.stop(0)

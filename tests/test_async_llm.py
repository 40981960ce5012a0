"""AsyncLLM: over a fake runner, then over the default model."""

import asyncio
from concurrent.futures import Future
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from fakes import ByteTokenizer, FakeRunner

from ruvon import LLM, AsyncLLM, SamplingParams, TextOptions
from ruvon.errors import ContextLengthError, EngineDeadError, QueueFullError, RequestError
from ruvon.models.chat import PlainParser, Turn

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=200)
HELLO = [{"role": "user", "content": "hello"}]


class Chat:
    """Renders messages one after the other."""

    def turn(self, messages, **options):
        prompt = [token for message in messages for token in message["content"].encode()]
        return Turn(tuple(prompt), PlainParser)


@pytest.fixture
def make_loaded(make_engine):
    """What `start_engine` gives, without a model."""

    def make(runner, **config):
        return SimpleNamespace(
            engine=make_engine(runner, **config),
            tokenizer=ByteTokenizer(),
            chat=Chat(),
            defaults={"temperature": 0},
            failed=Future(),
            close=runner.close,
        )

    return make


@pytest.fixture
def loaded(make_loaded):
    return make_loaded(FakeRunner(16))


async def texts(stream):
    return [delta.text async for delta in stream]


async def until(condition):
    while not condition():  # noqa: ASYNC110 - the test's time limit is the limit
        await asyncio.sleep(0)


async def test_a_stream_and_a_whole_say_what_llm_says(loaded, make_loaded):
    with LLM.over(make_loaded(FakeRunner(16))) as llm:
        ((expected,),) = llm.generate("hello", GREEDY, use_tqdm=False)
        ((answer,),) = llm.chat(HELLO, GREEDY, use_tqdm=False)
    async with AsyncLLM.over(loaded) as llm:
        assert await llm.generate("hello", GREEDY) == [expected]
        assert await llm.generate([256, *b"hello"], GREEDY) == [expected]
        assert await llm.chat(HELLO, GREEDY) == [answer]
        deltas = [delta async for delta in llm.stream("hello", GREEDY)]
        assert "".join(delta.text for delta in deltas) == expected.text
        assert [token for delta in deltas for token in delta.tokens] == list(expected.tokens)
        assert [delta.finish for delta in deltas if delta.finish] == ["length"]
        assert "".join(await texts(llm.stream_chat(HELLO, GREEDY))) == answer.text
        pair = await llm.generate("hello", n=2)
        assert [one.index for one in pair] == [0, 1]
        assert len(pair[0].tokens) == 16  # the model's defaults, and SamplingParams' length


async def test_requests_made_at_once_share_steps(make_loaded):
    runner = FakeRunner(16)
    async with AsyncLLM.over(make_loaded(runner)) as llm:
        alone = [await llm.generate(prompt, GREEDY) for prompt in ("one", "two", "three")]
        runner.plans.clear()
        at_once = await asyncio.gather(*(llm.generate(p, GREEDY) for p in ("one", "two", "three")))
    assert at_once == alone
    assert max(len(plan.chunks) for plan in runner.plans) == 3


@pytest.mark.parametrize("way", ["break", "close", "cancel"])
async def test_leaving_a_stream_early_ends_its_request(loaded, way):
    async with AsyncLLM.over(loaded) as llm:
        if way == "break":
            async for _ in llm.stream("hello", LONG):
                break
        elif way == "close":
            async with aclosing(llm.stream("hello", LONG)) as stream:
                await anext(stream)
        else:
            reader = asyncio.create_task(texts(llm.stream("hello", LONG)))
            await until(lambda: loaded.engine.load[0])
            reader.cancel()
        await until(lambda: loaded.engine.load == (0, 0, 0))
        assert loaded.engine.stats.step < 100
        assert await llm.generate("hello", GREEDY)


async def test_a_stop_string_ends_a_request(loaded):
    async with AsyncLLM.over(loaded) as llm:
        (whole,) = await llm.generate("tell", LONG)
        stop = whole.text[20:22]
        (cut,) = await llm.generate("tell", LONG, TextOptions(stop=(stop,)))
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        await until(lambda: loaded.engine.load == (0, 0, 0))


async def test_what_cannot_run_is_refused(make_loaded):
    loaded = make_loaded(FakeRunner(16), max_num_seqs=1, max_num_queued_reqs=1)
    async with AsyncLLM.over(loaded) as llm:
        with pytest.raises(ContextLengthError):
            await llm.generate("x" * 300, GREEDY)
        with pytest.raises(RequestError, match="temperature"):
            await texts(llm.stream("hello", SamplingParams(temperature=-1)))
        found = await asyncio.gather(
            *(llm.generate("hello", LONG) for _ in range(3)), return_exceptions=True
        )
        assert sum(isinstance(one, QueueFullError) for one in found) == 1


async def test_a_failed_completion_says_so_and_others_go_on(make_loaded):
    runner = FakeRunner(16)
    runner.errors[0] = "not a number"
    async with AsyncLLM.over(make_loaded(runner)) as llm:
        (bad,) = await llm.generate("one", GREEDY)
        (good,) = await llm.generate("two", GREEDY)
    assert (bad.finish_reason, bad.error) == ("error", "not a number")
    assert good.finish_reason == "length"


async def test_a_dead_engine_is_raised(make_loaded):
    runner = FakeRunner(16)
    runner.broken, runner.lost = ArithmeticError("broken"), True
    async with AsyncLLM.over(make_loaded(runner)) as llm:
        for _ in range(2):
            with pytest.raises(EngineDeadError):
                await llm.generate("x", GREEDY)


async def test_closing_ends_streams_with_an_error(make_loaded):
    runner = FakeRunner(16, by_hand=True)
    loaded = make_loaded(runner)
    llm = AsyncLLM.over(loaded)
    with pytest.raises(RuntimeError, match="not open"):
        await llm.generate("hello", GREEDY)
    async with llm:
        stream = llm.stream("hello", GREEDY)
        first = asyncio.create_task(anext(stream))
        waiting = asyncio.create_task(llm.generate("hello", GREEDY))
        await until(lambda: runner.num_held)
        runner.finish_step()
        await first
        closing = asyncio.create_task(llm.close())
        for task in (asyncio.create_task(anext(stream)), waiting):
            with pytest.raises(RuntimeError, match="closed"):
                await task
        while not closing.done():
            if runner.num_held:
                runner.finish_step()
            await asyncio.sleep(0)
    await llm.close()  # twice is once
    for use in (llm.generate("x"), llm.chat(HELLO), anext(llm.stream("x"))):
        with pytest.raises(RuntimeError, match="closed"):
            await use
    with pytest.raises(RuntimeError, match="closed"):
        await llm.__aenter__()


async def test_the_default_model_streams_and_batches():
    """Greedy answers are the same as alone, whoever else asks."""
    questions = ["The capital of France is", "Once upon a time", "Water boils at"]
    settings = {"max_model_len": 256, "kv_cache_memory": "64MiB", "threads": 2}
    async with AsyncLLM(**settings) as llm:
        alone = [(await llm.generate(question, GREEDY))[0] for question in questions]
        streams = await asyncio.gather(*(texts(llm.stream(q, GREEDY)) for q in questions))
        assert ["".join(pieces) for pieces in streams] == [one.text for one in alone]
        assert alone[0].text.startswith(" Paris")
        ask = [
            {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
        ]
        (answer,) = await llm.chat(ask, SamplingParams(temperature=0, max_tokens=60))
        assert "Paris" in answer.text
        assert answer.finish_reason == "stop"

"""The load generator against a small server, and its arithmetic by hand."""

import math
import random
import socket
import struct

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ruvon.bench import (
    Load,
    Sample,
    find_model,
    open_session,
    random_prompt,
    random_requests,
    run_load,
)
from ruvon.bench.result import render, summarize
from ruvon.errors import PeerError


def make_sample(started, arrivals, num_output=None, error=""):
    return Sample(
        started=started,
        ended=arrivals[-1] if arrivals else started,
        arrivals=list(arrivals),
        num_input=10,
        num_output=len(arrivals) if num_output is None else num_output,
        error=error,
    )


def test_the_numbers_of_two_requests():
    samples = [
        make_sample(0.0, [0.1, 0.2, 0.4]),
        make_sample(0.5, [0.8, 1.2]),
        make_sample(0.0, [], error="503: busy"),
    ]
    result = summarize(samples, 2.0, percentiles=(50, 99), goodput={"ttft": 200})
    assert (result["completed"], result["failed"]) == (2, 1)
    assert result["total_input_tokens"] == 20
    assert result["output_throughput"] == pytest.approx(5 / 2)
    assert result["total_token_throughput"] == pytest.approx(25 / 2)
    assert result["request_goodput"] == pytest.approx(1 / 2)
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["p50_tpot_ms"] == pytest.approx((150 + 400) / 2)
    assert result["mean_itl_ms"] == pytest.approx((100 + 200 + 400) / 3)
    assert result["p99_e2el_ms"] == pytest.approx(400 + 0.99 * 300)
    assert result["max_output_tokens_per_s"] == 4
    assert result["max_concurrent_requests"] == 1


def test_the_table_has_the_lines_people_compare():
    text = render(summarize([make_sample(0.0, [0.1, 0.2])], 1.0) | {"request_rate": "inf"})
    for line in (
        "Successful requests:                     1",
        "Output token throughput (tok/s):         2.00",
        "Mean TTFT (ms):                          100.00",
        "P99 ITL (ms):                            100.00",
    ):
        assert line in text
    assert "Std" not in text
    assert "rate configured" not in text


def test_nothing_succeeded():
    result = summarize([make_sample(0.0, [], error="x")], 1.0)
    assert result["completed"] == 0
    assert result["mean_ttft_ms"] == 0.0


def test_prompts_repeat_with_their_seed():
    assert random_prompt(random.Random(3), 5) == random_prompt(random.Random(3), 5)
    assert len(random_prompt(random.Random(3), 40).split()) == 40


class Fake:
    """An OpenAI-like server that notes how many requests it has at once."""

    def __init__(self):
        self.payloads = []
        self.running = self.peak = self.hang_ups = 0
        self.answered = None  # connections, where each has one answer only

    async def complete(self, request):
        payload = await request.json()
        self.payloads.append(payload)
        if len(self.payloads) <= self.hang_ups:
            hang_up(request.transport, reset=payload["prompt"] == "reset")
        if self.answered is not None:
            if request.transport in self.answered:
                hang_up(request.transport, reset=True)
            self.answered.append(request.transport)
        self.running += 1
        self.peak = max(self.peak, self.running)
        if payload["prompt"] == "refuse":
            self.running -= 1
            return web.json_response({"error": {"message": "no"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if payload["prompt"] == "empty":
            self.running -= 1
            return response
        await response.write(b'data: {"choices": [{"text": "a"}]}\n\n: a comment\n\ndata: {"cho')
        await response.write(b'ices": [{"text": "b"}]}\n\n')
        await response.write(
            b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\n'
            b"data: [DONE]\n\n"
        )
        self.running -= 1
        return response

    async def models(self, request):
        return web.json_response({"data": [{"id": "fake"}]})


def hang_up(transport, *, reset):
    if reset:  # lingering for no time means that the other side is told of an error
        linger = struct.pack("ii", 1, 0)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


@pytest.fixture
async def fake():
    fake = Fake()
    app = web.Application()
    app.router.add_post("/v1/completions", fake.complete)
    app.router.add_get("/v1/models", fake.models)
    async with TestServer(app) as server:
        fake.url = str(server.make_url("")).rstrip("/")
        yield fake


async def test_a_load_is_sent_and_measured(fake):
    load = Load("m", [("one", 2), ("two", 2), ("refuse", 2)], max_concurrency=1)
    done = []
    async with open_session() as session:
        samples, duration = await run_load(session, fake.url, load, done.append)
    assert [(sample.num_input, sample.num_output) for sample in samples[:2]] == [(7, 2), (7, 2)]
    assert samples[0].texts == ["a", "b"]
    assert samples[0].started < samples[0].arrivals[0] <= samples[0].ended
    assert samples[2].error.startswith("400")
    assert duration > 0
    assert len(done) == 3
    assert fake.peak == 1
    assert fake.payloads[0]["max_tokens"] == 2
    assert fake.payloads[0]["ignore_eos"] is True


async def test_a_stream_without_output_is_no_success(fake):
    async with open_session() as session:
        samples, duration = await run_load(session, fake.url, Load("m", [("empty", 2), ("one", 2)]))
    assert [bool(sample.error) for sample in samples] == [True, False]
    assert summarize(samples, duration)["failed"] == 1


@pytest.mark.parametrize(
    ("how", "error"), [("close", "ServerDisconnectedError: "), ("reset", "ClientOSError: ")]
)
async def test_a_connection_that_ends_instead_of_an_answer_is_tried_again_once(fake, how, error):
    for fake.hang_ups, outcome in ((1, ""), (2, error)):
        fake.payloads.clear()
        async with open_session() as session:
            (sample,), _ = await run_load(session, fake.url, Load("m", [(how, 2)]))
        assert sample.error.startswith(outcome)
        assert bool(sample.error) == bool(outcome)
        assert len(fake.payloads) == 2


async def test_it_is_tried_again_over_a_new_connection(fake):
    """llama.cpp says that it keeps connections, and closes them behind every stream."""
    fake.answered = []
    async with open_session() as session:
        for count in (3, 1):  # three connections are kept, all of them of no use
            samples, _ = await run_load(session, fake.url, Load("m", [("x", 2)] * count))
            assert [sample.error for sample in samples] == [""] * count
    assert len(fake.payloads) == 5


async def test_a_rate_spreads_arrivals(fake):
    load = Load("m", [("x", 1)] * 5, rate=200.0, seed=1)
    async with open_session() as session:
        samples, _ = await run_load(session, fake.url, load)
    starts = [sample.started for sample in samples]
    assert starts == sorted(starts)
    assert not math.isclose(starts[0], starts[-1], abs_tol=1e-3)


async def test_the_server_is_asked_for_its_model(fake):
    async with open_session() as session:
        assert await find_model(session, fake.url) == "fake"
        with pytest.raises(PeerError, match="nowhere"):
            await find_model(session, fake.url + "/nowhere")


def test_lengths_of_requests_lie_around_those_given():
    requests = random_requests(random.Random(0), 200, 10, 40, spread=0.5)
    prompts, outputs = zip(*((len(text.split()), out) for text, out in requests), strict=True)
    assert (min(prompts), max(prompts)) == (5, 15)
    assert 20 <= min(outputs) < 25 < 55 < max(outputs) <= 60
    assert {out for _, out in random_requests(random.Random(0), 9, 1, 40)} == {40}

"""A load generator: `ruvon bench serve` and everything in bench/ that uses HTTP.

Requests go to any OpenAI-compatible server as streams; every chunk's arrival is noted, in seconds
on `time.perf_counter`. What it comes to says `result`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import aiohttp
import orjson

from ruvon.errors import PeerError

Backend: TypeAlias = Literal["openai", "openai-chat"]
ENDPOINTS: dict[Backend, str] = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}

# Common enough that every vocabulary has each, with its leading space, as one token.
TEXT = (
    "time people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea kid body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education"
)
WORDS = TEXT.split()


def random_prompt(rng: random.Random, length: int) -> str:
    """A text of ``length`` random words, which is about ``length`` tokens for any model."""
    return " ".join(rng.choices(WORDS, k=length))


def random_requests(
    rng: random.Random, num: int, input_len: int, output_len: int, spread: float = 0.0
) -> list[tuple[str, int]]:
    """``num`` prompts, each with how many tokens its answer takes. Lengths are drawn from (1 -
    ``spread``) to (1 + ``spread``) times those given."""

    def length(mean: int) -> int:
        return max(1, rng.randint(math.floor(mean * (1 - spread)), math.ceil(mean * (1 + spread))))

    return [(random_prompt(rng, length(input_len)), length(output_len)) for _ in range(num)]


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: requests ``(prompt, output tokens)`` and how fast they arrive."""

    model: str
    requests: Sequence[tuple[str, int]]
    backend: Backend = "openai"
    rate: float = math.inf  # requests per second; inf sends all at once
    burstiness: float = 1.0  # 1 is a Poisson process, below is burstier, above more even
    max_concurrency: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    ignore_eos: bool = True
    seed: int = 0

    def payload(self, prompt: str, num_output: int) -> dict[str, Any]:
        chat = self.backend == "openai-chat"
        return {
            "model": self.model,
            **({"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}),
            "max_tokens": num_output,
            **({"ignore_eos": True} if self.ignore_eos else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.sampling,
        }


@dataclass(slots=True)
class Sample:
    """One request as its client saw it."""

    started: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # one for each chunk that carried output
    texts: list[str] = field(default_factory=list)
    num_input: int = 0
    num_output: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.started if self.arrivals else 0.0

    @property
    def latency(self) -> float:
        return self.ended - self.started

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / (self.num_output - 1) if self.num_output > 1 else 0.0

    def record(self, event: Mapping[str, Any], now: float) -> None:
        """Take one event in: a piece of output, the usage, or an error."""
        if "error" in event:
            self.error = str(event["error"])
        if text := _output(event):
            self.arrivals.append(now)
            self.texts.append(text)
        if usage := event.get("usage"):
            self.num_input = usage["prompt_tokens"]
            self.num_output = usage["completion_tokens"]


def _output(event: Mapping[str, Any]) -> str:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice
        text = delta.get("content") or delta.get("reasoning") or delta.get("text")
        if isinstance(text, str) and text:
            return text
    return ""


async def events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON payloads of server-sent events, without the closing ``[DONE]``."""
    tail = b""
    async for piece in content.iter_any():
        *lines, tail = (tail + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                yield orjson.loads(line[5:])


async def send(session: aiohttp.ClientSession, url: str, payload: Mapping[str, Any]) -> Sample:
    """Send one request and read its stream to the end. Failures are in ``Sample.error``."""
    sample = Sample(started=time.perf_counter())
    try:
        async with _posted(session, url, orjson.dumps(payload)) as response:
            if response.status != 200:
                sample.error = f"{response.status}: {(await response.text())[:500]}"
                return sample
            async for event in events(response.content):
                sample.record(event, time.perf_counter())
    except (aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.ended = time.perf_counter()
    sample.num_output = sample.num_output or len(sample.arrivals)
    if not sample.arrivals and not sample.error:
        sample.error = "the stream carried no output"
    return sample


@asynccontextmanager
async def _posted(
    session: aiohttp.ClientSession, url: str, data: bytes
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Once more where the connection ended instead of an answer, as SDKs do, and over a new one:
    llama.cpp promises to keep connections and closes them behind every stream, so others that are
    kept may be as dead. Both tries count in the request's time."""
    headers = {**session.headers, **JSON}
    try:
        response = await session.post(url, data=data, headers=headers)
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
        async with open_session() as fresh, fresh.post(url, data=data, headers=headers) as response:
            yield response
        return
    async with response:
        yield response


JSON = {"Content-Type": "application/json"}


def open_session(api_key: str | None = None) -> aiohttp.ClientSession:
    """A session without limits of its own. It keeps connections, as users' clients do, but drops
    idle ones soon: some servers close theirs just when they are used again."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=600),
        headers=headers,
    )


async def find_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """The first model a server lists.

    Raises:
        PeerError: the server cannot be reached or lists none.
    """
    try:
        async with session.get(base_url + "/v1/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, KeyError, IndexError) as error:
        raise PeerError(f"cannot ask {base_url} for its models: {error}") from error


async def run_load(
    session: aiohttp.ClientSession,
    base_url: str,
    load: Load,
    on_done: Callable[[Sample], None] = lambda sample: None,
) -> tuple[list[Sample], float]:
    """Send a whole load; returns a sample for each request, in order, and the seconds it took."""
    limit = asyncio.Semaphore(load.max_concurrency or len(load.requests))
    url = base_url + ENDPOINTS[load.backend]

    async def one(prompt: str, num_output: int) -> Sample:
        async with limit:
            sample = await send(session, url, load.payload(prompt, num_output))
        on_done(sample)
        return sample

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for pause, request in zip(_pauses(load), load.requests, strict=False):
            if pause:
                await asyncio.sleep(pause)
            tasks.append(group.create_task(one(*request)))
    return [task.result() for task in tasks], time.perf_counter() - started


def _pauses(load: Load) -> Iterable[float]:
    """Seconds between arrivals, gamma-distributed with mean ``1 / rate``."""
    rng = random.Random(load.seed)
    yield 0.0
    while True:
        shape = load.burstiness
        yield 0.0 if math.isinf(load.rate) else rng.gammavariate(shape, 1 / (load.rate * shape))

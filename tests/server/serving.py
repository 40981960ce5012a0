"""A whole server over a fake model: real sockets, real tokenizer code, scripted tokens."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import aiohttp
import orjson
import torch
from aiohttp import web
from fakes import FakeRunner, fake_logprobs
from tokenizers import AddedToken

from ruvon.config import EngineConfig, ServerConfig
from ruvon.engine.engine import Engine
from ruvon.engine.grammar import Grammars
from ruvon.engine.lens import Look
from ruvon.engine.types import SamplingParams, SamplingRow, TokenLogprobs
from ruvon.models.chat import load_chat
from ruvon.models.tokenizer import Tokenizer
from ruvon.models.vocab import Vocab, byte_vocab
from ruvon.server.app import TLS, create_app, make_runner
from ruvon.server.lifecycle import Start
from ruvon.server.listen import listen
from ruvon.server.state import STATE, Service, State

BOS, EOS, START, END = range(256, 260)
SPECIALS = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 260
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Bytes are their own ids, special tokens follow: ruvon's tokenizer over no merges."""
    backend = byte_vocab().backend
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return Tokenizer(Vocab(backend, BOS, (EOS, END), {"default": TEMPLATE}))


@cache
def byte_grammars() -> Grammars:
    """Shared by all servers: what a request asks for is checked, though scripts do not obey it."""
    made = Grammars(byte_tokenizer(), VOCAB_SIZE, (EOS, END))
    atexit.register(made.close)
    return made


class ScriptRunner(FakeRunner):
    """Answers each prompt with a script, then ends it: ``script(prompt) -> text``.

    Where a script has a list, its items are the completions of one prompt, told apart by seed.
    """

    def __init__(self, script: Callable[[str], str] | str, **options: Any) -> None:
        super().__init__(**options)
        self._script = script if callable(script) else lambda prompt: script
        self._answers: dict[int, bytes] = {}

    def _draw(
        self, row: SamplingRow, context: list[int]
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
        assert context == row.history
        if row.seq_id in self.errors:
            return (), None
        prompt = bytes(t for t in context[: row.num_prompt] if t < 256).decode(errors="replace")
        answer = [*self._script(prompt).encode(), END]
        token = answer[min(len(context) - row.num_prompt, len(answer) - 1)]
        return (token,), self._score(prompt, row.sampling, token)

    def _score(
        self, prompt: str, sampling: SamplingParams, token: int
    ) -> tuple[TokenLogprobs, ...] | None:
        if sampling.logprobs is None:
            return None
        entry = fake_logprobs(token, sampling.logprobs)
        if wanted := sampling.logprob_token_ids:
            entry.top = tuple((id, self.weigh(prompt, id)) for id in wanted)
        return (entry,)

    def weigh(self, prompt: str, token: int) -> float:
        """The log-probability of a token that is asked for by name."""
        return -1.0


class Fails(ScriptRunner):
    """Cannot compute a sequence's third token."""

    def _draw(
        self, row: SamplingRow, context: list[int]
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
        if len(row.history) == row.num_prompt + 2:
            self.errors[row.seq_id] = "NaN in the logits"
        return super()._draw(row, context)


def fake_start(runner: FakeRunner, config: EngineConfig, **numbers: Any) -> Start:
    """A ``start`` that loads nothing."""
    tokenizer = byte_tokenizer()

    def start(config: EngineConfig, progress: Callable[[str, float], None]) -> Any:
        progress("pretending", 0.5)
        engine = Engine(
            runner,
            config,
            max_model_len=numbers.get("max_model_len", 512),
            num_blocks=numbers.get("num_blocks", 256),
            windows=runner.windows,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS, END),
            grammars=byte_grammars(),
        )
        return SimpleNamespace(
            engine=engine,
            checkpoint=SimpleNamespace(
                format="gguf",
                name="org/fake",
                spec=SimpleNamespace(architecture="Fake", num_layers=1),
            ),
            tokenizer=tokenizer,
            chat=load_chat(tokenizer),
            memory=SimpleNamespace(
                num_blocks=256,
                weight_bytes=1,
                cache_bytes=1,
                block_size=16,
                num_tokens=4096,
                windows=(0,),
                max_concurrency=1.0,
                dtype="float16",
            ),
            device="cpu",
            kernels="fake",
            dtype="float32",
            threads=1,
            counters={},
            failed=Future(),
            ranks=1,
            defaults=numbers.get("defaults", {}),
            close=runner.close,
            lens=numbers.get("lens"),
        )

    return start


@dataclass
class Reply:
    """A response that was read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events; the last must be ``[DONE]``."""
        lines = [line for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", self.body
        return [orjson.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    @property
    def error(self) -> dict[str, Any]:
        assert list(self.json) == ["error"]
        assert list(self.json["error"]) == ["message", "type", "param", "code"]
        return self.json["error"]


@dataclass
class Server:
    """A running server and a client session to it."""

    app: web.Application
    url: str
    session: aiohttp.ClientSession
    fake: FakeRunner
    runner: web.AppRunner
    stack: AsyncExitStack = field(repr=False)

    @property
    def state(self) -> State:
        return self.app[STATE]

    @property
    def service(self) -> Service:
        assert self.state.service is not None
        return self.state.service

    @property
    def num_live(self) -> int:
        """Sequences whose end somebody waits for."""
        return self.service.generator.num_open

    async def get(self, path: str, **options: Any) -> Reply:
        async with self.session.get(self.url + path, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    async def post(self, path: str, body: object = None, **options: Any) -> Reply:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        async with self.session.post(self.url + path, data=data, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    async def chat(self, text: str = "Hi", **fields: Any) -> Reply:
        messages = [{"role": "user", "content": text}]
        return await self.post("/v1/chat/completions", {"messages": messages} | fields)

    async def complete(self, prompt: object = "Hi", **fields: Any) -> Reply:
        return await self.post("/v1/completions", {"prompt": prompt} | fields)

    async def until(self, condition: Callable[[], object]) -> None:
        """Let the event loop turn until ``condition`` holds; the test's time limit is the limit."""
        while not condition():  # noqa: ASYNC110 - conditions of all kinds, none with an event
            await asyncio.sleep(0.001)

    async def finish(self, *tasks: asyncio.Task[Any]) -> None:
        """Complete steps of a runner that is driven by hand until these tasks are done."""
        while not all(task.done() for task in tasks):
            if self.fake.num_held:
                self.fake.finish_step()
            await asyncio.sleep(0)

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing waits, every block is free."""
        return self.service.generator.load == (0, 0, 0)

    def assert_idle(self) -> None:
        assert self.idle


async def open_server(
    script: Callable[[str], str] | str = "Hello",
    *,
    runner: FakeRunner | None = None,
    start: Start | None = None,
    server: ServerConfig | None = None,
    numbers: Mapping[str, Any] | None = None,
    wait: bool = True,
    fleet_secret: bytes | None = None,
    **engine: Any,
) -> Server:
    """A server on a free port. ``engine`` are fields of `EngineConfig`, ``numbers`` override what
    a model would say of itself."""
    config = EngineConfig(**engine)
    runner = runner or ScriptRunner(script)
    app = create_app(
        config,
        server or ServerConfig(port=0),
        start or fake_start(runner, config, **(numbers or {})),
        fleet_secret=fleet_secret,
    )
    stack = AsyncExitStack()
    app_runner = make_runner(app)
    await app_runner.setup()
    stack.push_async_callback(app_runner.cleanup)
    tls = app[TLS]
    _, port = await listen(app_runner, "127.0.0.1", 0, tls.context if tls else None)
    session = await stack.enter_async_context(aiohttp.ClientSession())
    url = f"{app[STATE].server.scheme}://127.0.0.1:{port}"
    opened = Server(app, url, session, runner, app_runner, stack)
    if wait:
        await opened.until(lambda: opened.state.service or opened.state.failure)
    return opened


def texts(events: Sequence[Any]) -> dict[int, str]:
    """The text of each choice of a stream, of either kind."""
    joined: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            joined[choice["index"]] = joined.get(choice["index"], "") + piece
    return joined


class FakeLens:
    """Sees each token look at itself alone, and says the same at every layer."""

    is_busy = False

    def look(self, tokens: list[int]) -> Look:
        num = len(tokens)
        weights = (255 * torch.eye(num)).to(torch.uint8).expand(3, 2, num, num)
        ids = torch.tensor(tokens).view(1, num, 1).expand(4, num, 5)
        return Look(weights, ids, torch.full((4, num, 5), 0.2))

    def forget(self) -> None:
        pass

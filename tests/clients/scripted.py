"""A real server whose model says what a script says; docs/clients.md has how to start it.

Everything is ruvon's own, sockets, routes, template, tokenizer and parsers, but for the forward
pass: the runner reads the prompt as text, as the model would, asks the script, and gives the ids of
its answer. So a client is taken through a whole loop of tool calls, and what it sends back counts
only once it has come as far as the prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from fakes import FakeRunner, fake_logprobs
from recorder import Recorder
from serving import fake_start
from tokenizers import AddedToken

import scripts
from ruvon.config import EngineConfig, ServerConfig
from ruvon.engine.engine import Engine
from ruvon.engine.grammar import Grammars
from ruvon.engine.matching import Matchers
from ruvon.engine.types import SamplingParams, SamplingRow, TokenLogprobs
from ruvon.models.chat import Chat, load_chat
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.formats.harmony import Mark
from ruvon.models.tokenizer import Tokenizer, load_tokenizer
from ruvon.models.vocab_gguf import read_gguf_vocab
from ruvon.server.app import create_app, make_runner
from ruvon.server.connection import Runner
from ruvon.server.lifecycle import Start
from ruvon.server.listen import listen
from ruvon.server.state import STATE
from ruvon.telemetry import silent
from ruvon.telemetry.logs import configure_logging

HERE = Path(__file__).parent
MODEL = "scripted"
MAX_MODEL_LEN = 1 << 17  # coding agents begin with tens of thousands of tokens
BLOCK_SIZE = 64
VOCAB_SIZE = 49408  # some more than there are tokens


class ScriptedRunner(FakeRunner):
    """Answers each prompt with what ``script(prompt)`` says, then ends it; within a grammar by the
    longest tokens that it allows."""

    def __init__(
        self, script: Callable[[str], str], tokenizer: Tokenizer, matchers: Matchers
    ) -> None:
        super().__init__(BLOCK_SIZE, matchers=matchers)
        self._script = script
        self._tokenizer = tokenizer
        self._end = min(tokenizer.eos_ids)
        self._answers: dict[int, list[int]] = {}
        self._tokens = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
        self._longest = max(map(len, self._tokens))
        special = "|".join(map(re.escape, tokenizer.special_texts))
        self._special = re.compile(special.encode())

    def _draw(
        self, row: SamplingRow, context: list[int]
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
        if row.seq_id not in self._answers:
            self._answers[row.seq_id] = self._answer(context[: row.num_prompt])
        answer, said = self._answers[row.seq_id], context[row.num_prompt :]
        if row.mask is None:
            token = answer[min(len(said), len(answer) - 1)]
        else:
            token = self._within(row.mask, self._spell(answer[:-1])[len(self._spell(said)) :])
        return (token,), score(token, row.sampling)

    def _answer(self, prompt: list[int]) -> list[int]:
        text = self._script(self._tokenizer.decode(prompt, skip_special_tokens=False))
        ids = self._tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        return [*ids, self._end]

    def _spell(self, ids: list[int]) -> bytes:
        return b"".join(map(self._tokenizer.token_bytes, ids))

    def _within(self, mask: np.ndarray, rest: bytes) -> int:
        """A token with which to say ``rest``. The end, if the mask allows none: the row fails."""
        if (special := self._special.search(rest)) is not None:  # which are tokens by themselves
            rest = rest[: special.start() or special.end()]
        starts = (rest[:size] for size in range(min(self._longest, len(rest)), 0, -1))
        found = (self._tokens[start] for start in starts if start in self._tokens)
        return next((id for id in found if allows(mask, id)), self._end)


def score(token: int, sampling: SamplingParams) -> tuple[TokenLogprobs, ...] | None:
    """Log-probabilities as they were asked for, of tokens that are named as well."""
    if sampling.logprobs is None:
        return None
    entry = fake_logprobs(token, sampling.logprobs)
    if named := sampling.logprob_token_ids:
        entry.top = tuple((id, -1.0) for id in named)
    return (entry,)


def allows(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token // 32] >> (token % 32) & 1)


def load_words(name: str) -> tuple[Tokenizer, Chat]:
    """The default model's vocabulary, and the way in which a script's model is talked to."""
    checkpoint = open_checkpoint(EngineConfig(), silent)
    if not name.endswith(scripts.HARMONY):
        tokenizer = load_tokenizer(checkpoint)
        return tokenizer, load_chat(tokenizer, (HERE / "hermes.jinja").read_text())
    vocab = read_gguf_vocab(checkpoint.path, checkpoint.config)
    vocab.backend.add_special_tokens([AddedToken(mark, special=True) for mark in Mark])
    tokenizer = Tokenizer(vocab)
    return tokenizer, load_chat(tokenizer)


def scripted_start(name: str) -> Start:
    """Loads the default model's tokenizer, and no weights."""

    def start(config: EngineConfig, progress: Callable[[str, float], None]) -> Any:
        tokenizer, chat = load_words(name)
        grammars = Grammars(tokenizer, VOCAB_SIZE, chat.stop_ids(tokenizer.eos_ids))
        runner = ScriptedRunner(scripts.SCRIPTS[name], tokenizer, Matchers(grammars))
        loaded = fake_start(runner, config)(config, progress)
        loaded.checkpoint.name = MODEL
        loaded.tokenizer = tokenizer
        loaded.chat = chat
        loaded.engine = Engine(
            runner,
            config,
            max_model_len=MAX_MODEL_LEN,
            num_blocks=4 * MAX_MODEL_LEN // BLOCK_SIZE,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=grammars.eos_token_ids,
            grammars=grammars,
        )
        loaded.close = lambda: (runner.close(), grammars.close())
        return loaded

    return start


@contextmanager
def running(script: str, record: Path | None = None) -> Iterator[str]:
    """Serve in a thread of this process; gives the address. ``record`` gets requests and answers,
    a line of JSON each."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="scripted")
    thread.start()
    runners: list[web.AppRunner] = []
    try:
        yield asyncio.run_coroutine_threadsafe(open_all(script, record, runners), loop).result(60)
    finally:
        for runner in reversed(runners):
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def open_all(script: str, record: Path | None, runners: list[web.AppRunner]) -> str:
    """Start a server, and a recorder before it; ``runners`` are to be cleaned up."""
    config = EngineConfig(block_size=BLOCK_SIZE, max_num_batched_tokens=8192)
    start = scripted_start(script)
    app = create_app(config, ServerConfig(port=0, max_body_size="64MiB", log_requests=False), start)
    runners.append(make_runner(app))
    address = await listening(runners[-1])
    while not (app[STATE].service or app[STATE].failure):  # noqa: ASYNC110 - no event says so
        await asyncio.sleep(0.01)
    if app[STATE].failure:
        raise app[STATE].failure
    if record is not None:
        runners.append(Runner(Recorder(address, record).app(), ServerConfig(), lambda server: None))
        address = await listening(runners[-1])
    return address


async def listening(runner: web.AppRunner) -> str:
    await runner.setup()
    _, port = await listen(runner, "127.0.0.1", 0)
    return f"http://127.0.0.1:{port}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--script", default="obedient", choices=sorted(scripts.SCRIPTS))
    parser.add_argument("--record", type=Path, help="write requests and answers here, JSON lines")
    options = parser.parse_args()
    configure_logging("warning")
    with running(options.script, options.record) as address:
        print(address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()

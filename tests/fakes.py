"""Stand-ins for a model: a tokenizer of bytes, and a runner that checks every plan it is given."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TypeAlias

import numpy as np

from ruvon.engine.batch import BlockTables
from ruvon.engine.blocks import NULL, first_block
from ruvon.engine.engine import Engine
from ruvon.engine.matching import Matchers, with_grammar
from ruvon.engine.runner import SamplingRows
from ruvon.engine.steps import Pending
from ruvon.engine.types import (
    BEING_SAMPLED,
    PLACEHOLDER,
    Chunk,
    Emission,
    Plan,
    SamplingRow,
    StepResult,
    TokenLogprobs,
)
from ruvon.models.text_stream import TextStream
from ruvon.telemetry.finished import Finished

Tables: TypeAlias = Mapping[int, tuple[tuple[int, ...], ...]]
"""The block tables of a step's sequences, by cache group, as they were when it was launched."""

LETTERS = tuple(b"abcdefghijklmnopqrstuvwxyz ")

TINY_LLAMA = {  # a config.json for random weights
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 7,
}


class ByteTokenizer:
    """Bytes are their own ids; ids from 256 on are special: bos, eos, and chat markers."""

    SPECIALS = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<pad>", "<unused>")

    vocab_size = 256 + len(SPECIALS)
    special_ids = frozenset(range(256, 256 + len(SPECIALS)))
    bos_id = 256
    eos_ids = (257, 259)
    chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        ids = [self.bos_id] if add_special_tokens else []
        if not parse_special:
            return ids + list(text.encode())
        while text:
            special = next((s for s in self.SPECIALS if text.startswith(s)), None)
            ids += list(text[0].encode()) if special is None else [256 + self._index(special)]
            text = text[len(special or text[0]) :]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        kept = (i for i in ids if not (skip_special_tokens and i in self.special_ids))
        return b"".join(self.token_bytes(i) for i in kept).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else self.SPECIALS[token - 256].encode()

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("latin-1")

    def stream(
        self,
        *,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> TextStream:
        return TextStream(
            self.token_bytes,
            hidden=self.special_ids if skip_special_tokens else frozenset(),
            stop=stop,
            include_stop=include_stop,
            min_tokens=min_tokens,
            prompt_ids=prompt_ids,
        )

    def _index(self, special: str) -> int:
        return self.SPECIALS.index(special)


def emissions_of(engine: Engine) -> Iterator[Emission]:
    """Run what is queued to its end, as many steps ahead as the runner takes."""
    pending: deque[Pending] = deque()
    while engine.has_work or pending:
        while (step := engine.launch(0.0)) is not None:
            pending.append(step)
        yield from engine.collect(pending.popleft())


def last_three(history: Sequence[int], seed: int) -> int:
    """The next token: a pure function of the last three, and of the seed (0 when greedy)."""
    a, b, c = ([0, 0, *history])[-3:]
    return (a * 7919 + b * 104729 + c * 1299709 + seed * 15485863 + 11) % 2147483647


class FakeRunner:
    """Samples tokens without a model, and asserts that plans are sound.

    It keeps a cache of its own, a (position, token, cache group) for each slot, and reads what the
    ``windows`` of its groups show of every sequence's context back from the blocks that plans have
    named: a block given away too early, a wrong prefix hit or a chunk out of order is found at
    once. So is a step that writes where another step under
    way reads or writes for another sequence, and a token said to be sampled just now that is not.
    Tokens come from ``next_token(history, seed)`` mapped into ``alphabet``, ``at_once`` for each
    row. With ``matchers`` rows with a grammar obey it, one token at a time and those it forces. A
    step takes ``seconds`` in a worker thread; with ``by_hand`` it takes until `finish_step`.
    """

    def __init__(
        self,
        block_size: int = 16,
        alphabet: Sequence[int] = LETTERS,
        next_token: Callable[[Sequence[int], int], int] = last_three,
        *,
        seconds: float = 0.0,
        by_hand: bool = False,
        depth: int = 1,
        grammar_depth: int = 1,
        long_step: int = 1 << 20,
        at_once: int = 1,
        matchers: Matchers | None = None,
        windows: tuple[int, ...] = (0,),
    ) -> None:
        self.block_size = block_size
        self.windows = windows
        self.depth = depth
        self.grammar_depth = grammar_depth
        self.long_step = long_step
        self.plans: list[Plan] = []
        self.lost = False
        self.broken: Exception | None = None  # raised by every step from now on
        self.failing: dict[int, str] = {}  # step → "launch" or "run", where it raises
        self.errors: dict[int, str] = {}  # seq id → why its rows fail
        self._alphabet = alphabet
        self._next_token = next_token
        self._seconds = seconds
        self._by_hand = by_hand
        self._at_once = at_once
        self._matchers = matchers
        self._held: list[tuple[Plan, Tables, Future[StepResult]]] = []
        self._cache: dict[int, tuple[int, int, int]] = {}  # slot → (position, token, group)
        self._tables = BlockTables()
        self._generations: dict[int, int] = {}
        self._rows = SamplingRows()
        self._sampled: dict[int, int] = {}  # by the step before: a sequence's last token
        self._failed: dict[int, int] = {}  # seq id → its first step that failed
        self._unlaunched: deque[Plan] = deque()  # whose rows are to be followed in their turn
        self._step = 0  # being computed
        self._worker = ThreadPoolExecutor(1) if seconds else None

    def launch(self, plan: Plan) -> Future[StepResult]:
        assert plan.chunks, "an empty plan"
        assert len(self._held) < self.depth
        self.plans.append(plan)
        self._check_placeholders()
        self._check_sequences(plan)
        self._tables.follow(plan)
        tables = {
            chunk.seq_id: tuple(map(tuple, self._tables[chunk.seq_id])) for chunk in plan.chunks
        }
        if self.failing.get(plan.step) == "launch":
            self._unlaunched.append(plan)
            self._fail(plan, tables)
        if self._worker is not None:
            return self._worker.submit(self._compute, plan, tables)
        future: Future[StepResult] = Future()
        self._held.append((plan, tables, future))
        self._check_blocks()
        if not self._by_hand:
            self.finish_step()
        return future

    @property
    def num_held(self) -> int:
        """Steps launched and not complete."""
        return len(self._held)

    def finish_step(self) -> None:
        """Complete the oldest launched step."""
        plan, tables, future = self._held.pop(0)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._compute(plan, tables))
        except Exception as error:
            future.set_exception(error)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._matchers is not None:
            self._matchers.close()

    @property
    def computed(self) -> int:
        """Tokens computed since the start."""
        return sum(plan.num_tokens for plan in self.plans)

    def _compute(self, plan: Plan, tables: Tables) -> StepResult:
        time.sleep(self._seconds)
        while self._unlaunched and self._unlaunched[0].step < plan.step:
            self._follow_failed(self._unlaunched.popleft())
        self._step = plan.step
        if self.broken is not None or plan.step in self.failing:
            self._follow_failed(plan)
            self._fail(plan, tables)
        chunks = [self._complete(chunk) for chunk in plan.chunks]
        contexts = {chunk.seq_id: self._contexts(chunk, tables) for chunk in chunks}
        assert len(contexts) == len(plan.chunks), "two chunks of one sequence in a step"
        self._write(chunks, tables)
        self._rows.follow(plan)
        for chunk in chunks:
            self._rows[chunk.seq_id].history[chunk.start :] = chunk.tokens
        if self._matchers is not None:
            self._matchers.follow(plan)
        rows = [self._rows[seq_id] for seq_id in plan.rows]
        masks = self._matchers and self._matchers.begin(with_grammar(rows))
        if masks:
            masks.hand_to(rows)
        sampled = [self._sample(row, contexts[row.seq_id]) for row in rows]
        result = StepResult(
            tokens=tuple(tokens for tokens, _ in sampled),
            logprobs=tuple(logprobs for _, logprobs in sampled),
            prompt_logprobs={
                row.seq_id: tuple(fake_logprobs(t, row.num_top) for t in row.targets)
                for row in plan.prompt_rows
            },
            pooled={
                row.seq_id: sum(
                    fake_hidden(token, chunk.start + row.first + i)
                    for i, token in enumerate(chunk.tokens[row.first : row.first + row.count])
                )
                for row in plan.pooled_rows
                for chunk in [chunks[row.chunk]]
            },
            errors={s: self.errors[s] for s in contexts if s in self.errors},
            seconds=self._seconds,
        )
        if masks and self._matchers:
            result = self._matchers.accept(plan.rows, masks, result)
        self._rows.record(plan, result.tokens)
        told = zip(plan.rows, result.tokens, strict=True)
        self._sampled = {seq_id: tokens[-1] for seq_id, tokens in told if tokens}
        return result

    def _follow_failed(self, plan: Plan) -> None:
        self._rows.follow(plan)
        self._sampled = {}

    def _fail(self, plan: Plan, tables: Tables) -> None:
        """Raise, and leave rubbish behind."""
        for chunk in plan.chunks:
            self._failed.setdefault(chunk.seq_id, plan.step)
            for group, table in enumerate(tables[chunk.seq_id]):
                for position in range(chunk.start, chunk.start + len(chunk.tokens)):
                    self._cache[self._slot(table, position)] = (position, -7, group)
        raise self.broken or ArithmeticError(f"step {plan.step}")

    def _check_sequences(self, plan: Plan) -> None:
        """Every sequence is introduced once a generation, before anything else is said of it."""
        for seq_id in plan.ended:
            del self._generations[seq_id]
        new = {new.seq_id for new in plan.new}
        for chunk in plan.chunks:
            if chunk.seq_id in new:
                assert chunk.seq_id not in self._generations
                self._generations[chunk.seq_id] = chunk.generation
        assert all(self._generations[chunk.seq_id] == chunk.generation for chunk in plan.chunks)

    def _check_blocks(self) -> None:
        """A block that a step under way writes is in no other sequence's use."""
        held = [
            (chunk, table, window)
            for plan, tables, _ in self._held
            for chunk in plan.chunks
            for table, window in zip(tables[chunk.seq_id], self.windows, strict=True)
        ]
        writers: dict[int, tuple[int, int]] = {}
        for chunk, table, window in held:
            first, end = chunk.start, chunk.start + len(chunk.tokens)
            for block in table[first // self.block_size : -(-end // self.block_size)]:
                assert block != NULL
                assert writers.setdefault(block, (chunk.seq_id, window)) == (chunk.seq_id, window)
        for chunk, table, window in held:
            first = first_block(chunk.start, window, self.block_size)
            for block in table[first : -(-chunk.start // self.block_size)]:
                assert block != NULL
                assert writers.get(block, (chunk.seq_id, window)) == (chunk.seq_id, window)

    def _check_placeholders(self) -> None:
        """A token is being sampled only if the step before does, and may not be collected yet."""
        sampling = {seq_id for plan in self.plans[-2:-1] for seq_id in plan.rows}
        for chunk in self.plans[-1].chunks:
            if PLACEHOLDER in chunk.tokens:
                assert self.depth == 2
                assert chunk.tokens == BEING_SAMPLED
                assert chunk.seq_id in sampling, f"nobody samples the token of {chunk}"

    def _complete(self, chunk: Chunk) -> Chunk:
        """With the token that was being sampled when it was planned; 0 if its row has failed."""
        if chunk.tokens != BEING_SAMPLED:
            return chunk
        assert chunk.seq_id in {*self._sampled, *self.errors, *self._failed}
        return replace(chunk, tokens=(self._sampled.get(chunk.seq_id, 0),))

    def _slot(self, table: Sequence[int], position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return table[block] * self.block_size + offset

    def _seen(self, chunk: Chunk, tables: Tables) -> Iterator[tuple[int, int, int]]:
        """For each cache group what it shows of the tokens before a chunk's first: the group, a
        slot and its position."""
        for group, window in enumerate(self.windows):
            for position in range(max(chunk.start - window + 1, 0) if window else 0, chunk.start):
                yield group, self._slot(tables[chunk.seq_id][group], position), position

    def _contexts(self, chunk: Chunk, tables: Tables) -> list[list[int]]:
        """By cache group, the chunk's tokens and those before them, as the cache has them."""
        contexts: list[list[int]] = [[] for _ in self.windows]
        for group, slot, position in self._seen(chunk, tables):
            at, token, its = self._cache.get(slot, (-1, -1, -1))
            assert (at, its) == (position, group), f"{position} of {chunk} is not in the cache"
            contexts[group].append(token)
        return [[*context, *chunk.tokens] for context in contexts]

    def _write(self, chunks: Sequence[Chunk], tables: Tables) -> None:
        used = {slot for chunk in chunks for _, slot, _ in self._seen(chunk, tables)}
        for chunk in chunks:
            for group, table in enumerate(tables[chunk.seq_id]):
                for position, token in enumerate(chunk.tokens, chunk.start):
                    slot = self._slot(table, position)
                    assert slot >= self.block_size, "block 0 is nobody's"
                    assert slot not in used, f"slot {slot} is written while it is read, or twice"
                    used.add(slot)
                    self._cache[slot] = (position, token, group)

    def _sample(
        self, row: SamplingRow, contexts: list[list[int]]
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
        if self._failed.get(row.seq_id, self._step) < self._step:  # whatever comes of it
            return (self._alphabet[0],), None
        for context in contexts:
            seen = row.history[-len(context) :]
            assert context == seen, f"the cache of {row.seq_id} holds other tokens"
        tokens: tuple[int, ...] = ()
        context = list(row.history)
        scores: tuple[TokenLogprobs, ...] = ()
        for _ in range(self._at_once if row.mask is None else 1):
            more, logprobs = self._draw(row, context)
            context, tokens, scores = [*context, *more], tokens + more, scores + (logprobs or ())
        return tokens, None if row.sampling.logprobs is None else scores

    def _draw(
        self, row: SamplingRow, context: list[int]
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
        if row.seq_id in self.errors:
            return (), None
        seed = row.seed if row.sampling.temperature > 0 else 0
        alphabet = self._alphabet if row.mask is None else allowed(row.mask)
        if not alphabet:  # its grammar was complete when this step was launched already
            return (), None
        token = alphabet[self._next_token(context, seed) % len(alphabet)]
        num_top = row.sampling.logprobs
        return (token,), None if num_top is None else (fake_logprobs(token, num_top),)


def allowed(mask: np.ndarray) -> list[int]:
    """The tokens in a mask."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def fake_hidden(token: int, position: int) -> np.ndarray:
    """Made up: a vector for each token, a little different at each place."""
    return np.array([1.0, token, token % 7 - 3.0, position / 100])


def fake_logprobs(token: int, num_top: int) -> TokenLogprobs:
    """Made up, but well formed: the token is the most likely, its neighbours follow."""
    top = tuple((token + i, -0.5 - i) for i in range(num_top))
    return TokenLogprobs(token=token, logprob=-0.5, rank=1, top=top)


class FakeMetrics:
    """Keeps every record: ``metrics.calls`` is a list of (name, values)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, object]]] = []

    def record_step(self, **values: object) -> None:
        self.calls.append(("step", values))

    def record_prompt(self, num_prompt: int, num_cached: int) -> None:
        self.calls.append(("prompt", {"num_prompt": num_prompt, "num_cached": num_cached}))

    def record_first_token(self, seconds: float) -> None:
        self.calls.append(("first_token", {"seconds": seconds}))

    def record_inter_token(self, seconds: float, count: int) -> None:
        self.calls += [("inter_token", {"seconds": seconds})] * count

    def record_finished(self, finished: Finished) -> None:
        self.calls.append(("finished", asdict(finished)))

    def all(self, name: str) -> list[dict[str, object]]:
        return [values for called, values in self.calls if called == name]

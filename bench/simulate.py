"""A fleet on a clock of its own: real schedulers, the real router, steps that only take time.

What a step takes comes from a `Cost`, which `bench/fleet.py` measures. Everything else is what
serves: `Engine`, `Fleet`, `choose`. Discrete events, one after another, in order of time.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from conversations import Conversation, Turn

from ruvon.config import EngineConfig, RouterConfig
from ruvon.engine.engine import Engine
from ruvon.engine.steps import Pending
from ruvon.engine.types import Job, Plan, SamplingParams, StepResult
from ruvon.errors import QueueFullError
from ruvon.router.fleet import Fleet
from ruvon.router.prefixes import PIECE, chain
from ruvon.router.prompt import Prompt

VOCABULARY = 50_000
ANSWER = 7  # every token that a fake step samples
POLL = 1.0  # seconds
RETRY = 1.0  # seconds after which a client comes again that was refused


class Cost(NamedTuple):
    """What a step takes, in seconds: for itself, for each sequence that it goes on with, for each
    token of a prompt, and for each token of a context that a token looks at."""

    step: float = 4e-3
    sequence: float = 4e-5
    token: float = 5e-5
    context: float = 1e-8

    def of(self, plan: Plan) -> float:
        total = self.step
        for chunk in plan.chunks:
            size = len(chunk.tokens)
            total += self.sequence if size == 1 else self.token * size
            total += self.context * size * (chunk.start + size / 2)
        return total


COST = Cost()
ENGINE = EngineConfig(max_num_seqs=64, max_num_batched_tokens=2048)
ROUTER = RouterConfig()


class ClockRunner:
    """Computes nothing. A step is done when the fleet's clock says so."""

    depth = grammar_depth = 1
    long_step = 1 << 20
    lost = False

    def launch(self, plan: Plan) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        num_rows = len(plan.rows)
        future.set_result(StepResult(((ANSWER,),) * num_rows, (None,) * num_rows))
        return future


@dataclass(slots=True, eq=False)
class Asked:
    """One turn on its way."""

    conversation: int
    number: int  # of the turn
    prompt: tuple[int, ...]
    at: float
    replica: int = 0
    promised: int = 0  # tokens
    cached: int = 0
    first_at: float | None = None


@dataclass(slots=True)
class Simulated:
    """A replica: its engine, the step under way, and who waits for which sequence."""

    engine: Engine
    pending: Pending | None = None
    asked: dict[int, Asked] = field(default_factory=dict)


Route = Callable[["Simulation", Prompt, Job], tuple[int, int] | None]
"""A replica's number, and how many tokens are believed to be cached there."""


class Simulation:
    """``replicas`` of them, on which ``conversations`` are played."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        route: Route,
        *,
        replicas: int = 4,
        cost: Cost = COST,
        num_blocks: int = 8192,
        config: EngineConfig = ENGINE,
        router: RouterConfig = ROUTER,
    ) -> None:
        self.conversations = conversations
        self.route = route
        self.cost = cost
        self.replicas = [
            Simulated(
                Engine(
                    ClockRunner(), config, max_model_len=131_072, num_blocks=num_blocks,
                    vocab_size=VOCABULARY,
                )
            )
            for _ in range(replicas)
        ]  # fmt: skip
        self.fleet = Fleet(router, (f"http://replica:{n + 1}" for n in range(replicas)))
        self.now = 0.0
        self.finished: list[Asked] = []
        self.num_refused = 0
        self.turn = count()  # for round robin
        self._texts = [self._beginning(each) for each in conversations]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def _beginning(self, conversation: Conversation) -> list[int]:
        return tokens(conversation.shared, conversation.shared_tokens)

    def run(self, until: float = float("inf")) -> Simulation:
        """Play to the end."""
        for number, conversation in enumerate(self.conversations):
            self._at(conversation.start, lambda number=number: self._ask(number, 0))
        self._poll()
        while self._events and self.now < until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def _poll(self) -> None:
        """What the router hears of every replica now and then."""
        for number, (replica, seen) in enumerate(
            zip(self.replicas, self.fleet.replicas, strict=True)
        ):
            running, waiting, _ = replica.engine.load
            evicted = replica.engine.prefix_cache.num_evicted
            seen.hear(
                {
                    "status": "ready", "epoch": str(number), "running": running,
                    "waiting": waiting, "evicted_tokens": evicted,
                }
            )  # fmt: skip
        if self._events:
            self._at(self.now + POLL, self._poll)

    def _ask(self, number: int, turn_number: int) -> None:
        turn: Turn = self.conversations[number].turns[turn_number]
        text = self._texts[number]
        text += tokens(1_000_000 + 1000 * number + turn_number, turn.asked)
        self._send(Asked(number, turn_number, tuple(text), self.now), turn.answered)

    def _send(self, asked: Asked, answered: int) -> None:
        data = array("i", asked.prompt).tobytes()  # four bytes a token, as text has
        prompt = Prompt(tuple(chain(b"", data)), len(data))
        job = Job(asked.prompt, SamplingParams(max_tokens=answered, ignore_eos=True))
        chosen = self.route(self, prompt, job)
        assert chosen is not None
        asked.replica, asked.promised = chosen
        replica = self.replicas[asked.replica]
        try:
            (seq_id,) = replica.engine.add(replica.engine.prepare(job), self.now)
        except QueueFullError:
            self.num_refused += 1
            self._at(self.now + RETRY, lambda: self._send(asked, answered))
            return
        self.fleet.replicas[asked.replica].in_flight += 1
        replica.asked[seq_id] = asked
        if replica.pending is None:
            self._step(replica)

    def _step(self, replica: Simulated) -> None:
        replica.pending = replica.engine.launch(self.now)
        if replica.pending is not None:
            done = self.now + self.cost.of(replica.pending.plan)
            self._at(done, lambda: self._collect(replica))

    def _collect(self, replica: Simulated) -> None:
        assert replica.pending is not None
        for emission in replica.engine.collect(replica.pending):
            asked = replica.asked[emission.seq_id]
            if asked.first_at is None:
                asked.first_at, asked.cached = self.now, emission.num_cached
            if emission.finish is not None:
                del replica.asked[emission.seq_id]
                self._end(asked)
        self._step(replica)

    def _end(self, asked: Asked) -> None:
        self.fleet.replicas[asked.replica].in_flight -= 1
        self.finished.append(asked)
        turns = self.conversations[asked.conversation].turns
        self._texts[asked.conversation] += [ANSWER] * turns[asked.number].answered
        if (following := asked.number + 1) < len(turns):
            wait = turns[following].wait
            self._at(self.now + wait, lambda: self._ask(asked.conversation, following))

    # ---------------------------------------------------------------- what came of it

    @property
    def hits(self) -> float:
        """Share of prompt tokens that were cached."""
        return sum(a.cached for a in self.finished) / sum(len(a.prompt) for a in self.finished)

    @property
    def promised(self) -> float:
        """Share that the router believed to be."""
        return sum(a.promised for a in self.finished) / sum(len(a.prompt) for a in self.finished)

    def first_tokens(self) -> list[float]:
        """Seconds to the first token, sorted."""
        return sorted(a.first_at - a.at for a in self.finished if a.first_at is not None)


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return values[min(int(share * len(values)), len(values) - 1)]


def tokens(seed: int, size: int) -> list[int]:
    """A text of its own for each seed, the beginning of a longer one."""
    return random.Random(seed).choices(range(8, VOCABULARY), k=size)


def by_router(simulation: Simulation, prompt: Prompt, job: Job) -> tuple[int, int] | None:
    """As the router does it."""
    fleet = simulation.fleet
    chosen = fleet.choose(prompt, None, ())
    if chosen is None:
        return None
    replica, matched, _ = chosen
    return int(replica.name), round(len(job.prompt) * prompt.share(matched))


def by_blocks(simulation: Simulation, prompt: Prompt, job: Job) -> tuple[int, int] | None:
    """As the router would do it if it had the tokenizer: with the keys that caches have."""
    engine = simulation.replicas[0].engine
    size = engine.config.block_size
    for replica in simulation.fleet.replicas:
        replica.bytes_per_token = PIECE / size  # so that one piece is forgotten for each block
    chosen = simulation.fleet.choose(Prompt(engine.prepare(job).keys), None, ())
    return None if chosen is None else (int(chosen[0].name), chosen[1] * size)


def in_turns(simulation: Simulation, prompt: Prompt, job: Job) -> tuple[int, int] | None:
    """One after another, whatever they hold."""
    return next(simulation.turn) % len(simulation.replicas), 0


def by_oracle(simulation: Simulation, prompt: Prompt, job: Job) -> tuple[int, int] | None:
    """As who sees into every cache, and goes where the most is, among equals to who has least to
    do; nobody's queue is too long for it."""
    keys = simulation.replicas[0].engine.prepare(job).keys
    held = [depth(replica, keys) for replica in simulation.replicas]
    loads = [replica.in_flight for replica in simulation.fleet.replicas]
    best = max(range(len(held)), key=lambda n: (held[n], -loads[n]))
    return best, held[best] * simulation.replicas[0].engine.config.block_size


def depth(replica: Simulated, keys: Iterable[bytes]) -> int:
    """How many of a prompt's blocks are cached."""
    found = 0
    for key in keys:
        if not replica.engine._scheduler.grouped.has(key):
            break
        found += 1
    return found


ROUTES: dict[str, Route] = {
    "router": by_router, "by blocks": by_blocks, "round robin": in_turns, "oracle": by_oracle,
}  # fmt: skip

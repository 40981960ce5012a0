"""The engine's real scheduler under a load, on a clock of its own: a step only takes time.

What it takes is what `bench/cpu_kernels.py` has measured of the embedded model on two cores with
AVX2, when nothing else ran: 7.8 ms for one sequence, 22.2 for 16, 438 for a prompt of 512 tokens.
So a picture is the same on a machine that is busy.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from drawing import ROOT

from ruvon.config import EngineConfig
from ruvon.engine.engine import Engine
from ruvon.engine.types import Job, SamplingParams

sys.path.insert(0, str(ROOT / "bench"))
from simulate import VOCABULARY, ClockRunner, Cost

COST = Cost(step=6.8e-3, sequence=9.6e-4, token=8.4e-4, context=1e-8)


@dataclass
class Asked:
    """A request, with the times that its client sees."""

    at: float
    first: float = 0.0
    tokens: list[float] = field(default_factory=list)


@dataclass
class Run:
    """One server. Requests are of ``prompt`` and ``answer`` tokens."""

    places: int
    prompt: int = 64
    answer: int = 64
    budget: int = 512  # tokens of a step
    now: float = 0.0
    asked: dict[int, Asked] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        config = EngineConfig(
            max_num_seqs=self.places,
            max_num_batched_tokens=self.budget,
            enable_prefix_caching=False,
        )
        self.engine = Engine(
            ClockRunner(), config, max_model_len=8192, num_blocks=4096, vocab_size=VOCABULARY
        )

    def ask(self, at: float, size: int = 0) -> Asked:
        """Another request, of ``size`` tokens if not as long as usual."""
        prompt = tuple(self.random.choices(range(VOCABULARY), k=size or self.prompt))
        sampling = SamplingParams(max_tokens=self.answer, ignore_eos=True)
        (seq_id,) = self.engine.add(Job(prompt, sampling), at)
        self.asked[seq_id] = Asked(at)
        return self.asked[seq_id]

    def step(self) -> int:
        """Take a step → how many requests it has ended."""
        pending = self.engine.launch(self.now)
        assert pending is not None
        self.now += COST.of(pending.plan)
        ended = 0
        for emission in self.engine.collect(pending):
            asked = self.asked[emission.seq_id]
            asked.first = asked.first or self.now
            asked.tokens.append(self.now)
            ended += emission.finish is not None
        return ended

    def closed(self, clients: int, seconds: float) -> None:
        """So many clients, each of whom asks again when it is answered."""
        for _ in range(clients):
            self.ask(0.0)
        while self.now < seconds:
            for _ in range(self.step()):
                self.ask(self.now)

    def open(self, arrivals: Iterator[float], seconds: float) -> Iterator[None]:
        """Requests come at these times, whatever becomes of the others; a turn for each step."""
        coming = next(arrivals)
        while self.now < seconds:
            while coming <= self.now:
                self.ask(coming)
                coming = next(arrivals)
            if self.engine.has_work:
                self.step()
            else:
                self.now = coming
            yield


def rising(slowest: float, fastest: float, seconds: float) -> Iterator[float]:
    """Random arrivals, faster and faster: a Poisson process."""
    draw, now = random.Random(1), 0.0
    while True:
        rate = slowest + (fastest - slowest) * min(now / seconds, 1.0)
        now += draw.expovariate(rate)
        yield now

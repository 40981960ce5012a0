"""``ruvon serve`` over a fake model whose steps fail at random: the program that chaos is made in.

    python program.py FOLDER SEED [FLAGS OF ruvon serve]

A file ``faults`` in FOLDER turns faults on, a file ``lose`` has the engine fail for good. What a
fault has hit is written to ``hit`` there: a request's id in each line.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "server")]

import serving  # noqa: E402 - found by the line above
import structlog  # noqa: E402
from fakes import FakeRunner  # noqa: E402
from serving import END, byte_grammars, fake_start  # noqa: E402

from ruvon.cli import main  # noqa: E402
from ruvon.config import EngineConfig  # noqa: E402
from ruvon.engine.engine import Engine  # noqa: E402
from ruvon.engine.matching import Matchers  # noqa: E402
from ruvon.engine.types import Job, Plan, SamplingRow, StepResult, TokenLogprobs  # noqa: E402
from ruvon.server import app, watchdog  # noqa: E402

ALPHABET = (*b'{}[]",:0129 aeimnt.-\n', *"é🙂".encode(), END)
NUMBERS = {"max_model_len": 384, "num_blocks": 100}  # too few for all, so some are preempted
SHARE = 0.02  # of steps that fail, in each of three ways
MOST_IN_A_ROW = 3  # more would be the end of the engine


class Hits:
    """Which requests were hit. Sequences are told apart by the request they were added for."""

    def __init__(self, folder: Path) -> None:
        self.request_of: dict[int, str] = {}
        self._file = os.open(folder / "hit", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, seq_ids: list[int]) -> None:
        lines = (self.request_of.get(seq_id, f"sequence {seq_id}") for seq_id in seq_ids)
        os.write(self._file, "".join(f"{line}\n" for line in lines).encode())


class ToldEngine(Engine):
    """Knows whose sequences are."""

    hits: Hits

    def add(self, job: Job, now: float, first_index: int = 0) -> list[int]:
        seq_ids = super().add(job, now, first_index)
        told = structlog.contextvars.get_contextvars().get("request_id", "nobody")
        self.hits.request_of |= dict.fromkeys(seq_ids, told)
        return seq_ids


class ChaoticRunner(FakeRunner):
    """Fails steps before they are launched, while they are computed, and single rows of them."""

    def __init__(self, folder: Path, seed: str, hits: Hits) -> None:
        matchers = Matchers(byte_grammars())
        super().__init__(alphabet=ALPHABET, seconds=0.001, depth=2, matchers=matchers)
        self._folder, self._rng, self._hits = folder, Random(seed), hits
        self._in_a_row = 0
        self._ended: deque[int] = deque()

    def launch(self, plan: Plan) -> Future[StepResult]:
        self._forget(plan)
        self.lost = (self._folder / "lose").exists()
        seq_ids = [chunk.seq_id for chunk in plan.chunks]
        if self.lost:
            raise RuntimeError("the device is lost")
        fault = self._draw_fault()
        self._in_a_row = self._in_a_row + 1 if fault in ("launch", "run") else 0
        if fault == "row":
            self._hits.write(seq_ids[:1])
            self.errors[seq_ids[0]] = "NaN in the logits"
        elif fault:
            self._hits.write(seq_ids)
            self.failing[plan.step] = fault
        return super().launch(plan)

    def _draw(
        self, row: SamplingRow, context: list[int]
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None]:
        """With log-probabilities of the tokens that a request names, as a decision does."""
        tokens, scores = super()._draw(row, context)
        for entry in scores or ():
            if wanted := row.sampling.logprob_token_ids:
                entry.top = tuple((token, -1.0 - token % 7) for token in wanted)
        return tokens, scores

    def _draw_fault(self) -> str:
        drawn = int(self._rng.random() / SHARE)
        if drawn > 2 or self._in_a_row == MOST_IN_A_ROW or not (self._folder / "faults").exists():
            return ""
        return ("launch", "run", "row")[drawn]

    def _forget(self, plan: Plan) -> None:
        """What a test would look at afterwards is too much for hours."""
        del self.plans[:-2]
        self.failing.pop(plan.step - 100, None)
        self._ended += plan.ended
        while len(self._ended) > 1000:
            seq_id = self._ended.popleft()
            for known in (self.errors, self._failed, self._hits.request_of):
                known.pop(seq_id, None)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ToldEngine.hits = Hits(folder)
    serving.Engine = ToldEngine
    runner = ChaoticRunner(folder, sys.argv[2], ToldEngine.hits)
    app.start_for_good = fake_start(runner, EngineConfig(), **NUMBERS)
    watchdog.GOODBYE = 0.5
    sys.exit(main(["serve", *sys.argv[3:]]))

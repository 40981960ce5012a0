"""What plans and results cost on their way to ranks and back: microseconds of processor time to
write and to read them, beside pickle, which no rank is sent.

    python bench/plans.py
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

from ruvon.engine.ranks.codec import decode_plan, decode_result, encode_plan, encode_result
from ruvon.engine.types import BEING_SAMPLED, Chunk, NewSequence, Plan, SamplingParams, StepResult

SECONDS = 0.5  # each


def decode_step(sequences: int) -> Plan:
    """A token for each, and a block for every sixteenth."""
    chunks = [
        Chunk(i, 0, BEING_SAMPLED, 1000 + i, ((7 * i + 1,),) if i % 16 == 0 else (), True)
        for i in range(sequences)
    ]
    return Plan(1, tuple(chunks))


def prefill_step(tokens: int) -> Plan:
    """One new prompt."""
    blocks = tuple(range(1, tokens // 16 + 1))
    chunk = Chunk(1, 0, tuple(range(tokens)), 0, (blocks,), True)
    new = NewSequence(1, SamplingParams(temperature=0.7, top_p=0.9), tokens, 1)
    return Plan(1, (chunk,), (new,))


def microseconds(work: Callable[[], object]) -> float:
    """Of processor time, for one call."""
    began, count = time.process_time(), 0
    while (spent := time.process_time() - began) < SECONDS:
        work()
        count += 1
    return 1e6 * spent / count


def main() -> None:
    plans = {f"{n} decodes": decode_step(n) for n in (1, 32, 256)}
    plans["a prompt of 8192"] = prefill_step(8192)
    print(f"{'':18}{'bytes':>8}{'write':>8}{'read':>8}{'pickle':>8}{'unpickle':>9}  us")
    for name, plan in plans.items():
        data, pickled = encode_plan(plan), pickle.dumps(plan)
        times = [
            microseconds(lambda plan=plan: encode_plan(plan)),
            microseconds(lambda data=data: decode_plan(data)),
            microseconds(lambda plan=plan: pickle.dumps(plan)),
            microseconds(lambda pickled=pickled: pickle.loads(pickled)),
        ]
        print(f"{name:18}{len(data):8,}" + "".join(f"{each:8.0f}" for each in times))
    result = StepResult(tuple((i,) for i in range(256)), (None,) * 256, seconds=0.003)
    data = encode_result(result)
    times = [
        microseconds(lambda: encode_result(result)), microseconds(lambda: decode_result(data)),
    ]  # fmt: skip
    print(f"{'256 tokens back':18}{len(data):8,}" + "".join(f"{each:8.0f}" for each in times))


if __name__ == "__main__":
    main()

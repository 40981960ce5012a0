"""What the page that watches an engine costs it: ``python bench/watch.py [ROWS]``.

While nobody looks, a step looks whether a gate is shut, and says of whom it did not start why; all
else that is shown is in the recorder anyway (`bench/recorder.py`). While somebody looks, what
happened is written down for each watcher, and who comes is told how the engine stands. Prints
medians of one core's time.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import orjson

from ruvon.engine.blocks import BlockPool
from ruvon.engine.gate import Gate
from ruvon.engine.grouped_pool import GroupedPool
from ruvon.engine.live import encode, stand
from ruvon.engine.policies import ORDERS, POLICIES, Limits
from ruvon.engine.recorder import Recorder
from ruvon.engine.scheduler import Scheduler
from ruvon.engine.types import Plan, SamplingParams, Sequence, StepResult, StepStats

STATS = StepStats(1, 256, 256, 0, 10, 100, 0, 0, 0, 0.1)
PROMPT, NUM_BLOCKS = 512, 65_536


def microseconds(work: Callable[[], object], times: int = 300) -> float:
    taken = []
    for _ in range(times):
        begin = time.thread_time()
        work()
        taken.append(time.thread_time() - begin)
    return 1e6 * statistics.median(taken)


def busy(rows: int) -> tuple[Scheduler, Plan]:
    """A scheduler with as many running, as many more waiting, and a step of theirs."""
    limits = Limits(rows, 1 << 20, POLICIES["continuous"], ORDERS["fcfs"])
    scheduler = Scheduler(GroupedPool(BlockPool(NUM_BLOCKS, 16)), limits)
    for id in range(2 * rows):
        tokens = [id, *range(PROMPT - 1)]
        scheduler.add(Sequence(id, 0, SamplingParams(), tokens, PROMPT, 1000, 0))
    while True:
        plan = scheduler.schedule(0.0)
        assert plan is not None
        scheduler.commit(plan, StepResult(((9,),) * len(plan.rows), (None,) * len(plan.rows)))
        if len(plan.rows) == plan.num_tokens == rows:
            return scheduler, plan


def main(rows: int) -> None:
    gc.freeze()  # as a server does
    scheduler, plan = busy(rows)
    gate, recorder = Gate(time.monotonic), Recorder()
    recorder.stepped(plan, 0.0, 1.0, STATS, scheduler.work)
    (event,) = recorder.since(0)
    find = partial(scheduler._queues._find_not_started, None)
    standing = stand(scheduler, [], 0, 0.0)
    print(f"steps of {rows} rows, as many more waiting, microseconds")
    print(
        f"a step, nobody looks:  {3 * microseconds(lambda: gate.is_open) + microseconds(find):.2f}"
    )
    print(f"a step, told to one:   {microseconds(lambda: orjson.dumps(encode(event))):.1f}")
    print(f"how it stands:         {microseconds(lambda: stand(scheduler, [], 0, 0.0), 20):.0f}")
    print(f"the same as JSON:      {microseconds(lambda: orjson.dumps(standing), 20):.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)

"""Processor seconds of llama.cpp on one thread, out of the wheel xllamacpp. Run by
bench/processor_time.py with the Python of that peer's environment:

    python bench/llamacpp_time.py MODEL.gguf PROMPT TOKENS TURNS [STREAMS ...]

Prints a line for each turn: of a prompt of so many tokens, of each token after it, and of a step of
each number of streams.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_int8, c_int32, c_uint32, c_void_p

from llamacpp_logits import Batch, open_library

CACHED = 8  # tokens of a stream before those that are timed


def main() -> None:
    path, (prompt, tokens, turns, *streams) = sys.argv[1].encode(), map(int, sys.argv[2:])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints
    llama, rng = open_library(), random.Random(0)
    model = llama.llama_model_load_from_file(path, llama.llama_model_default_params())
    context = open_context(llama, model, max([1, *streams]), prompt + tokens)

    def draw(count: int) -> list[int]:
        return [rng.randrange(1000, 40000) for _ in range(count)]

    for _ in range(turns):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        began = time.process_time()
        run(llama, context, draw(prompt))
        seconds = [time.process_time() - began, steps(llama, context, 1, tokens, draw)]
        for count in streams:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            for number in range(count):
                run(llama, context, draw(CACHED), [number] * CACHED)
            seconds.append(steps(llama, context, count, tokens, draw))
        print(*seconds, file=out, flush=True)


def steps(
    llama: ctypes.CDLL,
    context: c_void_p,
    streams: int,
    count: int,
    draw: Callable[[int], list[int]],
) -> float:
    """Processor seconds of a step in which each stream has one more token."""
    began = time.process_time()
    for _ in range(count):
        run(llama, context, draw(streams), range(streams), every=True)
    return (time.process_time() - began) / count


def open_context(llama: ctypes.CDLL, model: c_void_p, streams: int, longest: int) -> c_void_p:
    """One thread, for so many sequences, each of which may have so many tokens."""
    params = llama.llama_context_default_params()
    first = (c_uint32 * 4).from_buffer(params)  # n_ctx, n_batch, n_ubatch, n_seq_max
    assert (first[0], first[2], first[3]) == (512, 512, 1), "llama_context_params has changed"
    first[0], first[3] = streams * -(-longest // 256) * 256, streams
    context: c_void_p = llama.llama_init_from_model(model, params)
    llama.llama_set_n_threads(context, 1, 1)
    return context


def run(
    llama: ctypes.CDLL,
    context: c_void_p,
    ids: Sequence[int],
    streams: Sequence[int] = (),
    every: bool = False,
) -> None:
    """As they follow what came before in their ``streams``, by default all in the first; the last
    one's logits are computed, or those of every one."""
    count = len(ids)
    each = [(c_int32 * 1)(stream) for stream in streams or [0] * count]
    batch = Batch(
        n_tokens=count,
        token=(c_int32 * count)(*ids),
        n_seq_id=(c_int32 * count)(*[1] * count),
        seq_id=(POINTER(c_int32) * count)(*each),
        logits=(c_int8 * count)(*[int(every)] * (count - 1), 1),
    )
    if llama.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    llama.llama_get_logits_ith(context, count - 1)


if __name__ == "__main__":
    main()

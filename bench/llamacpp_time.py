"""Processor seconds of llama.cpp on one thread, out of the wheel xllamacpp. Run by
bench/processor_time.py with the Python of that peer's environment:

    python bench/llamacpp_time.py MODEL.gguf PROMPT TOKENS TURNS

Prints a line for each turn: of a prompt of so many tokens, and of each token after it.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from ctypes import c_int8, c_int32

from llamacpp_logits import Batch, open_library


def main() -> None:
    path, (prompt, tokens, turns) = sys.argv[1].encode(), map(int, sys.argv[2:5])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever llama.cpp prints
    llama, rng = open_library(), random.Random(0)
    model = llama.llama_model_load_from_file(path, llama.llama_model_default_params())
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    llama.llama_set_n_threads(context, 1, 1)

    def run(ids: Sequence[int]) -> None:
        """As they follow what came before; the last one's logits are computed."""
        batch = Batch(
            n_tokens=len(ids),
            token=(c_int32 * len(ids))(*ids),
            logits=(c_int8 * len(ids))(*[0] * (len(ids) - 1), 1),
        )
        if llama.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        llama.llama_get_logits_ith(context, len(ids) - 1)

    for _ in range(turns):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        began = time.process_time()
        run([rng.randrange(1000, 40000) for _ in range(prompt)])
        between = time.process_time()
        for _ in range(tokens):
            run([rng.randrange(1000, 40000)])
        print(between - began, (time.process_time() - between) / tokens, file=out, flush=True)


if __name__ == "__main__":
    main()

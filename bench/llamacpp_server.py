"""llama.cpp's own HTTP server, out of the wheel xllamacpp. Run by bench/peers.py with the Python
of that peer's environment:

    python bench/llamacpp_server.py MODEL.gguf PORT THREADS SLOTS
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import xllamacpp

CONTEXT_PER_SLOT = 2560  # tokens; the longest request of the benchmark is 2,000 and a few


def main() -> None:
    path, port, threads, slots = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {"llama.cpp"}
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * CONTEXT_PER_SLOT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt = False  # nobody in this benchmark may reuse a prompt
    server = xllamacpp.Server(params)
    print(server.listening_address, xllamacpp.get_system_info(), flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()

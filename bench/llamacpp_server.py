"""llama.cpp's own HTTP server, out of the wheel xllamacpp. Run by bench/peers.py with the Python
of that peer's environment:

    python bench/llamacpp_server.py MODEL.gguf PORT THREADS SLOTS CONTEXT

CONTEXT is in tokens, for all slots together.
"""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    path, port, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:6])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {"llama.cpp"}
    params.port = port
    params.n_parallel = slots
    params.n_ctx = context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt = False  # nobody in this benchmark may reuse a prompt
    server = xllamacpp.Server(params)
    print(server.listening_address, xllamacpp.get_system_info(), flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()

"""The CPU's kernels: written in Python, compiled by numba, deterministic by design.

::

    cpu = CpuKernels(threads=2)
    model = load_model(checkpoint, config, cpu.ops, progress)      # cpu.ops is an `Ops`
    cache = allocate_cache(layers, blocks, kv_heads, block_size, head_dim, torch.float16)
    graph = cpu.capture(model.forward, cache, StepLimits(512, 64, 64, 128), progress)
    logits_LV = graph.replay(batch)                                # the runner's forward
    graph.argmax                                                   # greedy tokens [L], computed
    cpu.sampler(vocab_size, 64)(rows)                              # sampled tokens, see `sampling`
    cpu.close()

Outside of `capture`, every operation of `cpu.ops` computes at once, so tests can call them singly.

From the outside in: `graph` captures and replays a step, `sampling` has a program of its own;
`operations` are what a model calls, `meeting` is where ranks meet; `arguments` says what kernels
are told, `thread_pool` runs them, `isa` what the CPU can do, `formats` and `layout` how data lies
in memory; `compiled` keeps machine code between starts. The kernels are in `jit`, and so is numba:
only imported to be compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ruvon.kernels.cpu import operations
from ruvon.kernels.cpu.compiled import USUAL, Compiled
from ruvon.kernels.cpu.experts import experts, pack_experts
from ruvon.kernels.cpu.formats import LANES
from ruvon.kernels.cpu.graph import MEET, Capture, Graph, Program, empty_batch, sizes_of
from ruvon.kernels.cpu.isa import choose
from ruvon.kernels.cpu.layout import aligned_bytes, pack, round_up
from ruvon.kernels.cpu.meeting import traced
from ruvon.kernels.cpu.params import Param
from ruvon.kernels.cpu.sampling import Sampler
from ruvon.kernels.cpu.thread_pool import ThreadPool
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.kernels.ops import ForwardBatch, Ops, StepLimits
from ruvon.telemetry import Progress

__all__ = ["CpuKernels", "Graph", "Sampler", "allocate_cache"]


class CpuKernels:
    """The table of operations, the threads that run them, and the compiled code."""

    def __init__(
        self,
        threads: int,
        *,
        dense_dtype: torch.dtype | None = None,
        isa: str | None = None,
        cores: Sequence[int] | None = None,
        mesh: Mesh = ALONE,
    ) -> None:
        """
        Args:
            threads: how many compute, the caller's among them.
            dense_dtype: what weights that are not quantized are kept in; None keeps their own.
                Products are float32, but with an instruction set that has a dot product of
                bfloat16, activations are rounded to it for weights of that type.
            isa: the name of an instruction set, see `isa`; None takes the CPU's best. All give the
                same results, but for weights in bfloat16.
            cores: one for each thread to be held to; None leaves that to the operating system.
            mesh: the ranks that share the models; what is captured meets them over ``self.mesh``.

        Raises ConfigError if the CPU does not have that instruction set.
        """
        self.isa = choose(isa)
        self._compiled = Compiled(self.isa, cores=threads)
        self._pool = ThreadPool(threads, self._compiled.address, cores)
        self._capturing: Capture | None = None
        self.mesh = traced(mesh, lambda: self._capturing)
        laid_out: dict[str, Any] = {"dense_dtype": dense_dtype, "bf16": self.isa.bf16}
        self.ops = Ops(
            name=f"cpu, {self.isa.name}",
            pack=functools.partial(pack, **laid_out),
            embed=self._operation(operations.embed),
            add=self._operation(operations.add),
            rms_norm=self._operation(operations.rms_norm),
            layer_norm=self._operation(operations.layer_norm),
            linear=self._operation(operations.linear),
            write_kv=self._operation(operations.write_kv),
            attention=self._operation(operations.attention),
            gather_rows=self._operation(operations.gather_rows),
            logits=self._operation(operations.logits),
            pack_experts=functools.partial(pack_experts, **laid_out),
            experts=self._operation(experts),
            batch_invariant=True,
        )

    def capture(
        self,
        forward: Callable[[ForwardBatch, Sequence[tuple[Tensor, Tensor]]], Tensor],
        cache: Sequence[tuple[Tensor, Tensor]],
        limits: StepLimits,
        progress: Progress | None = None,
        *,
        draws: bool = True,
    ) -> Graph:
        """The step of a model that was built with these `ops`, for batches within ``limits``.
        ``draws``: what it comes to are logits, of which the largest are to be found.

        Kernels that are not on disk yet are compiled here, a few seconds each.
        """
        batch = empty_batch(limits)
        likeliest = torch.zeros(limits.logit_rows, dtype=torch.int64)
        capture = Capture({Param.TOKENS: limits.tokens, Param.LOGIT_ROWS: limits.logit_rows})
        self._capturing = capture
        try:
            logits = forward(batch, cache)
        finally:
            self._capturing = None
        if draws:
            operations.argmax(capture, logits, likeliest)
        program = self._finish(capture, [logits], progress)
        return Graph(program, batch, capture.result(logits), likeliest)

    def sampler(self, vocab_size: int, max_rows: int, progress: Progress | None = None) -> Sampler:
        """Samples tokens for up to ``max_rows`` rows of logits at once. Compiles like `capture`."""
        finish = functools.partial(self._finish, results=(), progress=progress)
        return Sampler(vocab_size, max_rows, self._pool.threads, finish)

    def settle(self) -> None:
        """Keep the calling thread on the first core from now on: it will run every step."""
        self._pool.settle()

    def close(self) -> None:
        """End the threads, and whoever still compiles."""
        self._pool.close()
        self._compiled.close()

    def _operation(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(self._operate, operation)

    def _operate(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        if self._capturing is not None:
            return operation(self._capturing, *arguments)
        return self._compute(operation, *arguments)

    def _compute(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """One operation, now."""
        tokens = arguments[0].shape[0]
        logit_rows = arguments[1].shape[0] if operation is operations.gather_rows else 0
        capture = Capture({Param.TOKENS: tokens, Param.LOGIT_ROWS: logit_rows})
        made = operation(capture, *arguments)
        results = made if isinstance(made, tuple) else (made,)
        batches = [a for a in arguments if isinstance(a, ForwardBatch)]
        starts = batches[0].query_starts.numpy() if batches else np.array([0, tokens], np.int32)
        program = self._finish(capture, [x for x in results if x.is_meta])
        program.run(sizes_of(starts, logit_rows))
        results = tuple(capture.result(x) if x.is_meta else x for x in results)
        return results if isinstance(made, tuple) else results[0]

    def _finish(
        self, capture: Capture, results: Iterable[Tensor], progress: Progress | None = None
    ) -> Program:
        """What was captured, with all its kernels there."""
        kernels = dict.fromkeys(line.kernel for line in capture.instructions if line.kernel != MEET)
        usual_last = sorted(kernels, key=USUAL.__contains__)  # they may be made elsewhere meanwhile
        for done, kernel in enumerate(usual_last):
            if progress is not None:
                progress("compiling kernels", done / len(kernels))
            self._compiled.address(kernel)
        return Program(capture, results, self._compiled, self._pool)


def allocate_cache(
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> list[tuple[Tensor, Tensor]]:
    """Zeroed keys and values [B, G, P, D] of each layer, D rounded up to whole vectors.

    ``dtype`` is float32, float16 or bfloat16; memory is taken as it is written to.
    """
    shape = (num_blocks, num_kv_heads, block_size, round_up(head_dim, LANES))
    size = int(np.prod(shape)) * dtype.itemsize

    def one() -> Tensor:
        return aligned_bytes(size).view(dtype).view(shape)

    return [(one(), one()) for _ in range(num_layers)]

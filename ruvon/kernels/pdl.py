"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel launched with ``launch_pdl=True`` may begin as soon as every program of its predecessor has
called `release`. It then does what depends on no other kernel (reads weights, computes addresses)
and calls `wait` before touching anything that another kernel of this step writes *or reads*.

Every kernel here calls `release` first thing and `wait` exactly once. Both matter: because each
kernel waits for its predecessor, which waited for its own, `wait` orders a kernel after all earlier
ones, so buffers may be reused as if launches were sequential.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until everything earlier on the stream has finished and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointer, num_bytes, PDL: tl.constexpr):
    """Ask for ``num_bytes`` (a multiple of 16) to be brought into L2; one thread asks for all."""
    if PDL:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [pointer.to(tl.int64), num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

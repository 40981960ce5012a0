"""Programmatic dependent launch: a kernel starts while the one before it still runs.

A kernel launched with ``launch_pdl=True`` may begin as soon as every program of its predecessor has
called `release` (or ended). It then does what depends on nothing in flight (reads weights, computes
addresses) and calls `wait` before touching anything that another kernel of this step writes *or
reads*. Every kernel here calls both exactly once. Because each waits for its predecessor, which
waited for its own, `wait` orders a kernel after all earlier ones, and buffers may be reused as if
launches were sequential.

Most kernels release first thing, so several may be waiting, their weights already on the way. What
stands before a kernel of few programs, each with much to read, releases after its own wait. Else
these few start while a product's last programs still run, six to a multiprocessor wherever one has
ended, and stay so: a mixture's products of one token then took 47 us instead of 33. And those of
one token or two release when their work is done: else the second's programs are put beside what is
left of the first's, four to some multiprocessors and one to others, and took 19 us instead of 13.
The first of a model's, which looks up embeddings, releases after its own wait (on a later stage it
is one that receives, and knows nothing of this). So whatever was complete before a step's model
began (the batch's tables, the cache of earlier steps) can be read by all of its kernels before they
wait; attention uses that to fetch keys and values early.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def supports_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch came with Hopper."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


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
def prefetch_block(pointer, num_bytes, wanted, PDL: tl.constexpr):
    """Ask for so many bytes, a multiple of 16, to be brought into L2, if ``wanted``: by one thread,
    in one instruction."""
    if PDL:
        tl.inline_asm_elementwise(
            """{
            .reg .pred asks;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 asks, thread, 0;
            setp.ne.and.u32 asks, $3, 0, asks;
            @asks cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r,r",
            [pointer.to(tl.int64), num_bytes, wanted.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch(pointers, num_bytes, PDL: tl.constexpr):
    """Ask for ``num_bytes`` from each of these addresses to be brought into L2; a null pointer
    asks for nothing. Both must be multiples of 16."""
    if PDL:
        tl.inline_asm_elementwise(
            """{
            .reg .pred wanted;
            setp.ne.u64 wanted, $1, 0;
            @wanted cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [pointers.to(tl.int64), num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

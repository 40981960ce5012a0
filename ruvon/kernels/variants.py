"""How many variants of the Triton kernels there are by now."""

from __future__ import annotations

from triton.runtime.jit import JITFunction

from ruvon.kernels import (
    activation,
    all_gather,
    all_reduce,
    attention,
    codes,
    decode,
    digits,
    embed,
    experts,
    gemv,
    gemv_codes,
    kv,
    matmul,
    norm,
    norm_routing,
    prefill,
    routing,
    sample,
    split_k,
    staging,
)

MODULES = (
    activation, all_gather, all_reduce, attention, codes, decode, digits, embed, experts, gemv,
    gemv_codes, kv, matmul, norm, norm_routing, prefill, routing, sample, split_k, staging,
)  # fmt: skip


def count_variants() -> int:
    """Compiled, or loaded from Triton's cache, in this process; each took its time."""
    kernels = {
        id(value): value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    return sum(
        len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values()
    )

"""What arithmetic the two loops of the prefill kernel become on a GPU: over keys that all queries
see, and over keys of which some are masked. Compiling needs no GPU, but a process of its own,
without the interpreter.

Prints a list of counts of floating-point instructions as JSON, one for each loop.
"""

import json
import re
from collections import Counter

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ruvon.kernels.paged import Caches
from ruvon.kernels.prefill import _prefill_kernel

TYPES = {
    "q_ptr": "*bf16", "caches": Caches("*bf16", "*bf16"), "tables_ptr": "*i32",
    "query_starts_ptr": "*i32", "context_lens_ptr": "*i32", "out_ptr": "*bf16",
    "q_stride": "i32", "table_stride": "i32", "S": "i32", "G": "i32", "scale": "fp32",
}  # fmt: skip
CONSTANTS = {
    "sinks_ptr": None, "GROUP": 3, "D": 64, "PAGE": 16, "WINDOW": 0, "FEWEST": 1,
    "BLOCK_Q": 42, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64, "PDL": True,
}  # fmt: skip
ARITHMETIC = re.compile(r"\b(?:fma|mul|add|sub|ex2|max)\.[a-z0-9.]*f32\b")


def main() -> None:
    names = _prefill_kernel.arg_names
    source = ASTSource(
        fn=_prefill_kernel,
        signature={name: TYPES.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in CONSTANTS.items()},
    )
    options = {"num_warps": 8, "num_stages": 2}
    kernel = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options)
    blocks = re.split(r"\n(?=\$L__BB)", kernel.asm["ptx"])
    loops = [block for block in blocks if "wgmma.mma_async" in block]
    print(json.dumps([Counter(ARITHMETIC.findall(loop)) for loop in loops]))


if __name__ == "__main__":
    main()

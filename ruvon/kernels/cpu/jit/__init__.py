"""The kernels themselves, in Python, and numba, which compiles them. Only imported to compile.

`llvm` builds code in LLVM's language, `simd` teaches numba vectors, `sync` how threads meet;
`tiles` and `dots` are the innermost loops, `linear`, `experts`, `embed`, `write_kv`, `attention`,
`rows` and `sample` the kernels on top, `threads` what runs them. `build` makes machine code of one.
"""

"""The kernels themselves, in Python, and numba, which compiles them. Only imported to compile.

`simd` teaches numba vectors, `sync` how threads meet; `tiles` and `dots` are the innermost loops,
`linear`, `experts`, `embed`, `attention`, `rows` and `sample` the kernels on top, `threads` what
runs them. `build` makes machine code of one.
"""

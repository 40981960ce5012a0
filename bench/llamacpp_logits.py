"""llama.cpp's logits at every position of texts, out of the wheel xllamacpp. Run by
bench/quality.py with the Python of that peer's environment:

    python bench/llamacpp_logits.py MODEL.gguf THREADS < texts > logits

A text comes as a line of token ids; its logits go out as float32, T x V of them. The wheel wraps a
server, which tells no logits of a prompt, but its library exports llama.cpp's C functions. Their
large structs are passed on as they come: only the beginning of ``llama_batch`` is looked into.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_char, c_float, c_int8, c_int32, c_void_p

import xllamacpp.xllamacpp as wheel

LONGEST = 512  # tokens: llama.cpp's default context, and the most it computes at once


class Params(ctypes.Structure):
    """Larger than any version's: it is the last argument, so what follows its end is not read."""

    _fields_ = (("content", c_char * 4096),)


class Batch(ctypes.Structure):
    """``llama_batch``: tokens, of the first sequence where nothing else is said, and for each
    whether its logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


FUNCTIONS = {
    "llama_model_default_params": (Params, ()),
    "llama_context_default_params": (Params, ()),
    "llama_model_load_from_file": (c_void_p, (ctypes.c_char_p, Params)),
    "llama_init_from_model": (c_void_p, (c_void_p, Params)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, ctypes.c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
}


def open_library() -> ctypes.CDLL:
    library = ctypes.CDLL(wheel.__file__)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def main() -> None:
    path, threads = sys.argv[1].encode(), int(sys.argv[2])
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever llama.cpp prints
    llama = open_library()
    model = llama.llama_model_load_from_file(path, llama.llama_model_default_params())
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    llama.llama_set_n_threads(context, threads, threads)
    row_bytes = 4 * llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    for line in sys.stdin:
        tokens = [int(word) for word in line.split()]
        assert len(tokens) <= LONGEST
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch = Batch(
            n_tokens=len(tokens),
            token=(c_int32 * len(tokens))(*tokens),
            logits=(c_int8 * len(tokens))(*[1] * len(tokens)),
        )
        if llama.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        for i in range(len(tokens)):
            out.write(ctypes.string_at(llama.llama_get_logits_ith(context, i), row_bytes))
        out.flush()


if __name__ == "__main__":
    main()

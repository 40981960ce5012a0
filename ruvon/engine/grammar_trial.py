"""Tries grammars in a process of its own, which may run out of time, memory or stack.

A grammar comes from a client, and some take for ever to compile, or end the process that does it.
So each is compiled here first, and only one that is done within bounds is compiled for good.

This file is also that process's program: it knows llguidance only. A request is four bytes of
length and a grammar in UTF-8; an answer is four bytes and the error, empty if there is none. An
empty answer before any request says that it is ready.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
import threading
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from llguidance import LLMatcher

STACK = 2 << 20  # bytes: less than any thread has in which a grammar is compiled for good
MEMORY = 512 << 20  # bytes of addresses
CPU_SECONDS = 0.5  # for each grammar
LENGTH = struct.Struct("<I")

LIMITS = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 250_000,
    "verbose_errors": False,
}
"""About half of the library's own, and for states, of 1 to 2 KB each, a twelfth."""


class Bytes:
    """Bytes as tokens, one that ends, and as many without any bytes as make up a vocabulary, whose
    ids a grammar may name: the least that a grammar can be tried with."""

    is_tokenizer_wrapper = True
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __init__(self, vocab_size: int) -> None:
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>"]
        self.tokens += [b""] * (vocab_size - len(self.tokens))

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def try_grammars(source: BinaryIO, sink: BinaryIO, vocab_size: int) -> None:
    """Compile what comes, take a first step, and tell what was wrong, until nothing comes."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    tokenizer, limits = LLTokenizer(Bytes(vocab_size), slices=[]), LLParserLimits(**LIMITS)
    answer(sink, "")
    while len(size := source.read(4)) == 4:
        text = source.read(*LENGTH.unpack(size)).decode()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # whose signal ends the process
        matcher = LLMatcher(
            tokenizer, LLMatcher.grammar_from_lark(text), limits=limits, log_level=0
        )
        error = matcher.get_error()
        if not error:
            error = take_a_step(matcher)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer(sink, error)


def take_a_step(matcher: LLMatcher) -> str:
    """The error of the first mask, or of consuming what it allows, which looks far ahead for what
    must follow; empty if there is none."""
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    if mask:
        matcher.consume_token((mask & -mask).bit_length() - 1)
    return str(matcher.get_error())


def answer(sink: BinaryIO, error: str) -> None:
    text = error.encode(errors="replace")[:4000]
    sink.write(LENGTH.pack(len(text)) + text)
    sink.flush()


def main() -> None:
    """Runs in a thread, for a thread's stack can be bounded."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    threading.stack_size(STACK)
    thread = threading.Thread(
        target=try_grammars, args=(sys.stdin.buffer, answers, int(sys.argv[1]))
    )
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()

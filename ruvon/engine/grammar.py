"""Grammars, compiled for a model's vocabulary: once for all requests with the same text."""

from __future__ import annotations

import errno
import selectors
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from ruvon.engine import grammar_trial
from ruvon.engine.grammar_errors import refusal, unlocated
from ruvon.engine.grammar_trial import LENGTH, LIMITS
from ruvon.errors import RequestError, UnavailableError
from ruvon.grammars import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

CACHE_BYTES = 64 << 20
HELD_BYTES = 512 << 20  # that requests under way may keep from being forgotten
ENTRY_BYTES, BYTES_A_CHARACTER = 32 << 10, 64
"""About what a compiled grammar takes, by its text; measured over schemas from 100 bytes to 1 MB,
of which most take less."""

SHORT, ENCODED = 64, 4096  # characters of texts whose tokens are remembered, and how many of them
REFUSALS = 256  # remembered, so that asking again costs nothing
PATIENCE = 15.0  # seconds for a trial: a bound for a machine that has no time for it
IN_STRINGS = r'[^"\\\x00-\x1F\x7F]'
LENGTHS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 30)
SLICES = [*(f"{IN_STRINGS}{{1,{length}}}" for length in LENGTHS), IN_STRINGS + "+"]
"""Sets of tokens that are allowed as a whole where a string goes on for as long as they take at
least. With the library's own, of 10 and 30 characters, a mask in a string that is bounded takes
twice as long."""

TOO_COSTLY = "it takes more time or memory to compile than a request may use"
NO_TIME = "This machine had no time to compile the grammar; the request may be tried again."
NO_ROOM = "This machine had no room to compile the grammar; the request may be tried again."
RETRY_AFTER = 5.0  # seconds


class Tokens(Protocol):
    """What is asked of a model's tokenizer."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> Iterable[int]: ...
    def token_bytes(self, id: int) -> bytes: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class Vocabulary:
    """A model's tokens in the form that llguidance asks for; those of a head's padding are empty,
    and so never allowed."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokens, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        known = min(tokenizer.vocab_size, vocab_size)
        self.tokens = [tokenizer.token_bytes(id) for id in range(known)]
        self.tokens += [b""] * (vocab_size - known)
        self.eos_token_ids = list(eos_token_ids)
        if not self.eos_token_ids:  # llguidance wants one: a token that the head does not have
            self.eos_token_ids = [vocab_size]
            self.tokens.append(b"<eos>")
        self.eos_token_id = self.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = [
            id for id in {*tokenizer.special_ids, *self.eos_token_ids} if id < len(self.tokens)
        ]
        self._tokenizer = tokenizer
        self._encode_short = lru_cache(ENCODED)(
            self._encode
        )  # streams force the same, such as keys

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text amid another, for those that a grammar forces; none where the
        tokenizer would add something, such as a space before a text."""
        return self._encode_short(text) if len(text) < SHORT else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        size = len(self.tokens)
        spelt = b"".join(self.tokens[id] for id in ids if id < size)
        return ids if spelt == text.encode() else []


class Compiled:
    """A grammar at its beginning. As long as anybody holds one, it is there for all."""

    __slots__ = ("__weakref__", "matchers", "num_bytes", "wanted")

    def __init__(self, matcher: LLMatcher, num_bytes: int) -> None:
        self.matchers = [matcher]
        self.num_bytes = num_bytes
        self.wanted = 1  # of them


class Grammars:
    """Compiles grammars, in any thread. What is compiled is kept, up to `CACHE_BYTES`, and what
    requests `hold` as long as they do."""

    def __init__(
        self,
        tokenizer: Tokens,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        tried: bool = False,
    ) -> None:
        """Takes a second for a large vocabulary, and the interpreter's lock with it. ``tried``:
        another process has compiled whatever is asked for here, so that it is safe."""
        from llguidance import LLParserLimits, LLTokenizer  # takes long to load

        vocabulary = Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._tokenizer = LLTokenizer(vocabulary, eos_token=vocabulary.eos_token_ids, slices=SLICES)
        self._limits = LLParserLimits(**LIMITS)
        self._trial = Trial(vocab_size)
        self._tried = tried
        self._listener: Callable[[Grammar], None] = lambda grammar: None
        self._compiling = Lock()  # one at a time: they take turns at the processor anyway
        self._lock = Lock()
        self._alive: WeakValueDictionary[str, Compiled] = WeakValueDictionary()
        self._kept: OrderedDict[str, Compiled] = OrderedDict()  # of these, the latest used last
        self._num_bytes = 0
        self._multiplying = ThreadPoolExecutor(1, "ruvon-grammars")
        self._refused: OrderedDict[Grammar, RequestError] = OrderedDict()

    def tell(self, listener: Callable[[Grammar], None]) -> None:
        """Call it with every grammar that is compiled from now on, in whatever thread that is."""
        self._listener = listener

    def close(self) -> None:
        """End the process that grammars are tried in, and the thread that makes more of them."""
        self._multiplying.shutdown(cancel_futures=True)
        self._trial.close()

    def is_known(self, grammar: Grammar) -> bool:
        """Whether it is compiled, or was refused: to ask for it then takes no time."""
        with self._lock:
            return grammar.lark() in self._alive or grammar in self._refused

    def hold(self, grammar: Grammar) -> Compiled | None:
        """Compile it, unless that has been done; as long as somebody has what this gives, it is
        not compiled again. None if others hold so much that this one may be forgotten. Raises
        RequestError that names what of it cannot be served, UnavailableError if this machine has
        no time for it."""
        compiled = self._find(grammar)
        with self._lock:
            held = sum(each.num_bytes for each in self._alive.values())
        return compiled if held <= HELD_BYTES else None

    def matcher(self, grammar: Grammar, turn: int = 0) -> LLMatcher:
        """A matcher of one's own at the grammar's beginning. Raises as `hold` does.

        Copies of one matcher share what its lexer finds, and wait for each other. So where several
        are used at once, each ``turn`` has one that is compiled for it; if that is not there yet,
        it is made meanwhile.
        """
        compiled = self._find(grammar)
        with self._lock:
            if turn >= compiled.wanted:
                if compiled.wanted == len(compiled.matchers):  # so nobody is at it
                    self._multiplying.submit(self._multiply, grammar.lark(), compiled)
                compiled.wanted = turn + 1
            return compiled.matchers[turn % len(compiled.matchers)].deep_copy()

    def has(self, grammar: Grammar, turn: int) -> bool:
        """Whether this turn's matcher has been compiled."""
        with self._lock:
            compiled = self._alive.get(grammar.lark())
            return compiled is not None and turn < len(compiled.matchers)

    def _multiply(self, text: str, compiled: Compiled) -> None:
        """Compile what has been compiled as often as is wanted."""
        while True:
            matcher = self._make(text)
            with self._lock:
                compiled.matchers.append(matcher)
                compiled.num_bytes += size_of(text)
                self._num_bytes += size_of(text) * (self._kept.get(text) is compiled)
                if len(compiled.matchers) == compiled.wanted:
                    return

    def _find(self, grammar: Grammar) -> Compiled:
        text = grammar.lark()
        if (found := self._use(text)) is not None:
            return found
        with self._compiling:
            if grammar in self._refused:
                raise again(self._refused[grammar])
            # somebody may have compiled it while this waited
            return self._use(text) or self._compile(grammar, text)

    def _use(self, text: str) -> Compiled | None:
        """What is compiled, which is now the latest that was used."""
        with self._lock:
            found = self._alive.get(text)
            if found is not None:
                self._keep(text, found)
            return found

    def _keep(self, text: str, compiled: Compiled) -> None:
        """Keep it, and forget what has not been used for longest; with the lock."""
        if text not in self._kept:
            self._num_bytes += compiled.num_bytes
        self._alive[text] = self._kept[text] = compiled
        self._kept.move_to_end(text)
        while self._num_bytes > CACHE_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes

    def _make(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher

        made = LLMatcher(
            self._tokenizer, LLMatcher.grammar_from_lark(text), limits=self._limits, log_level=0
        )
        made.compute_bitmask()  # what the first mask needs is then there for every copy
        return made

    def _compile(self, grammar: Grammar, text: str) -> Compiled:
        error = "" if self._tried else self._trial.error_of(text)
        if not error:
            matcher = self._make(text)
            error = matcher.get_error()
        if error:
            if error == TOO_COSTLY:  # so its parts may be, and are not tried
                refused = unlocated(grammar, error)
            else:
                refused = refusal(grammar, error, self._trial.error_of)
            with self._lock:
                self._refused[grammar] = refused
                if len(self._refused) > REFUSALS:
                    self._refused.popitem(last=False)
            raise again(refused)
        found = Compiled(matcher, size_of(text))
        with self._lock:
            self._keep(text, found)
        self._listener(grammar)
        return found


def again(error: RequestError) -> RequestError:
    """The same error, to be raised by somebody else."""
    return RequestError(error.message, error.param, error.code)


def size_of(text: str) -> int:
    """About how many bytes a compiled grammar takes."""
    return ENTRY_BYTES + BYTES_A_CHARACTER * len(text)


EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
"""Of what a process needs: files, processes, memory. There may be some again soon."""


class Trial:
    """The process that grammars are tried in, started when first needed, and again when a grammar
    has ended it. For one thread at a time."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def error_of(self, text: str) -> str:
        """Why a grammar does not compile; empty if it does. Raises RuntimeError if no process can
        be had, UnavailableError if one does not come to its end for others' sake: it is bounded in
        processor time, so the grammar is to blame only for what happens within that."""
        process = self._started()
        request = text.encode(errors="replace")
        try:
            send(process, LENGTH.pack(len(request)) + request)
            return receive(process)
        except TimeoutError:
            self.close()
            raise UnavailableError(NO_TIME, RETRY_AFTER) from None
        except (OSError, EOFError):
            self.close()
            if process.returncode == -signal.SIGKILL:  # by the system, or by `close`
                raise UnavailableError(NO_TIME, RETRY_AFTER) from None
            return TOO_COSTLY

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, ready. One that needs longer than a request waits goes on starting."""
        try:
            process = self._process or self._start()
            if not self._ready:
                receive(process)
        except TimeoutError:
            raise UnavailableError(NO_TIME, RETRY_AFTER) from None
        except (OSError, EOFError) as error:
            self.close()
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise UnavailableError(NO_ROOM, RETRY_AFTER) from None
            raise RuntimeError("the process that tries grammars does not start") from error
        self._ready = True
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        program = [grammar_trial.__file__, str(self._vocab_size)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", *program],  # -P: the folder's modules are not to be found
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip
        return self._process

    def close(self) -> None:
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return
        process.kill()  # one that has ended by itself still says how
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what it was not sent any more
                pipe.close()  # type: ignore[union-attr]


def send(process: subprocess.Popen[bytes], request: bytes) -> None:
    """All of a request: an unbuffered pipe may take less at once."""
    pipe: Any = process.stdin
    rest = memoryview(request)
    while rest:
        rest = rest[pipe.write(rest) :]


def receive(process: subprocess.Popen[bytes]) -> str:
    """An answer. Raises EOFError if the process ends, TimeoutError if it takes too long."""
    deadline = time.monotonic() + PATIENCE
    (size,) = LENGTH.unpack(receive_bytes(process, 4, deadline))
    return receive_bytes(process, size, deadline).decode(errors="replace")


def receive_bytes(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    pipe: Any = process.stdout
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(received) < size:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise TimeoutError
            piece = pipe.read(size - len(received))
            if not piece:
                raise EOFError
            received += piece
    return received

"""Grammars, compiled for a model's vocabulary: once for all requests with the same text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

from ruvon.engine.grammar_errors import refusal, unlocated
from ruvon.engine.grammar_process import TOO_COSTLY, Trial
from ruvon.engine.grammar_trial import LIMITS
from ruvon.errors import RequestError
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
IN_STRINGS = r'[^"\\\x00-\x1F\x7F]'
LENGTHS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 30)
SLICES = [*(f"{IN_STRINGS}{{1,{length}}}" for length in LENGTHS), IN_STRINGS + "+"]
"""Sets of tokens that are allowed as a whole where a string goes on for as long as they take at
least. With the library's own, of 10 and 30 characters, a mask in a string that is bounded takes
twice as long."""


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

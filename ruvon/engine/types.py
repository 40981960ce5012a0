"""The engine's vocabulary: everything that flows through a step.

Going down: `Job` → `Sequence` → `Chunk`s in a `Plan` → `ForwardBatch` (see `ruvon.kernels.ops`).
Coming up: `StepResult` → `Emission` → `Delta` (see `ruvon.deltas`). Token ids only up to there;
`TextOptions` rides along in a job for `Detokenizer`, the engine never reads it.

Nothing here changes once made, but for `Sequence`, and an `Emission` that gathers later ones. The
types made for each sequence and step are not declared ``frozen`` all the same: to make a frozen one
takes six times as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ruvon.deltas import FinishReason as FinishReason
from ruvon.deltas import TokenLogprobs as TokenLogprobs
from ruvon.grammars import Grammar

if TYPE_CHECKING:
    import numpy as np

PLACEHOLDER = -1
"""In a chunk, in place of a token that the step before is sampling while this one is planned: the
runner, which computes one step after another, knows it in time."""

BEING_SAMPLED = (PLACEHOLDER,)
"""The tokens of every such chunk."""

Pooling: TypeAlias = Literal["mean", "last"]
"""Which final hidden states of a prompt are wanted: of all its tokens, or of the last."""

Blocks: TypeAlias = tuple[tuple[int, ...], ...]
"""Blocks by cache group, or nothing for none in any group. 0 stands for one that its group's window
no longer shows."""

NO_BLOCKS: Blocks = ()

Tables: TypeAlias = "tuple[list[int], ...]"
"""A sequence's block tables, one a cache group."""

Floats64: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are sampled. The defaults leave the model's distribution alone."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output; above 1 discourages
    presence_penalty: float = 0.0  # over the output, as OpenAI defines it
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    seed: int | None = None  # None takes a fresh one
    max_tokens: int | None = 16  # None: as many as the context holds
    min_tokens: int = 0  # no stop token before this many, nor a stop string
    stop_token_ids: tuple[int, ...] = ()  # besides the model's end-of-sequence ids
    ignore_eos: bool = False
    grammar: Grammar | None = None  # what the output must be, as `ruvon.grammars` makes them
    logprobs: int | None = None  # alternatives per token; 0 is the sampled token alone
    logprob_token_ids: tuple[int, ...] = ()  # with logprobs: these, in place of the likeliest
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What happens to text after the engine: stop strings and which ids are shown."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and what is wanted of it: ``n`` completions share the prompt's cache blocks."""

    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    text: TextOptions = TextOptions()
    n: int = 1
    pooling: Pooling | None = None  # the prompt's hidden states are wanted, and no token
    priority: int = 0  # lower runs first, under the policy "priority"
    tenant: str = ""  # whose it is: an opaque id
    weight: float = 1.0  # of the tenant, under the policy "fair"
    cache_salt: str = ""  # jobs share cached prefixes only within one salt
    keys: tuple[bytes, ...] = ()  # of the prompt's full blocks, once `Engine.prepare` has been here
    param: str = "prompt"  # the field that errors about the prompt name
    checked: bool = False  # `Engine.prepare` has found that it can run
    held: object = field(default=None, repr=False, compare=False)
    """Its grammar, compiled: while somebody has it, the engine does not forget it."""


@dataclass(slots=True)
class Wait:
    """A sequence's way to its first step, as `ruvon.engine.waits` keeps it."""

    clocks: tuple[float, ...] = (0.0, 0.0, 0.0)  # what they showed when it came
    num_joined: int = 0  # how many had come to run by then
    num_before: int = 0  # how many came to run since, before it
    seconds: dict[str, float] = field(default_factory=dict)  # by what it waited for
    follows: bool = False  # whether it waited for a prefix in the end


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion on its way, owned by the scheduler.

    ``tokens`` is prompt plus output, as far as it is known. ``num_computed`` tokens are in the
    cache, or will be when the launched steps are done; scheduling closes the gap to the rest,
    ``num_pending``, whether that is a prompt, a chunk of one, a new token or a recompute after
    preemption. The last pending token may be one that a launched step still samples.
    """

    id: int
    index: int  # which of the request's completions this is
    sampling: SamplingParams
    tokens: list[int]
    num_prompt: int
    max_tokens: int  # resolved against the context length
    seed: int
    stop_ids: frozenset[int] = frozenset()  # tokens that end it
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    salt: str = ""
    num_computed: int = 0
    num_pending: int = 0  # 0 as long as it has no blocks, and once its last token is being sampled
    num_cached: int = 0  # prompt tokens found in the prefix cache at first scheduling
    num_preempted: int = 0  # its generation
    num_served: int = 0  # tokens that were computed before it was preempted
    headroom: int = -1  # blocks that were to be had when it last found too few of them
    missing: bytes | None = None  # key of the first block it then did not find
    in_flight: int = 0  # steps launched with a chunk of it and not committed yet
    tables: Tables = ()  # its blocks in order, by cache group; nothing as long as it has none
    added: Blocks = NO_BLOCKS  # those that no chunk has named yet
    introduced: bool = False  # whether a plan has named this generation
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, for the prefix cache
    num_published: int = 0  # leading blocks already offered to the prefix cache
    leaves_at: int = 0  # how many tokens are computed when blocks leave a window next
    num_claimed: int = 0  # leading blocks that others wait for rather than compute them too
    awaits: bytes | None = None  # key of a prefix block that another sequence computes right now
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # so far; None if not wanted
    pooling: Pooling | None = None
    pooled: Floats64 | None = None  # the sum of what is wanted of its hidden states, so far
    arrived_at: float = 0.0  # seconds, monotonic
    scheduled_at: float | None = None  # when a step was first planned with a chunk of it
    wait: Wait = field(default_factory=Wait)  # until then
    num_chunks: int = 0  # of its prompt, again after a preemption
    held: object = None  # the job's
    finish: FinishReason | None = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether logprobs of its prompt are wanted that no step has brought yet."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt


@dataclass(slots=True)
class Chunk:
    """A run of one sequence's tokens to compute in this step."""

    seq_id: int
    generation: int  # how often the sequence has been preempted: each time it begins anew
    tokens: tuple[int, ...]  # or `BEING_SAMPLED`
    start: int  # position of the first
    blocks: Blocks  # what its block tables have grown by since its last chunk
    samples: bool  # whether a token is sampled after the last


@dataclass(frozen=True, slots=True)
class NewSequence:
    """What a runner needs to know of a sequence besides its chunks; goes with the first of each
    generation."""

    seq_id: int
    sampling: SamplingParams
    num_prompt: int
    seed: int
    prefix: tuple[int, ...] = ()  # tokens found in the prefix cache, which no chunk brings


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Prompt positions of one chunk whose logprobs are wanted: logits at ``start + i`` score
    ``targets[i]``."""

    seq_id: int
    chunk: int  # index into Plan.chunks
    targets: tuple[int, ...]
    num_top: int


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Tokens of one chunk whose final hidden states are wanted: ``count`` from ``first`` on."""

    seq_id: int
    chunk: int  # index into Plan.chunks
    first: int
    count: int


WaitReason: TypeAlias = Literal["step", "places", "blocks", "prefix"]
"""Why a sequence is not started with a step: it came while one was under way or enough others
start, no more may run, it would leave too few blocks, or another computes the same prefix now."""

Endings: TypeAlias = tuple[tuple[int, FinishReason], ...]
"""Sequences that a step ended, and how."""

NotStarted: TypeAlias = tuple[tuple[int, WaitReason, int], ...]
"""Sequence id, why it waits, and a number: who computes the prefix, how many run where no more may,
otherwise how many blocks are free beyond what the running need next."""

Work: TypeAlias = tuple[int, int, int, int, bool, Blocks]
"""What a step does for a sequence, unless that is but the next token of one that goes on as it was:
sequence id, generation, position of the first token, number of tokens, whether one is sampled
behind them, blocks added by cache group."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: which tokens to compute, and after which of them to sample.

    A value: what a runner keeps of a sequence (its block table, its tokens, its settings) is what
    this and earlier plans told, and what it sampled itself. ``ended`` comes first, then ``new``.
    """

    step: int
    chunks: tuple[Chunk, ...]
    new: tuple[NewSequence, ...] = ()  # those whose first chunk is here
    ended: tuple[int, ...] = ()  # sequences to forget: over, or preempted since the plan before
    prompt_rows: tuple[PromptRow, ...] = ()
    pooled_rows: tuple[PooledRows, ...] = ()
    rows: tuple[int, ...] = field(init=False)  # the sequences that sample, in the order of chunks
    num_tokens: int = field(init=False)  # of all chunks

    def __post_init__(self) -> None:
        rows = tuple([chunk.seq_id for chunk in self.chunks if chunk.samples])
        object.__setattr__(self, "rows", rows)
        num_tokens = sum([len(chunk.tokens) for chunk in self.chunks])
        object.__setattr__(self, "num_tokens", num_tokens)


@dataclass(slots=True)
class SamplingRow:
    """What a sampler is told of a sequence. A runner keeps one for each, whose history grows to
    the end of every chunk before it is sampled from."""

    seq_id: int
    sampling: SamplingParams
    history: list[int]  # prompt and output
    num_prompt: int
    seed: int
    plain: bool = field(init=False)
    mask: np.ndarray[Any, np.dtype[np.int32]] | None = None  # what its grammar allows, by bits
    word_ends: Mapping[int, Mapping[tuple[int, ...], list[int]]] | None = None  # of bad words

    def __post_init__(self) -> None:
        self.plain = is_plain(self.sampling)


def is_plain(sampling: SamplingParams) -> bool:
    """Whether all that is wanted is the likeliest token, whatever came before."""
    return sampling.temperature == 0 and not (
        sampling.logprobs is not None
        or sampling.grammar is not None
        or sampling.allowed_token_ids is not None
        or sampling.bad_words
        or sampling.min_tokens
        or sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled: the tokens of each of ``Plan.rows`` (more than one for accepted drafts,
    and where a grammar forces those behind the first), logprobs beside them where asked, prompt
    logprobs by sequence."""

    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...]
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    pooled: Mapping[int, Floats64] = field(default_factory=dict)  # seq id → a sum over its rows
    errors: Mapping[int, str] = field(default_factory=dict)  # seq id → why this row has no token
    ended: frozenset[int] = frozenset()  # sequences whose grammar allows nothing more
    seconds: float = 0.0


@dataclass(slots=True)
class Emission:
    """News of one sequence after a step: ids going up to whoever waits for them."""

    seq_id: int
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, on the first emission
    num_cached: int = 0
    pooled: Floats64 | None = None  # [C], the sum of the hidden states that were wanted
    finish: FinishReason | None = None
    stop_token: int | None = None  # the id that stopped it, if one did; it is the last of tokens
    error: str | None = None

    def extend(self, later: Emission) -> None:
        """Take in what came of the same sequence next. Many small objects that wait for each other
        would be looked at by the garbage collector again and again."""
        self.tokens += later.tokens
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or ()) + later.logprobs
        self.finish, self.stop_token, self.error = later.finish, later.stop_token, later.error


def gather(news: dict[int, Emission], emissions: Iterable[Emission]) -> None:
    """Add emissions to ``news``, which has one for each index."""
    for emission in emissions:
        earlier = news.setdefault(emission.index, emission)
        if earlier is not emission:
            earlier.extend(emission)


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step in numbers, for logs, metrics and a recording."""

    step: int
    num_tokens: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_cached: int  # prompt tokens taken from the prefix cache by sequences first scheduled now
    num_queried: int  # prompt tokens those sequences looked up
    num_preempted: int
    seconds: float

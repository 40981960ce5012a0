"""What goes up from a model's ids: one type for every API, `ruvon.LLM` and the terminal.

A parser (`ruvon.models.formats`) reads a completion's ids and says what they mean, `Detokenizer`
(`ruvon.engine.detokenizer`) adds whose they are, and a writer folds what comes of it: into the
chunks of a stream, into one object, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model before temperature and filters.

    Finite always: minus infinity is given as -9999.0, which JSON can carry.
    """

    token: int
    logprob: float
    rank: int  # 1 is the most likely
    top: tuple[tuple[int, float], ...]  # the alternatives asked for, most likely first


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A piece of one tool call. ``index`` counts the calls of a completion; ``id`` and ``name``
    come with its first piece only; the ``arguments`` joined are JSON, or the input of a custom
    tool."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    custom: bool = False


@dataclass(slots=True)
class Delta:
    """What a completion gains: some of its text, its reasoning or a tool call, and the tokens
    behind that. One step may give several; its tokens come with the first, its end with the last.
    """

    index: int = 0  # among the request's completions
    text: str = ""
    reasoning: str = ""
    tool_call: ToolCall | None = None
    tokens: Sequence[int] = ()  # all that were drawn, one that stopped it included
    num_reasoning: int = 0  # tokens of reasoning among them
    logprobs: Sequence[TokenLogprobs] = ()  # one a token, if asked for
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None  # once; None for the first token
    num_cached: int = 0  # prompt tokens found in the prefix cache; with tokens only
    finish: FinishReason | None = None  # the last delta says why it ended
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    error: str | None = None  # why it failed, where ``finish`` is "error"

"""What the server answers beside generated text: its models, tokens, vectors, decisions and state.

As in `responses`, types of dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict  # pydantic, which describes them, cannot read 3.11's own

from ruvon.server.responses import ResponseUsage


class ModelCard(TypedDict):
    """An entry of the models list."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    default_sampling: Mapping[str, float | int]  # where a request is silent


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(TypedDict):
    """A prompt taken apart."""

    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: list[str] | None


class ExplainedSeconds(TypedDict):
    total: float
    queue: NotRequired[float]
    prefill: NotRequired[float]
    decode: NotRequired[float]


class Explanation(TypedDict):
    """Why a request took so long; numbers once it is over, of the completion that ended last."""

    object: Literal["request.explanation"]
    id: str
    status: Literal["queued", "running", "finished"]
    explanation: str
    seconds: ExplainedSeconds
    waited_for: NotRequired[dict[str, float]]
    started_before: NotRequired[int]
    prompt_tokens: NotRequired[int]
    cached_tokens: NotRequired[int]
    prompt_steps: NotRequired[int]
    output_tokens: NotRequired[int]
    preemptions: NotRequired[int]
    completions: NotRequired[int]
    finish_reason: NotRequired[str]


class Steps(TypedDict):
    """What the engine did last. ``next`` is for the next question's ``since``."""

    steps: list[dict[str, Any]]
    next: int


class TokenizerInfo(TypedDict):
    """Texts of special tokens, and the chat template."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


class Prompt(TypedDict):
    """Ids put together."""

    prompt: str


class Detokenized(Prompt):
    """The same, and on request the text of each."""

    token_strs: NotRequired[list[str]]


class Rendered(TypedDict):
    """What a model would be given."""

    model: str
    prompt: str
    token_ids: Sequence[int]
    token_strs: list[str]
    sampling_params: Mapping[str, Any]


class Embedding(TypedDict):
    """One text as a vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class PredicateAnswer(TypedDict):
    type: Literal["predicate"]
    name: str | None
    probability: float


class ChoiceProbability(TypedDict):
    value: str | bool
    probability: float


class ChoiceAnswer(TypedDict):
    type: Literal["choice"]
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ChoiceProbability]


class LevelProbability(TypedDict):
    label: str
    value: int
    probability: float


class ScoreAnswer(TypedDict):
    type: Literal["score"]
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


DecisionAnswer: TypeAlias = PredicateAnswer | ChoiceAnswer | ScoreAnswer


class Answered(TypedDict):
    """Answers to questions about an input."""

    model: str
    answers: list[DecisionAnswer]
    usage: ResponseUsage


class Status(TypedDict):
    status: str


class Readiness(TypedDict):
    status: str
    phase: str
    percent: int


class Load(TypedDict):
    status: str
    epoch: str
    running: NotRequired[int]
    waiting: NotRequired[int]
    kv_cache_usage: NotRequired[float]
    cache_tokens: NotRequired[int]
    evicted_tokens: NotRequired[int]
    spent: NotRequired[dict[str, int]]


class Version(TypedDict):
    version: str

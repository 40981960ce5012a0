"""What the handlers share: how far start-up is, and the model once it is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

from aiohttp import web

from ruvon.config import EngineConfig, ServerConfig
from ruvon.engine.blocks import PrefixCache
from ruvon.engine.gate import Gate
from ruvon.engine.stream import Stream
from ruvon.engine.types import Job
from ruvon.errors import EngineDeadError, ModelNotFoundError, NotReadyError, ShuttingDownError
from ruvon.server.keys import TENANT
from ruvon.telemetry.metrics import HttpMetrics, Metrics

if TYPE_CHECKING:  # a router, which uses what is around this, does not wait for torch
    from ruvon.engine.lens import Lens
    from ruvon.engine.observer import Observer
    from ruvon.engine.preparation import Preparation
    from ruvon.models.chat import Chat
    from ruvon.models.tokenizer import Tokenizer


class Generator(Protocol):
    """All that the server sees of an engine; `EngineLoop` is one."""

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and completion may have together."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def dead(self) -> BaseException | None:
        """What made it fail for good."""

    @property
    def stalled_for(self) -> float:
        """Seconds since the last progress; 0 without work."""

    @property
    def progressed_at(self) -> float:
        """When that was; other times differ, whatever the clock."""

    @property
    def num_open(self) -> int:
        """Sequences whose end somebody waits for."""

    @property
    def load(self) -> tuple[int, int, float]:
        """Sequences running, sequences waiting, share of the cache in use."""

    @property
    def num_arriving(self) -> int:
        """Requests that `admission` lets wait."""

    @property
    def prefix_cache(self) -> PrefixCache:
        """How large it is, and what it has lost."""

    async def admission(self, tenant: str) -> None:
        """Wait until reading a new request keeps nobody waiting."""

    @property
    def preparation(self) -> Preparation:
        """What is done for a job before it is queued, in any thread."""

    def generate(self, jobs: Sequence[Job], timeout: float | None = None) -> Stream:
        """Queue all jobs, or none and raise why not. After ``timeout`` seconds they have failed."""

    def progress(self, stream: Stream) -> str:
        """What a stream without news waits for, as ``queued 3``; nothing once it has some."""

    def describe(self) -> Mapping[str, object]:
        """What it is doing, for a log; may be called in any thread."""

    def fail(self, error: Exception) -> None:
        """Fail whatever runs or waits, and take nothing more."""

    @property
    def gate(self) -> Gate:
        """What slows it down."""

    @property
    def observer(self) -> Observer:
        """What can be seen of it at work."""

    def start(self) -> None: ...

    async def stop(self, timeout: float) -> None:
        """Refuse new requests, and end when the running ones have, or after ``timeout`` seconds."""


@dataclass(frozen=True, slots=True)
class Service:
    """A loaded model and all that answering needs of it."""

    names: tuple[str, ...]  # the first is the name, the others are aliases
    root: str  # what the model was loaded from
    format: str  # of its files
    generator: Generator
    tokenizer: Tokenizer
    chat: Chat
    metrics: Metrics
    fingerprint: str  # changes when weights, kernels or version do
    defaults: Mapping[str, float | int]  # the model's own sampling
    architecture: str
    weight_bytes: int
    close: Callable[[], None]  # ends the runner's thread
    lens: Lens | None = None  # on the model, where one can look inside
    tenant: str = ""  # for whom the jobs of a request are prepared
    apart: bool = True  # whether tenants share no cached prefixes
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def max_model_len(self) -> int:
        return self.generator.max_model_len

    def prepare(self, job: Job) -> Job:
        """`Preparation.prepare_quickly`, for the tenant: where they are kept ``apart``, its cached
        prefixes are no other's. How fast an answer comes would else tell what others have asked."""
        salt = f"{self.tenant}\n{job.cache_salt}" if self.apart and self.tenant else job.cache_salt
        job = replace(job, tenant=self.tenant, cache_salt=salt)
        return self.generator.preparation.prepare_quickly(job)

    def check_model(self, name: str | None) -> None:
        """Raise for a name that is not served; no name means the model there is. ``:latest``
        behind one says nothing: Ollama's clients add it."""
        if name is not None and not {name, name.removesuffix(":latest")}.intersection(self.names):
            raise ModelNotFoundError(f"The model '{name[:100]}' does not exist.", "model")


@dataclass(slots=True)
class State:
    """The server's life: loading, ready, draining, or failed."""

    engine: EngineConfig
    server: ServerConfig
    max_body_size: int
    http: HttpMetrics = field(default_factory=HttpMetrics)
    phase: str = "starting"
    share: float = 0.0  # done of the phase, 0 to 1
    address: tuple[str, int] | None = None  # once it listens
    epoch: str = field(default_factory=lambda: uuid4().hex[:12])  # another one after a restart
    service: Service | None = None
    draining: bool = False
    failure: BaseException | None = None  # why loading failed
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # nothing left to serve

    def progress(self, phase: str, share: float) -> None:
        """The `Progress` of start-up; called from the loading thread."""
        self.phase, self.share = phase, share

    def ready(self) -> Service:
        """The service; raises `NotReadyError` or `EngineDeadError` when it cannot take requests."""
        if self.draining:
            raise ShuttingDownError("The server is shutting down.", retry_after=5.0)
        if self.service is None:
            raise NotReadyError(
                f"The model is still loading ({self.phase}, {self.share:.0%}).", retry_after=2.0
            )
        if self.service.generator.dead is not None:
            raise EngineDeadError("The engine has failed; the log says why.")
        return self.service


STATE = web.AppKey("state", State)


def service_of(http: web.Request) -> Service:
    """The service for a request's tenant. Raises as `State.ready`."""
    return replace(http.app[STATE].ready(), tenant=http[TENANT])

"""What is done for a job before it is queued; it may take long, and be done in any thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from ruvon.config import EngineConfig
from ruvon.engine.blocks import extend_keys
from ruvon.engine.grammar import Grammars
from ruvon.engine.jobs import Jobs
from ruvon.engine.types import Job
from ruvon.errors import RequestError
from ruvon.grammars import Grammar


class NotCompiledError(Exception):
    """What was asked for needs ``grammars`` that are not compiled yet, which takes long."""

    def __init__(self, grammars: Sequence[Grammar]) -> None:
        super().__init__(f"{len(grammars)} grammars are not compiled")
        self.grammars = grammars


class Preparation:
    """Checks jobs, names the blocks of their prompts, compiles their grammars."""

    def __init__(self, jobs: Jobs, config: EngineConfig, grammars: Grammars | None) -> None:
        self._jobs = jobs
        self._config = config
        self.grammars = grammars

    def prepare(self, job: Job) -> Job:
        """The job, with the keys of its prompt's blocks if they will be asked for, its grammar
        compiled. Raises `RequestError` for what can never run, `UnavailableError` if there is no
        time to compile."""
        self._jobs.validate(job)
        held = None
        if self.grammars is not None and job.sampling.grammar is not None:
            held = self.grammars.hold(job.sampling.grammar)
        whole = job.sampling.prompt_logprobs is not None or job.pooling == "mean"
        keys: list[bytes] = []
        if self._config.enable_prefix_caching and not whole:
            size = self._config.block_size
            extend_keys(keys, len(job.prompt) // size, job.prompt, size, job.cache_salt)
        return replace(job, keys=tuple(keys), checked=True, held=held)

    def prepare_quickly(self, job: Job) -> Job:
        """The same, but raises NotCompiledError for a job whose grammar is new, which is to be done
        again when that is compiled."""
        grammar = job.sampling.grammar
        self.check_compiled([] if grammar is None else [grammar])
        return self.prepare(job)

    def check_compiled(self, grammars: Iterable[Grammar]) -> None:
        """Raises NotCompiledError for grammars that are new."""
        known = self.grammars
        if known is None:
            return
        if unknown := [grammar for grammar in grammars if not known.is_known(grammar)]:
            raise NotCompiledError(unknown)

    def compile(self, grammars: Iterable[Grammar]) -> list[object]:
        """Compile grammars: they are known as long as somebody has what this gives. Why one cannot
        be compiled says whoever asks for it then. Raises `UnavailableError`."""
        if self.grammars is None:
            return []
        held: list[object] = []
        for grammar in grammars:
            with suppress(RequestError):
                held.append(self.grammars.hold(grammar))
        return held

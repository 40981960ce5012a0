"""From settings to an engine that runs: device, kernels, weights, tokenizer, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ruvon.config import EngineConfig
from ruvon.engine.backends import (
    Backend,
    choose_backend,
    choose_device,
    refuse_idle,
)
from ruvon.engine.engine import Engine
from ruvon.engine.grammar import Grammars
from ruvon.engine.kv_cache import (
    MemoryPlan,
    free_for_cache,
    longest_sequence,
    plan_memory,
)
from ruvon.engine.lens import Lens
from ruvon.engine.loading import distinct, load_on, load_words, tensors_of
from ruvon.engine.ranks.node import run_node
from ruvon.engine.ranks.runner import Ranks
from ruvon.engine.ranks.start import start_ranks
from ruvon.engine.resources import available_cores
from ruvon.engine.runner import Runner
from ruvon.engine.runners import make_runner
from ruvon.engine.types import (
    SamplingParams,
)
from ruvon.engine.validation import check_sampling
from ruvon.engine.warm_up import warm_up
from ruvon.errors import ConfigError, LoadError, RequestError
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.models.chat import Chat
from ruvon.models.checkpoint import Checkpoint, open_checkpoint
from ruvon.models.defaults import sampling_defaults
from ruvon.models.tokenizer import Tokenizer
from ruvon.telemetry import Progress, silent

if TYPE_CHECKING:
    from ruvon.engine.gpu.runner import GpuRunner


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A loaded model, ready to run, and what was decided on the way."""

    engine: Engine
    runner: Runner | GpuRunner | Ranks  # other engines may take turns with ``engine`` on it
    eos_token_ids: tuple[int, ...]
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    chat: Chat
    grammars: Grammars
    memory: MemoryPlan
    device: str
    kernels: str  # the table's name
    batch_invariant: bool  # whether they promise the same bits in any batch
    dtype: str  # of the computation
    threads: int
    close: Callable[[], None]  # ends the threads; nothing runs afterwards
    defaults: Mapping[str, float | int] = field(default_factory=dict)
    """The model's own `SamplingParams`, which count where a request is silent."""
    counters: Mapping[str, tuple[str, Callable[[], int]]] = field(default_factory=dict)
    """What the runner counts, for metrics: by name, help and value."""
    ranks: int = 1  # processes that compute a step between them
    lens: Lens | None = None  # on the model, for whoever wants to look inside
    failed: Future[None] = field(default_factory=Future)
    """Gets why no step can succeed any more, where that may happen while none is under way."""


def compute_for_server(config: EngineConfig) -> None:
    """Be one of the machines that compute for the one that serves, until that ends. Raises
    ConfigError, LoadError and PeerError."""
    device = choose_device(config)
    checkpoint = open_checkpoint(config, silent)
    run_node(config, device, checkpoint.path, config.threads or available_cores())


@dataclass(frozen=True, slots=True)
class Partners:
    """What one rank of several has to know of the others before it computes."""

    agree: Callable[[MemoryPlan], MemoryPlan] = lambda own: own
    """Its own plan → what all have room for."""
    sharers: int = 1  # ranks that share this machine's main memory


NOBODY = Partners()


def start_engine(
    config: EngineConfig,
    progress: Progress,
    mesh: Mesh = ALONE,
    partners: Partners = NOBODY,
) -> LoadedEngine:
    """Load what ``config`` names and make an engine of it; of several ranks, if it asks for them.
    For one rank of several, ``mesh`` is how it meets the others, its ``partners``.

    The engine's own config names the device. Raises `ConfigError` for a setting that cannot be
    honoured here, and `LoadError` for a checkpoint that cannot be used.
    """
    if config.node_rank:
        raise ConfigError(f"--node-rank {config.node_rank}: only `ruvon serve` computes for others")
    progress("opening model", 0.0)
    device = choose_device(config)
    config = dataclasses.replace(config, device="cuda" if device.type == "cuda" else "cpu")
    threads = config.threads or available_cores()
    checkpoint = open_checkpoint(config, progress)
    longest_sequence(checkpoint.spec, config)  # refuses what is too long before loading takes time
    defaults = model_defaults(checkpoint, config)  # and what makes no sense
    stack = ExitStack()
    try:
        if config.num_ranks > 1:
            loaded = assemble_ranks(checkpoint, config, threads, stack, progress)
            return dataclasses.replace(loaded, defaults=defaults, lens=Lens(checkpoint, config))
        backend = choose_backend(checkpoint.spec, config, device, threads, mesh)
        stack.callback(backend.close)
        refuse_idle(checkpoint.spec, config, backend)
        loaded = assemble(checkpoint, config, backend, threads, stack, progress, partners)
        return dataclasses.replace(loaded, defaults=defaults, lens=Lens(checkpoint, config))
    except BaseException as error:
        stack.close()
        if is_shortage(error):
            raise LoadError(f"{checkpoint.path}: memory does not suffice ({error})") from error
        raise


def is_shortage(error: BaseException) -> bool:
    """Whether it means that there is no more memory; torch has no class for that on a CPU."""
    if isinstance(error, RuntimeError):
        said = ("can't allocate memory", "bad_alloc")
        return isinstance(error, torch.OutOfMemoryError) or any(it in str(error) for it in said)
    return isinstance(error, MemoryError)


def model_defaults(checkpoint: Checkpoint, config: EngineConfig) -> dict[str, float | int]:
    """The model's own sampling, checked once: no request is to fail for what it never said.
    Raises LoadError naming the value that makes no sense."""
    if config.generation_config == "none":
        return {}
    try:
        defaults: dict[str, Any] = sampling_defaults(checkpoint.generation)
        check_sampling(SamplingParams(**defaults), checkpoint.spec.vocab_size)
    except (LoadError, RequestError) as error:
        without = "--generation-config none leaves it out"
        raise LoadError(f"{checkpoint.path}: its sampling defaults: {error} ({without})") from None
    return defaults


def assemble(
    checkpoint: Checkpoint,
    config: EngineConfig,
    backend: Backend,
    threads: int,
    stack: ExitStack,
    progress: Progress,
    partners: Partners,
) -> LoadedEngine:
    """Everything that a backend and a checkpoint make. ``stack`` learns how to close it."""
    with ThreadPoolExecutor(1, "ruvon-words") as beside:
        alone = backend.mesh.size * backend.mesh.stages == 1
        words = beside.submit(load_words, checkpoint, tried=not alone)
        model = load_on(checkpoint, config, backend, threads, progress)
    tokenizer, chat, grammars = words.result()
    stack.callback(grammars.close)
    memory = plan_memory(
        model.spec,
        config,
        backend.kv,
        weight_bytes=sum(tensor.nbytes for tensor in distinct(tensors_of(model))),
        free_bytes=free_for_cache(backend.ops, config, model.spec, partners.sharers),
        held=model.held,
    )
    memory = partners.agree(memory)
    runner = make_runner(model, config, memory, backend, grammars, progress)
    stack.callback(runner.close)
    progress("warming up", 0.0)
    warm_up(runner, config, len(memory.windows))
    return LoadedEngine(
        engine=Engine(
            runner,
            config,
            max_model_len=memory.max_model_len,
            num_blocks=memory.num_blocks,
            windows=memory.windows,
            vocab_size=model.spec.vocab_size,
            eos_token_ids=grammars.eos_token_ids,
            grammars=grammars,
        ),
        runner=runner,
        eos_token_ids=grammars.eos_token_ids,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        chat=chat,
        memory=memory,
        device=str(backend.ops.device),
        kernels=backend.ops.name,
        batch_invariant=backend.ops.batch_invariant,
        dtype=str(backend.ops.dtype).removeprefix("torch."),
        threads=threads,
        close=stack.close,
        counters={} if isinstance(runner, Runner) else runner.counters,
        grammars=grammars,
    )


def assemble_ranks(
    checkpoint: Checkpoint, config: EngineConfig, threads: int, stack: ExitStack, progress: Progress
) -> LoadedEngine:
    """An engine whose steps are computed by other processes. ``stack`` learns how to end them."""
    with ThreadPoolExecutor(1, "ruvon-words") as beside:
        words = beside.submit(load_words, checkpoint)
        started = start_ranks(checkpoint.spec, config, checkpoint.path, threads, progress)
        stack.callback(started.runner.close)
    tokenizer, chat, grammars = words.result()
    stack.callback(grammars.close)
    grammars.tell(started.runner.announce)
    return LoadedEngine(
        engine=Engine(
            started.runner,
            config,
            max_model_len=started.memory.max_model_len,
            num_blocks=started.memory.num_blocks,
            windows=started.memory.windows,
            vocab_size=checkpoint.spec.vocab_size,
            eos_token_ids=grammars.eos_token_ids,
            grammars=grammars,
        ),
        runner=started.runner,
        eos_token_ids=grammars.eos_token_ids,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        chat=chat,
        memory=started.memory,
        device=started.device,
        kernels=started.kernels,
        batch_invariant=started.batch_invariant,
        dtype=started.dtype,
        threads=threads,
        close=stack.close,
        counters=started.runner.counters,
        grammars=grammars,
        ranks=config.num_ranks,
        failed=started.runner.failed,
    )

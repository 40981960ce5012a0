"""From settings to an engine that runs: device, kernels, weights, tokenizer, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.engine.backends import (
    Backend,
    StepLimits,
    choose_backend,
    choose_device,
    refuse_idle,
    step_limits,
)
from ruvon.engine.engine import Engine
from ruvon.engine.grammar import Grammars
from ruvon.engine.kv_cache import (
    Cache,
    MemoryPlan,
    allocate_cache,
    free_for_cache,
    longest_sequence,
    plan_memory,
)
from ruvon.engine.matching import Matchers
from ruvon.engine.ranks.node import run_node
from ruvon.engine.ranks.runner import Ranks
from ruvon.engine.ranks.start import start_ranks
from ruvon.engine.resources import available_cores
from ruvon.engine.runner import Forward, Runner
from ruvon.engine.types import (
    Blocks,
    Chunk,
    NewSequence,
    Plan,
    PromptRow,
    SamplingParams,
    SamplingRow,
    StepResult,
)
from ruvon.engine.validation import check_sampling
from ruvon.errors import ConfigError, LoadError, RequestError
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.models import Model, load_model
from ruvon.models.chat import Chat, load_chat
from ruvon.models.checkpoint import Checkpoint, open_checkpoint
from ruvon.models.defaults import sampling_defaults
from ruvon.models.sources import weight_files
from ruvon.models.tokenizer import Tokenizer, load_tokenizer
from ruvon.telemetry import Progress, silent

if TYPE_CHECKING:
    from ruvon.engine.gpu.runner import GpuRunner

SMALL_MODEL = 1 << 30
"""Bytes of weights below which torch's own threads do not help to load them: tensors are small, and
for each operation threads wait for one another, long if anybody else uses their cores."""

LAYERS_AT_ONCE = 4
BYTES_AT_ONCE = 2 << 30
"""Most that are loaded side by side on a CPU, each of which takes the memory of its largest weight
a few times: a large mixture's layers come one by one, each on all threads."""


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
            return dataclasses.replace(loaded, defaults=defaults)
        backend = choose_backend(checkpoint.spec, config, device, threads, mesh)
        stack.callback(backend.close)
        refuse_idle(checkpoint.spec, config, backend)
        loaded = assemble(checkpoint, config, backend, threads, stack, progress, partners)
        return dataclasses.replace(loaded, defaults=defaults)
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


def load_words(checkpoint: Checkpoint, *, tried: bool = False) -> tuple[Tokenizer, Chat, Grammars]:
    """All that is needed to read and to write text, and to write it by rules; ``tried`` as
    `Grammars` has it."""
    tokenizer, spec = load_tokenizer(checkpoint), checkpoint.spec
    chat = load_chat(tokenizer)
    ends = dict.fromkeys(chat.stop_ids((*spec.eos_token_ids, *tokenizer.eos_ids)))
    eos_token_ids = tuple(id for id in ends if 0 <= id < spec.vocab_size)
    return tokenizer, chat, Grammars(tokenizer, spec.vocab_size, eos_token_ids, tried=tried)


def load_on(
    checkpoint: Checkpoint, config: EngineConfig, backend: Backend, threads: int, progress: Progress
) -> Model:
    """The rank's share of the model, loaded on so many threads; torch uses that many afterwards."""
    stored = stored_bytes(checkpoint) // (backend.mesh.size * backend.mesh.stages)
    room = BYTES_AT_ONCE * checkpoint.spec.num_layers // max(stored, 1)
    on_cpu = backend.ops.device.type == "cpu"
    at_once = max(min(threads, LAYERS_AT_ONCE, room), 1) if on_cpu else 1
    small = stored <= SMALL_MODEL
    torch.set_num_threads(1 if small else max(threads // at_once, 1))
    model = load_model(checkpoint, config, backend.ops, progress, at_once, backend.mesh)
    torch.set_num_threads(threads)
    return model


def make_runner(
    model: Model,
    config: EngineConfig,
    memory: MemoryPlan,
    backend: Backend,
    grammars: Grammars,
    progress: Progress,
) -> Runner | GpuRunner:
    """The model over its cache, one step at a time."""
    limits = step_limits(model.spec, config, memory)
    cache = allocate_cache(model.spec, memory, backend.ops.device, model.held)
    if backend.graphs:
        return make_gpu_runner(model, config, memory, cache, limits, grammars, progress)
    step = backend.make_step(model, cache, limits, progress)

    def sampler(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> StepResult:
        return step.draw(logits_LV, rows, grammars.eos_token_ids)

    return Runner(
        step.forward,
        sampler,
        hidden=step.hidden,
        block_size=config.block_size,
        windows=memory.windows,
        device=None if backend.takes_arrays else backend.ops.device,
        max_logit_rows=limits.logit_rows,
        at_start=backend.pin_thread,
        matchers=Matchers(grammars) if backend.mesh.is_last else None,
        samples=backend.mesh.is_last,
    )


def make_gpu_runner(
    model: Model,
    config: EngineConfig,
    memory: MemoryPlan,
    cache: Cache,
    limits: StepLimits,
    grammars: Grammars,
    progress: Progress,
) -> GpuRunner:
    from ruvon.engine.gpu.runner import GpuRunner  # triton is not on every platform
    from ruvon.engine.gpu.scoring import Scorer

    device = model.ops.device
    scorer = Scorer(
        for_longest(partial(model.hidden, cache=cache), memory.max_model_len),
        model.logits,
        device=device,
        block_size=config.block_size,
        windows=memory.windows,
        max_logit_rows=limits.logit_rows,
    )
    progress("compiling kernels", 0.0)
    longest, num_groups = min(limits.tokens, memory.max_model_len), len(memory.windows)
    for plan in scoring_plans(longest, config.block_size, num_groups):
        (chunk,), (row,) = plan.chunks, plan.prompt_rows
        scorer.launch(chunk, row, [[*blocks] for blocks in chunk.blocks]).read()
    runner = GpuRunner(
        partial(model.forward, cache=cache),
        scorer,
        device=device,
        block_size=config.block_size,
        windows=memory.windows,
        vocab_size=model.spec.vocab_size,
        max_model_len=memory.max_model_len,
        max_seqs=limits.sequences,
        max_tokens=limits.tokens,
        eos_token_ids=grammars.eos_token_ids,
        matchers=Matchers(
            grammars, min(max(available_cores() // 2, 1), MASK_THREADS), at_once=False
        ),
        progress=progress,
    )
    for sampling in RARE:
        runner.launch(short_step(config, sampling, num_groups)).result()
    runner.start_counting()
    return runner


MASK_THREADS = 4  # at most: of 16 masks more take as long again to wake as they save

RARE = (
    SamplingParams(typical_p=0.5, bad_words=((0,), (0, 0)), logprobs=1),
    SamplingParams(temperature=0, presence_penalty=1, logit_bias={0: 1.0}, min_tokens=1),
)
"""Sampling that a GPU is asked for once at start: what is loaded at its first use is there then."""


def for_longest(forward: Forward, max_context: int) -> Forward:
    """``forward`` as if a context were always the longest, as it is for graphs: some kernels are
    compiled for it."""
    return lambda batch: forward(dataclasses.replace(batch, max_context=max_context))


SCORED = (1, 2, 16, 32, 64, 128, 512)
"""Numbers of rows for which a GPU's products differ; beyond the last they do not."""


def scoring_plans(longest: int, block_size: int, num_groups: int = 1) -> Iterator[Plan]:
    """Prompts to score which between them need every variant of a kernel that scoring ever will,
    so that none is compiled while somebody waits: graphs need those of their own sizes only."""
    for num_tokens in sorted({min(size, longest) for size in SCORED}):
        tokens = (0,) * num_tokens
        blocks = first_blocks(num_tokens, block_size, num_groups)
        new = NewSequence(0, SamplingParams(temperature=0), num_tokens, 0)
        chunk = Chunk(0, 0, tokens, 0, blocks, False)
        yield Plan(0, (chunk,), (new,), prompt_rows=(PromptRow(0, 0, tokens, 0),))


def first_blocks(num_tokens: int, block_size: int, num_groups: int) -> Blocks:
    """Blocks for a sequence of a single step: the same in all groups, for a layer reads what it has
    just written, and nobody what the last one leaves."""
    return (tuple(range(1, -(-num_tokens // block_size) + 1)),) * num_groups


def warm_up(runner: Runner | GpuRunner, config: EngineConfig, num_groups: int = 1) -> None:
    """Run a short step, so that what happens once happens before any request: kernels compile,
    threads start, a model that cannot run fails. What it writes to the cache is overwritten."""
    runner.launch(short_step(config, SamplingParams(temperature=0), num_groups)).result()


def short_step(config: EngineConfig, sampling: SamplingParams, num_groups: int = 1) -> Plan:
    """One short prompt."""
    tokens = (0,) * min(config.block_size, config.largest_step.tokens)
    new = NewSequence(0, sampling, len(tokens), 0)
    blocks = first_blocks(len(tokens), config.block_size, num_groups)
    chunk = Chunk(0, 0, tokens, 0, blocks, True)
    return Plan(0, (chunk,), (new,))


def stored_bytes(checkpoint: Checkpoint) -> int:
    """The size of its weights on disk; 0 if it has none."""
    if checkpoint.format == "safetensors":
        files = [file for file in weight_files(checkpoint.path) if file.exists()]
    else:
        files = [part.path for part in checkpoint.gguf.parts] if checkpoint.gguf else []
    return sum(file.stat().st_size for file in files)


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors held by a tree of dataclasses and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_of(item)


def distinct(tensors: Iterator[Tensor]) -> list[Tensor]:
    """Each tensor once: tied weights share theirs."""
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())

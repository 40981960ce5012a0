"""What to load and how the engine runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ruvon.config.fields import check_fields, setting
from ruvon.errors import ConfigError


class StepSize(NamedTuple):
    """How much one step may hold."""

    sequences: int
    tokens: int


CPU_STEP = StepSize(64, 512)
GPU_STEP = StepSize(256, 8192)  # small steps leave a GPU idle
SHORTEST_KEY = 16


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to load and how the engine runs it."""

    model: str | None = setting(
        None,
        "Folder, GGUF file or hub id; of GGUF files org/name:Q4_K_M or org/name:file.gguf. "
        "Default: the embedded SmolLM2.",
    )
    revision: str | None = setting(None, "Hub revision: branch, tag or commit.")
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = setting(
        "auto", "Where weights come from; dummy draws random ones from a bare config."
    )
    generation_config: Literal["auto", "none"] = setting(
        "auto", "auto takes the model's own sampling defaults, from generation_config.json or GGUF."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Compute dtype. auto: float32 on a CPU, bfloat16 on a GPU."
    )
    quantization: Literal["auto", "none", "int8", "int4"] = setting(
        "auto",
        "auto keeps the checkpoint's own; none dequantizes; int8 and int4 quantize at load, for "
        "kernels 'cpu' and 'triton', all but experts in MXFP4.",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU where there is one.")
    kernels: Literal["auto", "torch", "cpu", "triton"] = setting(
        "auto", "Which table of kernels computes; torch is the plain reference."
    )
    cpu_isa: Literal[
        "auto", "avx512-bf16", "avx512-vnni", "avx512", "avx-vnni", "avx2", "i8mm", "dotprod",
        "portable",
    ] = setting(
        "auto",
        "Instruction set of kernels 'cpu'. auto: the best that the CPU has. All give the same "
        "bits, but avx512-bf16 rounds what meets weights in bfloat16.",
    )  # fmt: skip
    deterministic: bool = setting(
        False, "The same bits for a request in any batch. On a CPU always so; slower on a GPU."
    )
    threads: int = setting(
        0,
        "Compute threads on a CPU. 0: one for each core (not for each of its hardware threads), as "
        "far as a container's quota goes.",
        least=0,
        most=1024,
    )
    pin_threads: Literal["auto", "on", "off"] = setting(
        "auto",
        "Hold each thread of kernels 'cpu' to a core of its own. auto: where there is a thread for "
        "every core that the process may run on.",
    )
    tensor_parallel_size: int = setting(
        1,
        "Ranks that compute each layer between them: processes, each with a GPU or a share of the "
        "cores.",
        least=1,
        most=64,
    )
    pipeline_parallel_size: int = setting(
        1,
        "Stages, each of as many ranks, that hold the layers between them.",
        least=1,
        most=64,
    )
    nnodes: int = setting(
        1,
        "Machines that have the ranks, as many on each; all run the same command, each with its "
        "own --node-rank.",
        least=1,
        most=64,
    )
    node_rank: int = setting(
        0, "Which of the machines this is: 0 serves, the others compute for it.", least=0, most=63
    )
    master_addr: str | None = setting(
        None, "Address of machine 0, under which the others reach it; it listens there only."
    )
    master_port: int | None = setting(
        None, "Port of machine 0 for the others. Default: 29500.", least=1, most=65535
    )
    cluster_key: str | None = setting(
        None,
        "What machines know each other by, 16 characters or more. The variable and the file keep "
        "it out of the list of processes.",
        secret=True,
    )
    max_model_len: int | None = setting(
        None,
        "Longest prompt plus completion, tokens. Default: the model's own, or what fits.",
        least=2,
    )
    max_num_seqs: int | None = setting(
        None,
        "Most sequences in one step. Default: 64 on a CPU, 256 on a GPU; fewer under a smaller "
        "token budget.",
        least=1,
    )
    max_num_batched_tokens: int | None = setting(
        None,
        "Token budget of one step, prompts and decodes. Default: 512 on a CPU, 8192 on a GPU; more "
        "for more sequences.",
        least=1,
    )
    block_size: int = setting(16, "Tokens in one block of the KV cache.", least=1)
    kv_cache_memory: str | None = setting(
        None,
        "Memory for the KV cache, such as 512MiB or 2GiB. Default: planned from what is free.",
        unit="size",
    )
    gpu_memory_utilization: float = setting(
        0.9, "Share of GPU memory ruvon may plan with.", least=0.01, most=1.0
    )
    cpu_memory_utilization: float = setting(
        0.25,
        "Share of the free main memory that the KV cache may take on a CPU; all replicas together.",
        least=0.001,
        most=1.0,
    )
    enable_prefix_caching: bool = setting(True, "Reuse cached blocks of equal prefixes.")
    enable_chunked_prefill: bool = setting(
        True,
        "Split prompts over steps, beside decodes; off computes a prompt in one step, if one can "
        "hold it.",
    )
    batching: Literal["sequential", "static", "continuous"] = setting(
        "continuous", "When waiting requests may join the running ones."
    )
    scheduling_policy: Literal["fair", "fcfs", "priority"] = setting(
        "fair",
        "Who goes first. fair: whose API key has been served the fewest tokens; of one key, and "
        "without keys, first come first served, as fcfs does for all. priority: the request's "
        "field of that name.",
    )
    max_num_queued_reqs: int = setting(
        1024, "Waiting sequences beyond which requests get a 503.", least=1
    )
    max_num_queued_tokens: int | None = setting(
        None, "Waiting tokens beyond which requests get a 503. Default: no bound.", least=1
    )
    seed: int = setting(0, "Seeds dummy weights.", least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        sequences, tokens = self.largest_step
        if sequences > tokens:
            raise ConfigError(
                f"max_num_seqs {sequences} must not exceed max_num_batched_tokens {tokens}: every "
                "running sequence needs a token of the budget"
            )
        if self.device == "cpu" and self.kernels == "triton":
            raise ConfigError("kernels 'triton' need device 'cuda', not 'cpu'")
        if self.device == "cuda" and self.kernels == "cpu":
            raise ConfigError("kernels 'cpu' need device 'cpu', not 'cuda'")
        runs_cpu = self.kernels == "cpu" or (self.kernels == "auto" and self.device != "cuda")
        if self.cpu_isa != "auto" and not runs_cpu:
            raise ConfigError(f"cpu_isa '{self.cpu_isa}' needs kernels 'cpu', not '{self.kernels}'")
        if self.seed and self.load_format != "dummy":
            raise ConfigError(
                f"seed {self.seed} is for dummy weights and needs load_format 'dummy'; what is "
                "drawn is seeded by each request"
            )

        check_nodes(self)

    @property
    def num_ranks(self) -> int:
        """How many processes compute a step between them."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def largest_step(self) -> StepSize:
        """The largest step: as given, and what is not given as suits ``device``, a CPU as long as
        that is still ``auto``. Of one alone, the other follows where it must."""
        usual = GPU_STEP if self.device == "cuda" else CPU_STEP
        sequences, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if tokens is None:
            tokens = max(usual.tokens, sequences or 0)
        if sequences is None:
            sequences = min(usual.sequences, tokens)
        return StepSize(sequences, tokens)


def check_nodes(config: EngineConfig) -> None:
    """Raises ConfigError for ranks that cannot be shared among machines as the settings say."""
    if config.nnodes == 1:
        for name in ("node_rank", "master_addr", "master_port", "cluster_key"):
            if getattr(config, name):
                raise ConfigError(f"{name} is for several machines and needs nnodes of 2 or more")
        return
    if config.num_ranks % config.nnodes:
        raise ConfigError(
            f"nnodes {config.nnodes} must divide the {config.num_ranks} ranks of "
            f"tensor_parallel_size {config.tensor_parallel_size} and pipeline_parallel_size "
            f"{config.pipeline_parallel_size}"
        )
    if config.node_rank >= config.nnodes:
        raise ConfigError(f"node_rank {config.node_rank} must be below nnodes {config.nnodes}")
    if config.master_addr is None:
        raise ConfigError("nnodes of 2 or more needs master_addr, an address of machine 0")
    if len(config.cluster_key or "") < SHORTEST_KEY:
        raise ConfigError(
            f"nnodes of 2 or more needs a cluster_key of at least {SHORTEST_KEY} characters, the "
            "same on all machines"
        )

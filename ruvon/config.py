"""Every setting, once: name, type, default, help. The only reader of argv, environment and TOML.

A setting is a dataclass field. Its command-line flag is the field's name with dashes, its variable
is ``RUVON_`` and the name in capitals, its TOML key is the name. Never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that carries its help text and the few hints a command line needs."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to load and how the engine runs it."""

    model: str | None = setting(None, "Folder, GGUF file or hub id. Default: the embedded SmolLM2.")
    revision: str | None = setting(None, "Hub revision: branch, tag or commit.")
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = setting(
        "auto", "Where weights come from; dummy draws random ones from a bare config."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Compute dtype. auto: float32 on a CPU, bfloat16 on a GPU."
    )
    quantization: Literal["auto", "none", "int8", "int4"] = setting(
        "auto", "auto keeps the checkpoint's own; none dequantizes; int8 and int4 quantize at load."
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU where there is one.")
    kernels: Literal["auto", "torch", "cpu", "triton"] = setting(
        "auto", "Which table of kernels computes; torch is the plain reference."
    )
    threads: int = setting(0, "Compute threads on a CPU. 0: one for each core given.")
    max_model_len: int | None = setting(
        None, "Longest prompt plus completion, tokens. Default: the model's own, or what fits."
    )
    max_num_seqs: int = setting(64, "Most sequences in one step.")
    max_num_batched_tokens: int = setting(512, "Token budget of one step, prompts and decodes.")
    block_size: int = setting(16, "Tokens in one block of the KV cache.")
    kv_cache_memory: str | None = setting(
        None, "Memory for the KV cache, such as 512MiB or 2GiB. Default: planned from what is free."
    )
    gpu_memory_utilization: float = setting(0.9, "Share of GPU memory ruvon may plan with.")
    enable_prefix_caching: bool = setting(True, "Reuse cached blocks of equal prefixes.")
    enable_chunked_prefill: bool = setting(
        True, "Split long prompts over steps, beside decodes; off computes a prompt in one step."
    )
    batching: Literal["sequential", "static", "continuous"] = setting(
        "continuous", "When waiting requests may join the running ones."
    )
    scheduling_policy: Literal["fcfs", "priority"] = setting(
        "fcfs", "Order of the waiting queue."
    )
    max_num_queued_reqs: int = setting(1024, "Waiting sequences beyond which requests get a 503.")
    seed: int = setting(0, "Seeds dummy weights.")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the engine is offered over HTTP."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on. 0 picks a free one.")
    served_model_name: str | None = setting(
        None, "Name in the API. Default: the model's own. Several, comma-separated, are aliases."
    )
    chat_template: str | None = setting(None, "File with a Jinja chat template to use instead.")
    generation_config: Literal["auto", "none"] = setting(
        "auto", "auto takes sampling defaults from the model's generation_config.json."
    )
    max_logprobs: int = setting(20, "Most alternatives a request may ask for.")
    max_body_size: str = setting("8MiB", "Larger request bodies get a 413.")
    sse_keep_alive_interval: float = setting(15.0, "Seconds of silence before a comment line.")
    shutdown_timeout: float = setting(30.0, "Seconds that running requests get after SIGTERM.")
    strict: bool = setting(False, "Refuse unknown request fields instead of reporting them.")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least level shown.")
    log_format: Literal["auto", "console", "json"] = setting(
        "auto", "auto: console on a terminal, JSON elsewhere."
    )
    log_requests: bool = setting(True, "One line for each request.")

"""Every setting, once: name, type, default, help. The only reader of argv, environment and TOML.

A setting is a dataclass field. Its command-line flag is the field's name with dashes, its variable
is ``RUVON_`` and the name in capitals, its TOML key is the name. What is given wins over what is
not in this order: argv, environment, TOML file, default; what loses is not looked at. Whoever
builds a config, from whatever source, gets the same checks. Never imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from ruvon.errors import ConfigError

ENV_PREFIX = "RUVON_"
VARIABLES = {
    "cache_dir": "Folder for compiled kernels. Default: `ruvon` in the user's cache folder.",
    "config": "File of settings, as `--config`.",
    "url": "Server that `chat`, `complete` and `models` ask, as their `--url`.",
    "api_key": "Key for that server, as their `--api-key`, of several the first; `OPENAI_API_KEY` "
    "serves as well. A server takes it as its own setting.",
}
"""Variables that are no settings: a name without prefix, as it is documented."""

LINK = re.compile(r"(tcp|udp|sctp)://.*")
"""What Kubernetes, beside a service named ruvon, sets RUVON_PORT to."""
SERVICE = re.compile(r"(service_(host|port)|port_\d+_(tcp|udp|sctp))(_\w+)?")
"""The names of the other variables that it then sets."""


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that carries its help text and what else its checks need: ``least`` and
    ``most`` bound a number, ``unit="size"`` marks a string that `parse_size` must accept, ``form``
    is a pattern with its description that each of several texts must fit, ``secret=True`` keeps
    a value out of messages and of the config's own repr."""
    secret = extra.get("secret", False)
    return field(default=default, repr=not secret, metadata={"help": help, **extra})


class StepSize(NamedTuple):
    """How much one step may hold."""

    sequences: int
    tokens: int


KEY = (r"[\x21-\x2b\x2d-\x7e]+", "printable ASCII without spaces and commas")
ORIGIN = (r"\*|[a-z][a-z0-9+.-]*://[^\s/,*]+", "an origin like https://chat.example.com, or *")

A_DAY = 86_400.0  # seconds; an event loop's timers have an end
CPU_STEP = StepSize(64, 512)
GPU_STEP = StepSize(256, 8192)  # small steps leave a GPU idle


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
        "kernels 'cpu', all but experts in MXFP4.",
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
    )
    pin_threads: Literal["auto", "on", "off"] = setting(
        "auto",
        "Hold each thread of kernels 'cpu' to a core of its own. auto: where there is a thread for "
        "every core that the process may run on.",
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
    enable_prefix_caching: bool = setting(True, "Reuse cached blocks of equal prefixes.")
    enable_chunked_prefill: bool = setting(
        True, "Split long prompts over steps, beside decodes; off computes a prompt in one step."
    )
    batching: Literal["sequential", "static", "continuous"] = setting(
        "continuous", "When waiting requests may join the running ones."
    )
    scheduling_policy: Literal["fcfs", "priority"] = setting("fcfs", "Order of the waiting queue.")
    max_num_queued_reqs: int = setting(
        1024, "Waiting sequences beyond which requests get a 503.", least=1
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
        if self.cpu_isa != "auto" and self.kernels != "cpu":
            raise ConfigError(f"cpu_isa '{self.cpu_isa}' needs kernels 'cpu', not '{self.kernels}'")
        if self.seed and self.load_format != "dummy":
            raise ConfigError(
                f"seed {self.seed} is for dummy weights and needs load_format 'dummy'; what is "
                "drawn is seeded by each request"
            )

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


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the engine is offered over HTTP."""

    host: str = setting(
        "127.0.0.1", "Address to listen on. 0.0.0.0 is all of IPv4, :: all of IPv6 and IPv4."
    )
    port: int = setting(8000, "Port to listen on. 0 picks a free one.", least=0, most=65535)
    served_model_name: str | None = setting(
        None, "Name in the API. Default: the model's own. Several, comma-separated, are aliases."
    )
    chat_template: str | None = setting(None, "File with a Jinja chat template to use instead.")
    api_key: tuple[str, ...] = setting(
        (),
        "Key without which only /live and /ready answer. Several: repeated, or comma-separated. "
        "The variable and the file keep it out of the list of processes.",
        form=KEY,
        secret=True,
    )
    cors_allow_origin: tuple[str, ...] = setting(
        (),
        "Origin of web pages that may read answers, such as https://chat.example.com; * is any. "
        "Several: repeated, or comma-separated. Default: none.",
        form=ORIGIN,
    )
    max_logprobs: int = setting(20, "Most alternatives a request may ask for.", least=0)
    max_body_size: str = setting("4MiB", "Larger request bodies get a 413.", unit="size")
    sse_keep_alive_interval: float = setting(
        15.0, "Seconds of silence in a stream before a comment line.", least=0.1, most=A_DAY
    )
    resume_grace: float = setting(
        30.0,
        "Seconds in which a dropped stream can be gone on with, by a client that has asked for it "
        "with X-Ruvon-Resume. 0: never.",
        least=0,
        most=3600,
    )
    shutdown_timeout: float = setting(
        30.0, "Seconds that running requests get after SIGTERM.", least=0, most=A_DAY
    )
    store_responses: bool = setting(
        True, "Keep what /v1/responses answers, for previous_response_id and for reading it again."
    )
    response_store_size: str = setting(
        "64MiB", "Most memory for it; what was used longest ago goes first.", unit="size"
    )
    response_store_ttl: float = setting(
        3600.0, "Seconds that a response is kept after it was last used.", least=1, most=A_DAY
    )
    strict: bool = setting(False, "Refuse unknown request fields instead of reporting them.")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least level shown.")
    log_format: Literal["auto", "console", "json"] = setting(
        "auto", "auto: console on a terminal, JSON elsewhere."
    )
    log_requests: bool = setting(True, "One line for each request.")

    def __post_init__(self) -> None:
        check_fields(self)


CONFIGS: tuple[type[EngineConfig] | type[ServerConfig], ...] = (EngineConfig, ServerConfig)
Config = TypeVar("Config", EngineConfig, ServerConfig)


@dataclass(frozen=True, slots=True)
class Kind:
    """A setting's type, taken apart: what a string from the environment must become."""

    base: type
    optional: bool
    choices: tuple[str, ...]
    many: bool = False  # a tuple of texts, comma-separated where it is one text

    def __str__(self) -> str:
        if self.many:
            return "texts"
        return " | ".join(self.choices) if self.choices else NAMES[self.base]


NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def kinds(cls: type) -> dict[str, Kind]:
    """The kind of every setting of a config class."""
    return {name: _kind(hint) for name, hint in get_type_hints(cls).items()}


def _kind(hint: Any) -> Kind:
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (arg for arg in get_args(hint) if arg is not type(None))
        return dataclasses.replace(_kind(inner), optional=True)
    if get_origin(hint) is Literal:
        return Kind(str, False, get_args(hint))
    if get_origin(hint) is tuple:
        return Kind(str, False, (), many=True)
    return Kind(hint, False, ())


def flag(name: str) -> str:
    """``max_num_seqs`` → ``--max-num-seqs``."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """``max_num_seqs`` → ``RUVON_MAX_NUM_SEQS``."""
    return ENV_PREFIX + name.upper()


def load(
    cls: type[Config],
    given: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    toml: Mapping[str, Any] | None = None,
) -> Config:
    """Build one config. ``given`` holds argv's values, where None means not given; ``toml`` is
    what `read_toml` returned. An empty variable counts as not set, as does a `LINK`.

    Raises:
        ConfigError: a value is of the wrong type, out of range or not among the choices.
    """
    values: dict[str, Any] = {}
    for name, kind in kinds(cls).items():
        text = environ.get(variable(name))
        if given and given.get(name) is not None:
            values[name] = given[name]
        elif text and not _is_service(name, text):
            values[name] = text if kind.many else _parsed(text, kind, variable(name))
        elif toml and name in toml:
            source = f"{name} in the TOML file"
            values[name] = toml[name] if kind.many else _typed(toml[name], kind, source)
        if kind.many and name in values:
            values[name] = several(values[name])
    return cls(**values)


def several(value: Any) -> Any:
    """``"a, b"`` or ``["a", "b"]`` → ``("a", "b")``; what is neither stays, for `check_fields`."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return tuple(part.strip() for text in texts for part in text.split(","))


def cache_root(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder for what ruvon keeps between starts, which need not exist: ``RUVON_CACHE_DIR``, or
    ``ruvon`` in the user's cache folder. None for a user without a home."""
    shared = Path(environ.get("XDG_CACHE_HOME", ""))  # to be ignored, says XDG, if not absolute
    try:
        if folder := environ.get(variable("cache_dir")):
            return Path(folder).expanduser()
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "ruvon"
    except RuntimeError:
        return None


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, all of them known settings.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has a key that is no setting.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    known = _all_names()
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{_hint(key, known)}")
    return values


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each ``RUVON_*`` variable that is neither a setting nor one of `VARIABLES`,
    and one for all those that Kubernetes makes of a service named ruvon. Nobody wrote these, and
    others may have put the rest there: no reason to end."""
    known = _all_names().union(VARIABLES)
    strangers, services = [], []
    for name in sorted(name for name in environ if name.startswith(ENV_PREFIX)):
        setting = name.removeprefix(ENV_PREFIX).lower()
        if _is_service(setting, environ[name]):
            services.append(name)
        elif setting not in known:
            strangers.append(f"{name} is not a setting of ruvon")
    if services:
        strangers.append(f"{', '.join(services)}: about a service of Kubernetes, not settings")
    return strangers


def _is_service(name: str, text: str) -> bool:
    """Whether a variable, by its name without prefix, describes a service of Kubernetes."""
    return bool(LINK.fullmatch(text) if name == "port" else SERVICE.fullmatch(name))


MOST_BYTES = 1 << 63
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in ``"512MiB"``, ``"2GB"``, ``"1.5g"`` or ``"1048576"``. With an i the unit is a power
    of 1024, without it of 1000, as in the standards.

    Raises:
        ConfigError: the text is no size, or is zero or beyond all memory.
    """
    match = SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(f"{text!r} is not a size; write it like 512MiB, 2GiB or 1048576")
    base = 1024 if match[3] else 1000
    power = " kmgt".index(match[2].lower() or " ")
    size = float(match[1]) * base**power
    if not 1 <= size < MOST_BYTES:
        raise ConfigError(f"size {text!r} is {'zero bytes' if size < 1 else 'more than can be'}")
    return int(size)


def check_fields(config: EngineConfig | ServerConfig) -> None:
    """Hold every field against its type, its choices and its bounds.

    Raises:
        ConfigError: naming the first field that fails, and what it may be.
    """
    all_kinds = kinds(type(config))
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if value is None and all_kinds[spec.name].optional:
            continue
        if all_kinds[spec.name].many:
            _formed(value, spec.metadata, spec.name)
            continue
        _typed(value, all_kinds[spec.name], spec.name)
        _bounded(value, spec.metadata, spec.name)


def _formed(value: Any, rules: Mapping[str, Any], name: str) -> None:
    """Several texts, each of the setting's form."""
    pattern, words = rules["form"]
    texts = value if isinstance(value, tuple) else (value,)
    for text in texts:
        if not (isinstance(text, str) and re.fullmatch(pattern, text)):
            shown = "" if rules.get("secret") else f", got {text!r}"
            raise ConfigError(f"{name} must be {words}{shown}")
    if texts is not value:
        raise ConfigError(f"{name} must be a tuple of texts")


def _bounded(value: Any, limits: Mapping[str, Any], name: str) -> None:
    least, most = limits.get("least"), limits.get("most")
    if least is not None and not value >= least:  # as NaN is not, either
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value}")
    if limits.get("unit") == "size":
        try:
            parse_size(value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


def _typed(value: Any, kind: Kind, source: str) -> Any:
    """A value that has a type already; an integer will do where a number is wanted."""
    number = kind.base is float and isinstance(value, int)
    fits = isinstance(value, kind.base) or number
    if not fits or (isinstance(value, bool) and kind.base is not bool):
        raise ConfigError(f"{source} must be {kind}, got {value!r}")
    if kind.choices and value not in kind.choices:
        raise ConfigError(f"{source} must be one of {kind}, got {value!r}")
    return value


WORDS = {"1": True, "true": True, "yes": True, "on": True}
WORDS |= {"0": False, "false": False, "no": False, "off": False}


def _parsed(text: str, kind: Kind, source: str) -> Any:
    """A value out of a string, as the environment gives them."""
    try:
        value = WORDS[text.lower()] if kind.base is bool else kind.base(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{source} must be {kind}, got {text!r}") from None
    return _typed(value, kind, source)


def _all_names() -> set[str]:
    return {name for cls in CONFIGS for name in kinds(cls)}


def _hint(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"

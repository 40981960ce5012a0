"""A model's own defaults for how its tokens are drawn, which count where a request is silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from ruvon.errors import LoadError

log = structlog.get_logger(__name__)

KEYS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
LEFT_OUT = (
    "num_beams", "penalty_alpha", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length",
    "min_new_tokens", "stop_strings", "sequence_bias", "epsilon_cutoff", "eta_cutoff", "top_h",
    "guidance_scale", "xtc_probability", "mirostat", "max_new_tokens",
)  # fmt: skip
"""What would change the answers, and is not done. How long they are a request says, or the API."""

GGUF_PREFIX = "general.sampling."
GGUF_NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}


def gguf_generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A GGUF file's sampling defaults under the names of generation_config.json."""
    stated = {
        key.removeprefix(GGUF_PREFIX): value
        for key, value in metadata.items()
        if key.startswith(GGUF_PREFIX)
    }
    return {
        GGUF_NAMES.get(name, name): float(f"{value:.7g}") if isinstance(value, float) else value
        for name, value in stated.items()
    }  # they are float32: 0.95 would else be 0.949999988079071


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float | int]:
    """What a generation_config.json says, as `SamplingParams` fields of their types. Raises
    LoadError naming a value that is no number; whether it is in range the engine says."""
    given = {name: generation[name] for name in KEYS if generation.get(name) is not None}
    defaults = {name: _number(name, value) for name, value in given.items()}
    if "top_k" in defaults:
        defaults["top_k"] = max(_whole("top_k", defaults["top_k"]), 0)  # -1 is off, too
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    if unserved := [name for name in LEFT_OUT if generation.get(name) not in OFF]:
        log.warning("generation_config_left_out", keys=unserved)
    return defaults


OFF: tuple[object, ...] = (None, False, 0, 1, [])  # 1 is a beam, and a scale that changes nothing


def _number(name: str, value: Any) -> float | int:
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value) if isinstance(value, str) else value
    except ValueError:
        pass
    raise LoadError(f"generation_config.json: {name} {value!r} is not a number")


def _whole(name: str, value: float) -> int:
    if not float(value).is_integer():
        raise LoadError(f"generation_config.json: {name} {value!r} is not a whole number")
    return int(value)

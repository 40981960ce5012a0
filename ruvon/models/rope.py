"""Rotary position embedding: what a checkpoint says of it, and the tables made from that.

Dimension pair ``i`` turns by ``position * frequency[i]``, where plain RoPE has
``frequency[i] = theta ** (-2 i / D)``. Every scaling known here only changes the frequencies (and
YaRN also the length of the rotated vectors), so it ends up in the tables and no kernel knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.ops import Rope


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by ``factor``."""

    factor: float
    original_positions: int | None = None  # None: as many as the checkpoint states


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by ``factor``, short ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """A ramp over dimensions, and longer vectors against flat attention (arXiv:2309.00071)."""

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: the paper's 0.1 ln(factor) + 1
    truncate: bool = True  # ramp from and to whole dimensions


@dataclass(frozen=True, slots=True)
class Divisors:
    """Each frequency divided by a number of its own: how GGUF stores Llama 3's scaling."""

    values: tuple[float, ...]


Scaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling | Divisors


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotation of whole heads of ``dim``."""

    theta: float
    dim: int
    scaling: Scaling | None = None


def make_rope(spec: RopeSpec, positions: int, device: torch.device) -> Rope:
    """Tables for positions 0 to ``positions - 1``."""
    frequencies, length = scaled_frequencies(spec)
    angles_PD = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return Rope((angles_PD.cos() * length).to(device), (angles_PD.sin() * length).to(device))


def scaled_frequencies(spec: RopeSpec) -> tuple[Tensor, float]:
    """(frequencies float32 [D / 2], factor on the rotated vectors' length)."""
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim
    frequencies = 1.0 / spec.theta**exponents
    match spec.scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling(factor):
            return frequencies / factor, 1.0
        case Divisors(values):
            return frequencies / torch.tensor(values), 1.0
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(frequencies, spec, scaling), _yarn_length(scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = (
        float(scaling.original_positions) * frequencies / (2 * math.pi)
    )  # over the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, spec: RopeSpec, scaling: YarnScaling) -> Tensor:
    def dimension(turns: float) -> float:  # whose wave turns so often over the trained context
        wavelengths = scaling.original_positions / (turns * 2 * math.pi)
        return spec.dim * math.log(wavelengths) / (2 * math.log(spec.theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.dim - 1)
    steps = torch.arange(spec.dim // 2, dtype=torch.float32)
    divided = ((steps - first) / max(last - first, 0.001)).clamp(0, 1)
    return divided * frequencies / scaling.factor + (1 - divided) * frequencies


def _yarn_length(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_from_config(config: Mapping[str, Any], dim: int) -> RopeSpec:
    """From config.json: ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := [key for key, value in given.items() if isinstance(value, Mapping)]:
        raise LoadError(f"config.json: RoPE of its own for {nested[0]!r} is not supported")
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise LoadError(f"config.json: partial_rotary_factor {partial} is not supported")
    kind = given.get("rope_type") or given.get("type")
    try:
        return RopeSpec(theta, dim, _scaling_from_config(kind, given, config))
    except KeyError as error:
        raise LoadError(f"config.json: RoPE scaling {kind!r} lacks {error}") from None


def _scaling_from_config(
    kind: str | None, given: Mapping[str, Any], config: Mapping[str, Any]
) -> Scaling | None:
    match kind:
        case None if "factor" in given:
            raise LoadError("config.json: RoPE scaling has a factor, but no rope_type")
        case None | "default":
            return None
        case "dynamic":
            # Frequencies would change with a sequence's length beyond the trained context, and with
            # them every key that is cached. Within it, which is all that we serve, they are plain.
            return None
        case "linear":
            original = given.get("original_max_position_embeddings")
            return LinearScaling(float(given["factor"]), original)
        case "llama3":
            return Llama3Scaling(
                float(given["factor"]),
                float(given["low_freq_factor"]),
                float(given["high_freq_factor"]),
                _original_positions(given, config),
            )
        case "yarn":
            return _yarn_from_config(given, config)
    raise LoadError(
        f"config.json: RoPE scaling {kind!r} is not supported (linear, dynamic, llama3, yarn are)"
    )


def _original_positions(given: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """How many positions the model was trained with; like transformers, first look outside."""
    key = "original_max_position_embeddings"
    return int(config.get(key) or given.get(key) or config["max_position_embeddings"])


def _yarn_from_config(given: Mapping[str, Any], config: Mapping[str, Any]) -> YarnScaling:
    original = _original_positions(given, config)
    factor = float(given.get("factor") or config["max_position_embeddings"] / original)
    length = given.get("attention_factor")
    scale, over = given.get("mscale"), given.get("mscale_all_dim")
    if length is None and scale and over:
        length = _mscale(factor, scale) / _mscale(factor, over)
    return YarnScaling(
        factor=factor,
        original_positions=original,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=length,
        truncate=bool(given.get("truncate", True)),
    )


def rope_from_gguf(
    metadata: Mapping[str, Any], arch: str, dim: int, divisors: tuple[float, ...] | None
) -> RopeSpec:
    """From GGUF metadata; ``divisors`` is the tensor ``rope_freqs.weight``, if there is one."""
    theta = float(metadata.get(f"{arch}.rope.freq_base", 10000.0))
    rotated = metadata.get(f"{arch}.rope.dimension_count", dim)
    if rotated != dim:
        raise LoadError(f"{arch}.rope.dimension_count {rotated} differs from the head size {dim}")
    scaling = _scaling_from_gguf(metadata, arch)
    if divisors is None:
        return RopeSpec(theta, dim, scaling)
    if isinstance(scaling, YarnScaling):
        raise LoadError(f"{arch}.rope.scaling.type 'yarn' beside rope_freqs is not supported")
    if len(divisors) != dim // 2 or not all(0 < value < math.inf for value in divisors):
        raise LoadError(
            f"rope_freqs.weight is not {dim // 2} numbers above 0, as heads of {dim} need"
        )
    factor = 1.0 if scaling is None else scaling.factor
    return RopeSpec(theta, dim, Divisors(tuple(value * factor for value in divisors)))


def _scaling_from_gguf(
    metadata: Mapping[str, Any], arch: str
) -> LinearScaling | YarnScaling | None:
    """As llama.cpp reads it: a factor without a type is linear, and so is what older files call
    ``rope.scale_linear``."""
    prefix = f"{arch}.rope.scaling"
    kind = metadata.get(f"{prefix}.type", "linear")
    factor = metadata.get(f"{prefix}.factor", metadata.get(f"{arch}.rope.scale_linear"))
    factor = float(factor or 1.0)
    original = metadata.get(f"{prefix}.original_context_length")
    length = float(metadata.get(f"{prefix}.attn_factor", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise LoadError(f"{prefix}.type {kind!r} is not supported (linear and yarn are)")
    if kind == "yarn" and factor != 1.0:
        return _yarn_from_gguf(metadata, arch, factor, original, length)
    if length != 1.0:
        raise LoadError(f"{prefix}.attn_factor {length} is only supported with yarn")
    return None if kind == "none" or factor == 1.0 else LinearScaling(factor, original)


def _yarn_from_gguf(
    metadata: Mapping[str, Any], arch: str, factor: float, original: int | None, length: float
) -> YarnScaling:
    """``length`` multiplies the paper's attention factor, where config.json's replaces it."""
    prefix = f"{arch}.rope.scaling.yarn"
    for key in (f"{prefix}_ext_factor", f"{prefix}_attn_factor"):
        if metadata.get(key, 1.0) != 1.0:
            raise LoadError(f"{key} {metadata[key]} is not supported (1 is)")
    return YarnScaling(
        factor=factor,
        original_positions=int(original or metadata[f"{arch}.context_length"]),
        beta_fast=float(metadata.get(f"{prefix}_beta_fast", 32.0)),
        beta_slow=float(metadata.get(f"{prefix}_beta_slow", 1.0)),
        attention_factor=length * _mscale(factor, 1.0),
    )

"""A small, fast LLM inference engine and OpenAI-compatible server.

::

    from ruvon import LLM, SamplingParams

    with LLM() as llm:
        for completions in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
            print(completions[0].text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruvon.async_llm import AsyncLLM
    from ruvon.completion import Completion
    from ruvon.deltas import Delta
    from ruvon.engine.types import SamplingParams, TextOptions
    from ruvon.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM", "AsyncLLM", "Completion", "Delta", "SamplingParams", "TextOptions", "__version__",
]  # fmt: skip

HOMES = {
    "LLM": "ruvon.llm",
    "AsyncLLM": "ruvon.async_llm",
    "Completion": "ruvon.completion",
    "Delta": "ruvon.deltas",
    "SamplingParams": "ruvon.engine.types",
    "TextOptions": "ruvon.engine.types",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``ruvon --help`` does not wait for torch."""
    if name not in HOMES:
        raise AttributeError(f"module 'ruvon' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

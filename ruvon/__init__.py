"""A small, fast LLM inference engine and OpenAI-compatible server.

::

    from ruvon import LLM, SamplingParams

    for completions in LLM().generate(["The capital of France is"], SamplingParams(max_tokens=8)):
        print(completions[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ruvon.engine.types import SamplingParams
    from ruvon.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``ruvon --help`` does not wait for torch."""
    if name == "LLM":
        from ruvon.llm import LLM

        return LLM
    if name == "SamplingParams":
        from ruvon.engine.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'ruvon' has no attribute {name!r}")

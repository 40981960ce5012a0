"""The clients that `make clients` runs: how each is installed, started and told what to find."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
HARMONY = "-harmony"  # ends the names of clients that talk to a model which speaks harmony


@dataclass(frozen=True)
class Client:
    """``packages`` are those whose versions the report tells. ``tests`` run in the environment of
    ``requirements`` (pip) or ``folder`` (npm); an agent's run in this one and start its program."""

    name: str
    kind: Literal["python", "node", "agent"]
    packages: tuple[str, ...]
    tests: str
    exercised: str
    requirements: str | None = None
    folder: str | None = None
    program: str | None = None  # within the environment
    script: str = "obedient"
    seconds: float = 600.0
    environment: dict[str, str] = field(default_factory=dict)


def python(name: str, packages: tuple[str, ...], exercised: str, **options: str) -> Client:
    file = name.removesuffix(HARMONY)
    return Client(
        name, "python", packages, f"python/test_{file.replace('-', '_')}.py", exercised,
        requirements=f"python/{file}.txt", **options,
    )  # fmt: skip


def node(name: str, packages: tuple[str, ...], exercised: str) -> Client:
    return Client(
        name,
        "node",
        packages,
        f"node/{name.removeprefix('npm-')}.test.mjs",
        exercised,
        folder="node",
    )


def agent(name: str, package: str, program: str, exercised: str, **options: str) -> Client:
    file = name.removesuffix(HARMONY).replace("-", "_")
    return Client(
        name, "agent", (package,), f"agents/test_{file}.py", exercised,
        program=program, script=name, seconds=900, **options,
    )  # fmt: skip


CLIENTS = (
    python(
        "openai", ("openai",),
        "sync, async and aiohttp transports; strict validation; chat, completions, responses,"
        " embeddings; parse, stream helpers, tool loops, errors",
    ),
    python("anthropic", ("anthropic",), "messages, stream helper, tools, count_tokens, models"),
    python("openai-agents", ("openai-agents",), "tool loop over chat and over responses"),
    python(
        "openai-agents-harmony", ("openai-agents",), "the same with a model that speaks harmony",
        script="obedient-harmony",
    ),
    python(
        "langchain", ("langchain-openai", "langchain-tests"),
        "langchain-tests' standard integration tests over chat and over responses",
        script="langchain",
    ),
    python("instructor", ("instructor",), "tools, JSON and JSON schema modes; lists; streaming"),
    python("pydantic-ai", ("pydantic-ai-slim",), "agent: tools, typed output; three dialects"),
    python("litellm", ("litellm",), "chat, stream, tools, responses, messages, embeddings"),
    python("llama-index", ("llama-index-llms-openai-like",), "chat, complete, stream, tools"),
    python(
        "schemathesis", ("schemathesis",),
        "every operation of `/openapi.json`: what it allows and what it does not; no server error,"
        " no answer but those the document says",
    ),
    python("lm-eval", ("lm-eval",), "log-likelihoods by echo and logprobs; generation; perplexity"),
    node("npm-openai", ("openai",), "chat, stream helper, parse, runTools, responses, errors"),
    node(
        "npm-ai", ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "@ai-sdk/anthropic"),
        "generateText, streamText, typed output and tool loops, over three providers",
    ),
    node("npm-anthropic", ("@anthropic-ai/sdk",), "messages, stream helper, tools, count_tokens"),
    agent(
        "codex", "@openai/codex", "node_modules/.bin/codex",
        "`codex exec` over responses: shell, custom apply_patch with its grammar, compaction",
        folder="agents/codex",
    ),
    agent(
        "codex-harmony", "@openai/codex", "node_modules/.bin/codex",
        "the same with a model that speaks harmony",
        folder="agents/codex",
    ),
    agent(
        "claude-code", "@anthropic-ai/claude-code", "node_modules/.bin/claude",
        "`claude -p` over messages: Read, Edit, Read",
        folder="agents/claude-code",
    ),
    agent(
        "opencode", "opencode-ai", "node_modules/.bin/opencode",
        "`opencode run` over chat, responses and messages: read, edit, read",
        folder="agents/opencode",
    ),
    Client(
        "openai-harmony", "agent", ("openai-harmony",), "agents/test_openai_harmony.py",
        "no client: prompts and answers of gpt-oss, with its whole vocabulary, against its library",
        requirements="agents/openai-harmony.txt", program="bin/python",
    ),
    agent(
        "aider", "aider-chat", "bin/aider",
        "`aider --message` over chat, streamed and whole: edits by its diff format",
        requirements="agents/aider.txt",
    ),
)  # fmt: skip

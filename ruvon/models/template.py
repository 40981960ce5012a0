"""Chat templates: Jinja as model authors write it, in a sandbox.

A template comes with a model, so it is not trusted: it sees plain JSON data and nothing else, can
change nothing, and is cut off when it loops too long or writes too much. The environment offers
what templates of Hugging Face models expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import jinja2
import structlog
from jinja2 import meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from ruvon.errors import RequestError
from ruvon.models.template_cost import METER, Meter, MeteredEnvironment, SlowTemplateError

log = structlog.get_logger(__name__)

MOST_SAID = 1000  # characters of what a template says against a conversation
MOST_SOURCE = 1 << 20  # characters of a template


class GenerationBlocks(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it mutable)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@dataclass(frozen=True, slots=True)
class CompiledTemplate:
    """A template, and the variables that it looks up."""

    template: jinja2.Template
    variables: frozenset[str]


def compile_template(source: str) -> CompiledTemplate:
    """Raises jinja2.TemplateSyntaxError, which knows the line."""
    if len(source) > MOST_SOURCE:
        raise jinja2.TemplateSyntaxError(f"it has more than {MOST_SOURCE} characters", 1)
    try:
        return _compile(source)
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        reason = f"it cannot be compiled ({type(error).__name__})"
        raise jinja2.TemplateSyntaxError(reason, 1) from None


def _compile(source: str) -> CompiledTemplate:
    environment = MeteredEnvironment(
        {"tojson": _tojson},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[LoopControlExtension, GenerationBlocks],
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    del environment.globals["lipsum"]  # writes as much as it is asked to
    parsed = environment.parse(source)
    variables = frozenset(meta.find_undeclared_variables(parsed))
    return CompiledTemplate(environment.from_string(parsed), variables)


@dataclass(frozen=True, slots=True)
class BrokenTemplate:
    """Stands for a template that does not compile."""

    reason: str
    variables: frozenset[str] = frozenset()


Template: TypeAlias = CompiledTemplate | BrokenTemplate


def compile_own(name: str, source: str) -> Template:
    """A model's own template. That one is broken is said now, but counts only once it is used."""
    try:
        return compile_template(source)
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
        log.warning("broken_chat_template", template=name, reason=reason)
        return BrokenTemplate(reason)


def render_template(template: Template, variables: Mapping[str, Any]) -> str:
    """Raises RequestError with what the template says against the conversation, or what is wrong
    with itself; `SlowTemplateError` where it takes longer than `PATIENCE` has it."""
    if isinstance(template, BrokenTemplate):
        raise RequestError(
            f"The chat template of this model is broken, {template.reason}. Give another with"
            " --chat-template, or use completions.",
            param="messages",
            code="unsupported_value",
        )
    pieces, size, meter = [], 0, Meter()
    try:
        for piece in template.template.generate({**variables, METER: meter}):
            pieces.append(piece)
            size += len(piece)
            meter.check_written(size)
        return "".join(pieces)
    except SlowTemplateError:
        raise
    except Exception as error:  # a template can raise whatever its expressions raise
        raise RequestError(
            f"The chat template failed: {str(error)[:MOST_SAID]}", param="messages"
        ) from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, leaves ``<``, ``>`` and letters of all scripts as they are."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)

"""What rendering a template may cost: processor time, and the size of all that it makes.

Jinja's sandbox keeps a template from what is not its own, not from looping for ever or from
doubling a text forty times. So here every turn of a loop, call, filter, operator and piece of
output passes by a `Meter`, which looks at the clock and weighs what came of it. What a single
operation makes out of things so bounded is bounded as well, so there is always a next look.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import wraps
from time import thread_time
from typing import Any, cast

import jinja2
from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST = 1 << 25  # characters, of all output and of each value as text; beyond any context window
MOST_SECONDS = 2.0  # of processor time
LOOK_EVERY = 64  # steps between looks at the clock
MOST_BITS = 4096  # of a whole number
OTHER = 16  # what a number and the like weighs
MOST_HELD = 1 << 18  # parts of values whose weights are remembered

PATIENCE: ContextVar[float] = ContextVar("patience", default=MOST_SECONDS)
"""Seconds that whoever renders can spare; beyond them comes `SlowTemplateError`."""

METER = " meter"  # among a template's variables; none that it can name


class SlowTemplateError(Exception):
    """Rendering takes longer than whoever asked can wait: to be done elsewhere."""


def too_large() -> jinja2.TemplateError:
    return jinja2.TemplateError(f"it made a value of more than {MOST} characters")


class Meter:
    """What one rendering has cost so far. Its methods raise `jinja2.TemplateError` beyond the
    bounds."""

    def __init__(self) -> None:
        self._patience = min(PATIENCE.get(), MOST_SECONDS)
        self._began = thread_time()
        self._steps = self._written = self._held = 0
        self._weights: dict[int, tuple[object, int]] = {}  # by the id of what is held beside it

    def step(self) -> None:
        self._steps += 1
        if self._steps % LOOK_EVERY == 0 and thread_time() - self._began > self._patience:
            if self._patience < MOST_SECONDS:
                raise SlowTemplateError
            raise jinja2.TemplateError(f"it took more than {MOST_SECONDS:g} seconds")

    def write(self, value: Any) -> str:
        """A piece of output, as text."""
        self.step()
        if type(value) is not str:
            self.weigh(value)
            value = str(value)
        text: str = value
        self._written += len(text)
        self.check_written(self._written)
        return text

    def check_written(self, size: int) -> None:
        if size > MOST:
            raise jinja2.TemplateError(f"it wrote more than {MOST} characters")

    def made(self, value: Any, weight: int | None = None) -> Any:
        """``value``, which a step has made. Its weight need not be found where it is known."""
        self.step()
        if weight is not None and not isinstance(value, str):
            self._remember(value, weight, len(value))
        elif not isinstance(value, Namespace) and self.weigh(value) > MOST:
            raise too_large()
        return value

    def weigh(self, value: Any) -> int:
        """About as many characters as a value has as text: what is in it twice weighs twice,
        though memory has it once."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Namespace):
            raise jinja2.TemplateError("a namespace is no value")
        if isinstance(value, range):
            return OTHER * len(value)
        if not isinstance(value, Collection):
            return OTHER
        if (known := self._weights.get(id(value))) is not None:
            return known[1]
        parts: Collection[Any] = value
        if isinstance(value, Mapping):
            parts = [*value, *value.values()]
        weight = OTHER + sum([2 + self.weigh(part) for part in parts])
        self._remember(value, weight, len(parts))
        return weight

    def _remember(self, value: Any, weight: int, num_parts: int) -> None:
        if weight > MOST:
            raise too_large()
        self._held += num_parts
        if self._held > MOST_HELD:
            self._held = num_parts
            self._weights.clear()
        self._weights[id(value)] = value, weight

    def grown(self, value: Any, by: Iterable[Any]) -> None:
        """Before ``value`` is repeated or padded, or something is put between its parts."""
        sizes = (abs(each) if isinstance(each, int) else self.weigh(each) for each in by)
        if self.weigh(value) * max(sizes, default=0) > MOST:
            raise too_large()


def meter_of(context: Context) -> Meter:
    return cast(Meter, context.resolve(METER))


# ----------------------------------------------------------------------- what passes by a meter

GROWS = frozenset(
    {
        "batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "round",
        "slice", "tojson", "wordwrap", "zfill",
    }
)  # fmt: skip
"""Filters and methods of texts whose result can be much larger than what goes in."""

FORMATS = frozenset({"format", "format_map"})
WIDE = re.compile(r"\d{5}|\{[^{}]*:[^{}]*\{|%[-+ #0\d.]*\*")
"""In a format: a huge width, or one that comes with the values."""

WITHOUT = ("urlize", "xmlattr", "pprint", "random")
"""Filters that no chat needs; the first is slow on purpose-made texts."""

EACH, MADE, JOINED = "each ", "made ", "joined "  # filters that no template can name


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates pay for what they do."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """``filters`` beside Jinja's, or instead of them."""
        super().__init__(**options, finalize=pass_context(_write))
        for name in WITHOUT:
            del self.filters[name]
        self.filters |= filters
        for name, function in list(self.filters.items()):
            self.filters[name] = _metered(name, function)
        self.filters |= {EACH: _each, MADE: _made, JOINED: _joined}

    def _parse(self, *source: Any) -> nodes.Template:
        parsed: nodes.Template = Metering().visit(super()._parse(*source))
        return parsed

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter, weight = meter_of(context), None
        if operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            weight = meter.weigh(left) + meter.weigh(right)
        elif operator == "*" and isinstance(left, int) != isinstance(right, int):
            number, value = (left, right) if isinstance(left, int) else (right, left)
            meter.grown(value, [number])
        elif operator == "%" and isinstance(left, str):
            check_format(left)
        elif operator == "**":
            check_power(left, right)
        return meter.made(check_whole(super().call_binop(context, operator, left, right)), weight)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter, name = meter_of(context), getattr(obj, "__name__", "")
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str) and name in GROWS:
            meter.grown(owner or " ", [*args, *kwargs.values()])
        elif isinstance(owner, str) and name in FORMATS:
            check_format(owner)
        return meter.made(super().call(context, obj, *args, **kwargs))


def check_format(text: str) -> None:
    if WIDE.search(text):
        raise jinja2.TemplateError("a format has a width of more than 9999, or one from outside")


def check_power(base: Any, exponent: Any) -> None:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and base.bit_length() * abs(exponent) > MOST_BITS:
        raise too_large()


def check_whole(value: Any) -> Any:
    """``value``, if it is no number that takes long to compute with or to write."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise too_large()
    return value


def _write(context: Context, value: Any) -> str:
    return meter_of(context).write(value)


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that passes by the meter."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @wraps(function)
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = meter_of(context)
        if name in GROWS:
            value = value if isinstance(value, str | Mapping) else _listed(value)
            meter.grown(value or " ", [*args, *kwargs.values()])
        elif name == "format":
            check_format(str(value))
        first = passed(wanted, context)
        return meter.made(function(*first, value, *args, **kwargs))

    run.jinja_pass_arg = pass_context(lambda: None).jinja_pass_arg  # type: ignore[attr-defined]
    return run


def passed(wanted: str, context: Context) -> list[Any]:
    """What some filters want before their value."""
    if wanted == "context":
        return [context]
    if wanted == "eval_context":
        return [context.eval_ctx]
    return [context.environment] if wanted == "environment" else []


def _listed(value: Any) -> Any:
    """What can be gone through just once, as a list."""
    return list(value) if isinstance(value, Iterator) else value


@pass_context
def _each(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    step = meter_of(context).step
    for value in values:
        step()
        yield value


@pass_context
def _made(context: Context, value: Any) -> Any:
    return meter_of(context).made(value)


@pass_context
def _joined(context: Context, *values: Any) -> str:
    meter = meter_of(context)
    for value in values:
        meter.weigh(value)
    text: str = meter.made("".join([str(value) for value in values]))
    return text


class Metering(NodeTransformer):
    """Puts the filters above into a template: around what loops go through, around what is built of
    parts, and instead of ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, EACH)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filtered(self.generic_visit(node), MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _filtered(self.generic_visit(node), MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, MADE) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node.nodes[0], JOINED, node.nodes[1:])

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self._visit_buffered(node)
        node.filter = _filtered(node.filter, MADE)
        return node

    def _visit_buffered(self, node: nodes.Node) -> nodes.Node:
        """What is written into a value. A template's own words are made constants there, which
        pass by the meter as all output does; elsewhere, who renders counts them."""
        for data in node.find_all(nodes.Output):
            data.nodes = [_constant(each) for each in data.nodes]
        return self.generic_visit(node)

    visit_Macro = visit_CallBlock = visit_FilterBlock = _visit_buffered


def _constant(node: nodes.Expr) -> nodes.Expr:
    if isinstance(node, nodes.TemplateData):
        return nodes.Const(node.data, lineno=node.lineno)
    return node


def _filtered(node: Any, name: str, args: Iterable[nodes.Expr] = ()) -> nodes.Filter:
    line = node.lineno if node is not None else 0
    return nodes.Filter(node, name, list(args), [], None, None, lineno=line)

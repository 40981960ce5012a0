"""What an answer in harmony must be: reasoning as the model likes, then what a client asks for.

The grammar holds headers too, so within it none is malformed. It begins where the prompt ends, as
a rule behind ``<|start|>assistant``. The end of a call and of an answer is the end of generation,
which every grammar that is complete allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ruvon.grammars import Grammar
from ruvon.models.formats.grammar import LONGEST, Rules, any_text, quote
from ruvon.models.formats.harmony import ANALYSIS, ANSWER, COMMENTARY, Callee, Mark
from ruvon.models.formats.tools import Tool, ToolChoice


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks of an answer. ``callees`` may be called, by the names that headers have;
    ``response`` is the form of what is no call; reasoning is of at most ``budget`` tokens. The
    prompt has ``opened`` the assistant's turn, and perhaps ``begun`` the final message."""

    callees: Mapping[str, Callee]
    choice: ToolChoice
    response: Grammar | None = None
    budget: int | None = None
    opened: bool = True
    begun: bool = False

    @property
    def param(self) -> str:
        """What is most likely at fault if the grammar is."""
        if self.response is not None and self.choice.mode != "required":
            return self.response.param
        params = {callee.tool.param for callee in self.callees.values()}
        return params.pop() if len(params) == 1 else "tools"

    @property
    def must_match(self) -> bool:
        """Whether calls are held to their schemas though the model is free to call or not."""
        strict = any(callee.tool.strict for callee in self.callees.values())
        return bool(self.callees) and (strict or bool(self.choice.names))


def grammar_of(
    wanted: Wanted, tokens: Mapping[str, int], special: frozenset[int], size: int
) -> Grammar | None:
    """None if the model is free. ``tokens`` are the marks' ids; no text has ``special`` ones; all
    are below ``size``."""
    if wanted.begun:
        return wanted.response
    rules = Rules(tokens, special, size)
    if (answer := _answer(rules, wanted)) is None:
        return None
    if not wanted.opened:
        answer = f'{rules.mark(Mark.START)} "assistant" {answer}'
    return Grammar(answer, rules.text(), wanted.param)


def _answer(rules: Rules, wanted: Wanted) -> str | None:
    lead = _reasoning(rules, wanted.budget)
    if wanted.callees and wanted.choice.mode == "required":
        return f"{lead} ({_calls(rules, wanted)})"
    if wanted.response is not None:
        answer = _message(rules, ANSWER, rules.include(wanted.response))
        if wanted.callees:
            answer = f"{answer} | {_calls(rules, wanted)}"
        return f"{lead} ({answer})"
    if not wanted.must_match and wanted.budget is None:
        return None
    text = any_text(rules)
    ends = [_message(rules, ANSWER, text)]
    if wanted.callees:
        ends.append(_calls(rules, wanted))
        preamble = rules.rule(_passing(rules, COMMENTARY, text))
        # Without a budget reasoning and what is said may take turns.
        lead = f"({rules.rule(_passing(rules, ANALYSIS, text))} | {preamble})*" if (
            wanted.budget is None
        ) else f"{lead} {preamble}*"  # fmt: skip
    return f"{lead} ({' | '.join(ends)})"


def _reasoning(rules: Rules, budget: int | None) -> str:
    """Messages of reasoning: any number, or one of at most ``budget`` tokens."""
    if budget == 0:
        return ""
    if budget is None:
        return f"{rules.rule(_passing(rules, ANALYSIS, any_text(rules)))}*"
    text = f"{rules.tokens(of_text=True)}{{0,{min(budget, LONGEST)}}}"
    return f"{rules.rule(_passing(rules, ANALYSIS, text))}?"


def _message(rules: Rules, channel: str, body: str) -> str:
    """A message whose header names nothing but its channel."""
    return f"{rules.mark(Mark.CHANNEL)} {quote(channel)} {rules.mark(Mark.MESSAGE)} {body}"


def _passing(rules: Rules, channel: str, body: str) -> str:
    """A message that another follows."""
    begin = f'{rules.mark(Mark.START)} "assistant"'
    return f"{_message(rules, channel, body)} {rules.mark(Mark.END)} {begin}"


def _calls(rules: Rules, wanted: Wanted) -> str:
    """One call, of any that may be called. The model writes who is called on either side of the
    channel, as it was trained to."""
    channel, message = rules.mark(Mark.CHANNEL), rules.mark(Mark.MESSAGE)
    form = f'(" "? {rules.mark(Mark.CONSTRAIN)} "json" | " json")?'
    calls = []
    for recipient, callee in wanted.callees.items():
        where = COMMENTARY if recipient.startswith("functions.") else ANALYSIS
        to = quote(f" to={recipient}")
        body = _argument(rules, callee)
        header = rules.rule(
            f"({channel} {quote(where)} {to} | {to} {channel} {quote(where)}) "
            f"{'' if callee.raw else form} {message}"
        )
        calls.append(rules.rule(f"{header} {body}"))
    return " | ".join(calls)


def _argument(rules: Rules, callee: Callee) -> str:
    if not callee.raw:
        return rules.arguments(callee.tool)
    syntax = callee.tool.syntax
    return any_text(rules) if syntax is None else rules.include(syntax)


def raw_tool(tools: Sequence[Tool], choice: ToolChoice) -> Tool | None:
    """The custom tool that has to be called, and no other: it takes its text as it is."""
    forced = choice.mode == "required" and len(tools) == 1 and tools[0].custom
    return tools[0] if forced else None

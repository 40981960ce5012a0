"""Tool calls in streams: id and name once, then pieces of arguments."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import chat, chat_chunks, parse
from ruvon.doctor.check import collect
from ruvon.doctor.expect import expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.groups.chat_stream import choices_of
from ruvon.doctor.groups.tools import REQUIRED, WEATHER_ONLY, check_arguments
from ruvon.doctor.probe import Probe

FIRST = {"index": int, "id": not_empty, "type": "function", "function": {"name": not_empty}}
PIECE = {"index": int, "function": {"arguments": str}}


async def _pieces(probe: Probe, fields: Any = REQUIRED) -> list[Any]:
    """All deltas of calls, in order."""
    choices = choices_of(await chat_chunks(probe, **fields))
    found = [piece for choice in choices for piece in choice["delta"].get("tool_calls") or ()]
    expect(found, "deltas of calls", choices)
    return found


def assemble(pieces: list[Any]) -> list[tuple[str, str]]:
    """Name and arguments of each call, as clients put them together."""
    calls: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        name, arguments = calls.get(piece["index"], ("", ""))
        function = piece.get("function") or {}
        more = function.get("name") or "", function.get("arguments") or ""
        calls[piece["index"]] = (name + more[0], arguments + more[1])
    return [calls[index] for index in sorted(calls)]


def _first(pieces: list[Any]) -> list[Any]:
    """The first delta of each call."""
    seen: dict[int, Any] = {}
    for piece in pieces:
        seen.setdefault(piece["index"], piece)
    return list(seen.values())


async def first_delta(probe: Probe) -> None:
    """The first delta of a call has index, id, type and name."""
    expect_shape(_first(await _pieces(probe)), [FIRST], "first deltas")


async def first_arguments(probe: Probe) -> None:
    """Its arguments are a string, perhaps empty."""
    expect_shape(_first(await _pieces(probe)), [PIECE], "first deltas")


async def later_deltas(probe: Probe) -> None:
    """Later ones have index and arguments."""
    expect_shape(await _pieces(probe), [PIECE], "deltas")


async def id_once(probe: Probe) -> None:
    """The id comes once for each call."""
    pieces = await _pieces(probe)
    ids = [piece["id"] for piece in pieces if piece.get("id")]
    expect_equal(len(ids), len({piece["index"] for piece in pieces}), "ids")


async def name_once(probe: Probe) -> None:
    """So does the name."""
    pieces = await _pieces(probe)
    names = [piece for piece in pieces if piece["function"].get("name")]
    expect_equal(len(names), len({piece["index"] for piece in pieces}), "names")


async def indices(probe: Probe) -> None:
    """Calls are counted from 0."""
    found = [piece["index"] for piece in _first(await _pieces(probe))]
    expect_equal(found, list(range(len(found))), "indices")


async def in_pieces(probe: Probe) -> None:
    """Arguments come in several pieces."""
    pieces = [p for p in await _pieces(probe) if p["function"].get("arguments")]
    expect(len(pieces) > 2, "several pieces", pieces)


async def arguments(probe: Probe) -> None:
    """Put together they are JSON and fit the schema."""
    for name, text in assemble(await _pieces(probe)):
        check_arguments(name, text)


async def as_whole(probe: Probe) -> None:
    """At temperature 0 name and arguments are those of the whole answer."""
    whole = (await chat(probe, **REQUIRED))["choices"][0]["message"]["tool_calls"]
    wanted = [(call["function"]["name"], call["function"]["arguments"]) for call in whole]
    expect_equal(assemble(await _pieces(probe)), wanted, "calls")


async def named_arguments(probe: Probe) -> None:
    """So they are where tool_choice names the function."""
    for name, text in assemble(await _pieces(probe, WEATHER_ONLY)):
        expect_equal(name, "get_weather", "name")
        parse(text)


async def finish(probe: Probe) -> None:
    """The finish_reason is tool_calls, in a chunk with an empty delta."""
    last = choices_of(await chat_chunks(probe, **REQUIRED))[-1]
    expect_equal((last["finish_reason"], last["delta"]), ("tool_calls", {}), "the last choice")


async def no_content(probe: Probe) -> None:
    """Calls that are required come without content."""
    choices = choices_of(await chat_chunks(probe, **REQUIRED))
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    expect(not text.strip(), "no content", text)


async def role_first(probe: Probe) -> None:
    """The first delta names the role here too."""
    first = choices_of(await chat_chunks(probe, **REQUIRED))[0]["delta"]
    expect_shape(first, {"role": "assistant"}, "the first delta")


async def n(probe: Probe) -> None:
    """With n, calls belong to the choice that their chunk names."""
    fields = REQUIRED | {"n": 2, "temperature": 1, "seed": 4}
    choices = choices_of(await chat_chunks(probe, **fields))
    for index in (0, 1):
        mine = [c["delta"].get("tool_calls") or [] for c in choices if c["index"] == index]
        for name, text in assemble([piece for pieces in mine for piece in pieces]):
            check_arguments(name, text)


CHECKS = collect("tools.stream", globals())

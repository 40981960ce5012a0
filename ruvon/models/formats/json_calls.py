"""Calls as JSON: objects of a name and arguments, as most models write them between markers."""

from __future__ import annotations

from ruvon.models.formats.reader import CallReader, NotACallError, ReadCalls, loads, settle
from ruvon.models.formats.scanner import Scanner, Waiting
from ruvon.models.formats.tools import Tool

ARGUMENTS = ("arguments", "parameters")  # models take one for the other
OTHER = ("type", "id")  # members that may come before the name, and say nothing


def read_json_calls(end: str = "", joints: str = "") -> ReadCalls:
    """A reader of one object or a list of them, and then of the marker ``end``, which models may
    forget. Objects without a list follow each other after one of the ``joints``."""

    def read(calls: CallReader) -> Waiting[None]:
        scanner = calls.scanner
        if (yield from scanner.spaces()) == "[":
            scanner.at += 1
            yield from _read_list(calls)
        else:
            yield from _read_object(calls)
            while joints and (yield from _joined(scanner, joints)):
                yield from _read_object(calls)
        if end:
            yield from scanner.close(end)
        scanner.drop()

    return read


def _joined(scanner: Scanner, joints: str) -> Waiting[bool]:
    """Whether another object follows."""
    begin, following = scanner.at, (yield from scanner.spaces())
    if following and following in joints:
        scanner.at += 1
        following = yield from scanner.spaces()
    if following != "{":
        scanner.at = begin
    return following == "{"


def _read_list(calls: CallReader) -> Waiting[None]:
    scanner = calls.scanner
    while True:
        yield from scanner.spaces()
        yield from _read_object(calls)
        if (yield from scanner.spaces()) != ",":
            yield from scanner.take("]")
            return
        scanner.at += 1


def _read_object(calls: CallReader) -> Waiting[None]:
    """One call. Its name makes it one, so arguments before that are held back."""
    scanner = calls.scanner
    tool: Tool | None = None
    held: str | None = None
    if not (yield from scanner.take("{")):
        raise NotACallError
    while (key := (yield from _next_key(scanner))) is not None:
        if key == "name":
            tool = calls.tool(loads((yield from _value(scanner))))
        elif key in OTHER:
            yield from _value(scanner)
        elif key not in ARGUMENTS:
            raise NotACallError
        elif tool is None or held is not None:
            held = yield from _value(scanner)
        else:
            calls.begin(tool)
            yield from calls.arguments(tool)
            yield from _skip_members(scanner)
            break
    else:
        if tool is None:
            raise NotACallError
        calls.begin(tool)
        calls.argue(settle(held or "", tool))
    scanner.drop()
    calls.end()


def _next_key(scanner: Scanner) -> Waiting[str | None]:
    """The name of an object's next member, read with the colon; None if the object has ended."""
    if (yield from scanner.spaces()) == ",":
        scanner.at += 1
        yield from scanner.spaces()
    if (yield from scanner.take("}")):
        return None
    if (yield from scanner.peek()) != '"':
        raise NotACallError
    key = loads((yield from _value(scanner)))
    yield from scanner.spaces()
    if not (yield from scanner.take(":")):
        raise NotACallError
    yield from scanner.spaces()
    return str(key)


def _skip_members(scanner: Scanner) -> Waiting[None]:
    """Read the rest of an object, as far as it is there."""
    while (following := (yield from scanner.spaces())) and following in ',"':
        if (yield from _next_key(scanner)) is None:
            return
        yield from _value(scanner)
    yield from scanner.take("}")


def _value(scanner: Scanner) -> Waiting[str]:
    begin = scanner.at
    if not (yield from scanner.value()):
        raise NotACallError
    return scanner.text[begin : scanner.at]

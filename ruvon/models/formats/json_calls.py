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
            yield from scanner.spaces()
            yield from scanner.take(end)
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
    begun = False
    if not (yield from scanner.take("{")):
        raise NotACallError
    while (yield from scanner.spaces()) == '"':
        key = yield from _read_key(scanner)
        begin = scanner.at
        if key == "name" and tool is None:
            yield from _read_value(scanner)
            tool = calls.tool(loads(scanner.text[begin : scanner.at]))
        elif key in ARGUMENTS and tool is not None and not begun and held is None:
            calls.begin(tool)
            begun = True
            yield from calls.arguments(tool)
        elif key in ARGUMENTS and held is None and not begun:
            yield from _read_value(scanner)
            held = scanner.text[begin : scanner.at]
        elif key in OTHER or begun:
            yield from _read_value(scanner)
        else:
            raise NotACallError
        if (yield from scanner.spaces()) == ",":
            scanner.at += 1
    if tool is None:
        raise NotACallError
    closed = yield from scanner.take("}")
    if not begun:
        if not closed:
            raise NotACallError
        calls.begin(tool)
        calls.argue(settle(held or "", tool))
    scanner.drop()
    calls.end()


def _read_key(scanner: Scanner) -> Waiting[object]:
    """A member's name and the colon after it."""
    begin = scanner.at
    yield from _read_value(scanner)
    key = loads(scanner.text[begin : scanner.at])
    if (yield from scanner.spaces()) != ":":
        raise NotACallError
    scanner.at += 1
    yield from scanner.spaces()
    return key


def _read_value(scanner: Scanner) -> Waiting[None]:
    if not (yield from scanner.value()):
        raise NotACallError

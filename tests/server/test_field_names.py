"""An error about a field names it as the request has it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from from_schema import spoilt, values
from hypothesis import HealthCheck, given, settings
from pydantic import TypeAdapter

from ruvon.errors import RequestError
from ruvon.server.openapi import OPERATIONS
from ruvon.server.parsing import parse
from ruvon.server.schemas import Fields

BODIES = {
    operation.body.__name__: operation.body
    for operation in OPERATIONS.values()
    if isinstance(operation.body, type) and issubclass(operation.body, Fields)
}


def place(sent: Any, param: str) -> bool:
    """Whether ``param`` is in ``sent``, or is a field that something in ``sent`` lacks."""
    *within, last = re.findall(r"[^.\[\]]+", param)
    for part in within:
        if isinstance(sent, list) and part.isdigit():
            sent = sent[int(part)]
        elif isinstance(sent, dict) and part in sent:
            sent = sent[part]
        else:
            return False
    return isinstance(sent, dict) or (isinstance(sent, list) and int(last) < len(sent))


@pytest.mark.parametrize("name", BODIES)
def test_it_is_in_the_request_or_missing_there(name):
    schema = TypeAdapter(BODIES[name]).json_schema()

    @settings(
        deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(spoilt(values(schema, schema.get("$defs", {}))))
    def send(sent: object) -> None:
        wrong = named_wrong(BODIES[name], sent)
        assert wrong is None or place(sent, wrong), (wrong, sent)

    send()


def named_wrong(kind: type[Fields], sent: Any) -> str | None:
    """The field that an error about a body names."""
    if not isinstance(sent, dict):
        return None
    try:
        parse(kind, sent)
    except RequestError as error:
        return error.param
    return None

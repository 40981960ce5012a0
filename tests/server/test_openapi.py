"""The document that describes the API, and what the server does with all that it allows."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from from_schema import spoilt, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from serving import Server, open_server

from ruvon.config import ServerConfig
from ruvon.server.app import ROUTES
from ruvon.server.keys import OPEN
from ruvon.server.openapi import OPERATIONS, document

DOCUMENT = document(keyed=False)
SHARED = DOCUMENT["components"]["schemas"]
BODIES = {path: operation for (_, path), operation in OPERATIONS.items() if operation.body}


def test_every_route_is_described_and_no_other():
    routes = {(route.method, re.sub(r":[^}]*", "", route.path)) for route in ROUTES}
    assert routes == set(OPERATIONS)
    assert len(routes) == len(ROUTES)


def test_the_document_holds_together():
    names = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT))
    assert set(names) <= set(SHARED)
    for schema in SHARED.values():
        Draft202012Validator.check_schema(schema)
    operations = [entry for entries in DOCUMENT["paths"].values() for entry in entries.values()]
    assert len({entry["operationId"] for entry in operations}) == len(OPERATIONS)
    assert not any("security" in entry for entry in operations)


def test_a_server_with_keys_says_so():
    keyed = document(keyed=True)
    assert set(keyed["components"]["securitySchemes"]) == {"bearer", "key"}
    for path, entries in keyed["paths"].items():
        for entry in entries.values():
            assert ("security" in entry) == (path not in OPEN)


async def test_it_is_served(serve):
    server = await serve("Hello", server=ServerConfig(port=0, api_key=("k",)))
    assert (await server.get("/openapi.json")).status == 401
    reply = await server.get("/openapi.json", headers={"x-api-key": "k"})
    assert reply.json["openapi"] == "3.1.0"
    assert reply.json["components"]["securitySchemes"]


@pytest.fixture(scope="module")
def live() -> Iterator[Server]:
    """A server that runs in a thread of its own, with a context too short to take long."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait_for(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    server = wait_for(open_server("Hello", numbers={"max_model_len": 64}))
    yield server
    wait_for(server.until(lambda: server.idle))  # nothing of what was asked is left behind
    wait_for(server.stack.aclose())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def send(server: Server, path: str, body: object) -> tuple[int, str, bytes]:
    """Status, media type and bytes of an answer, which must come."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    try:
        connection.request("POST", path, json.dumps(body).encode())
        response = connection.getresponse()
        return response.status, response.headers.get_content_type(), response.read()
    finally:
        connection.close()


def check(path: str, status: int, kind: str, body: bytes) -> None:
    """Hold an answer against the document."""
    answers = DOCUMENT["paths"][path]["post"]["responses"]
    assert status == 200 or 400 <= status < 500, (status, body)
    content = answers["200" if status == 200 else "4XX"]["content"][kind]
    if kind == "application/json":
        Draft202012Validator({**content["schema"], "components": {"schemas": SHARED}}).validate(
            json.loads(body)
        )


QUICKLY = settings(
    deadline=None, max_examples=30, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("path", BODIES)
def test_whatever_is_sent_is_answered_as_described(live, path):
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    described = values(body, SHARED)

    @QUICKLY
    @given(described | spoilt(described) | st.text())
    def ask(sent: object) -> None:
        check(path, *send(live, path, sent))

    ask()

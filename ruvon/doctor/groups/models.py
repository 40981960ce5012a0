"""The list of models."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

from ruvon.doctor.ask import answer, refusal
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.probe import Probe

MODEL = {"id": not_empty, "object": "model", "created": int, "owned_by": str}
ANTHROPIC = {"anthropic-version": "2023-06-01"}


async def _list(probe: Probe) -> list[Any]:
    listed = answer(await probe.get("/v1/models"))
    expect_shape(listed, {"object": "list", "data": list})
    data: list[Any] = listed["data"]
    return data


async def list_object(probe: Probe) -> None:
    """GET /v1/models is an object `list` with `data`."""
    await _list(probe)


async def list_not_empty(probe: Probe) -> None:
    """At least one model is listed."""
    expect(await _list(probe), "at least one model", [])


async def list_fields(probe: Probe) -> None:
    """Each model has id, object, created and owned_by."""
    expect_shape(await _list(probe), [MODEL])


async def list_unique(probe: Probe) -> None:
    """No id is listed twice."""
    ids = [model["id"] for model in await _list(probe)]
    expect_equal(len(set(ids)), len(ids), "distinct ids")


async def list_created_in_seconds(probe: Probe) -> None:
    """`created` is a Unix time in seconds, not in milliseconds and not in the future."""
    for model in await _list(probe):
        expect(0 <= model["created"] <= time.time() + 86400, "seconds", model["created"])


async def list_names_the_model(probe: Probe) -> None:
    """The model that is asked is in the list."""
    ids = [model["id"] for model in await _list(probe)]
    expect(probe.model in ids, probe.model, ids)


async def retrieve(probe: Probe) -> None:
    """GET /v1/models/{id} is the same object as in the list."""
    reply = await probe.get(f"/v1/models/{quote(probe.model)}")
    expect_equal(reply.status, 200, "status")
    listed = [model for model in await _list(probe) if model["id"] == probe.model]
    expect_shape(reply.json, MODEL)
    expect_equal(reply.json["id"], listed[0]["id"], "id")


async def retrieve_unknown(probe: Probe) -> None:
    """GET /v1/models/{id} of no model is a 404 with an error object."""
    refusal(await probe.get("/v1/models/no-such-model"), 404)


async def retrieve_unknown_code(probe: Probe) -> None:
    """That error's code is model_not_found."""
    refusal(await probe.get("/v1/models/no-such-model"), 404, code="model_not_found")


async def retrieve_with_slash(probe: Probe) -> None:
    """An id may hold a slash: of an unknown one it is told that the model is not there."""
    error = refusal(await probe.get("/v1/models/no/such-model"), 404)
    expect("no/such-model" in error["message"], "the model's name in the message", error)


async def method(probe: Probe) -> None:
    """POST /v1/models is a 405, or a 404, with an error object."""
    refusal(await probe.post("/v1/models", {}), 404, 405)


@optional
async def max_model_len(probe: Probe) -> None:
    """Each model tells its context as max_model_len."""
    expect_shape(await _list(probe), [{"max_model_len": int}])


@optional
async def anthropic_list(probe: Probe) -> None:
    """With an anthropic-version header the list has Anthropic's shape."""
    listed = answer(await probe.get("/v1/models", ANTHROPIC))
    model = {"type": "model", "id": str, "display_name": str, "created_at": str}
    edge = (str, None)
    shape = {"data": [model], "has_more": bool, "first_id": edge, "last_id": edge}
    expect_shape(listed, shape)


@optional
async def anthropic_edges(probe: Probe) -> None:
    """first_id and last_id of Anthropic's list are the ids of its ends."""
    listed = answer(await probe.get("/v1/models", ANTHROPIC))
    ends = [listed["first_id"], listed["last_id"]]
    expect_equal(ends, [listed["data"][0]["id"], listed["data"][-1]["id"]], "first and last id")


CHECKS = collect("models", globals())

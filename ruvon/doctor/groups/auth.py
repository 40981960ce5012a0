"""Keys. What can be asked depends on whether the server wants one."""

from __future__ import annotations

from ruvon.doctor.ask import CHAT, answer, refusal
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import Skipped, expect
from ruvon.doctor.probe import Probe, Reply

NONE = {"Authorization": ""}


async def _needed(probe: Probe) -> Reply:
    """The reply without a key, where one is needed."""
    reply = await probe.get("/v1/models", NONE)
    if reply.status == 200:
        raise Skipped("the server asks for no key")
    return reply


async def any_key_when_open(probe: Probe) -> None:
    """A server that asks for no key takes any: SDKs always send one."""
    if probe.api_key or (await probe.get("/v1/models", NONE)).status != 200:
        raise Skipped("the server asks for a key")
    answer(await probe.get("/v1/models", {"Authorization": "Bearer sk-anything"}))


async def no_key(probe: Probe) -> None:
    """Without a key there is a 401 with an error object."""
    refusal(await _needed(probe), 401)


async def no_key_for_chat(probe: Probe) -> None:
    """So it is for chat completions, before anything about the body is said."""
    await _needed(probe)
    refusal(await probe.post(CHAT, {"messages": 5}, NONE), 401)


async def wrong_key(probe: Probe) -> None:
    """A wrong key is a 401 with the code invalid_api_key."""
    await _needed(probe)
    reply = await probe.get("/v1/models", {"Authorization": "Bearer sk-wrong"})
    refusal(reply, 401, code="invalid_api_key")


async def wrong_key_not_repeated(probe: Probe) -> None:
    """The error does not repeat the key."""
    await _needed(probe)
    reply = await probe.get("/v1/models", {"Authorization": "Bearer sk-wrong-secret"})
    expect(b"sk-wrong-secret" not in reply.body, "no key in the error", reply.body.decode())


async def other_scheme(probe: Probe) -> None:
    """The key under another scheme than Bearer is none."""
    await _needed(probe)
    refusal(await probe.get("/v1/models", {"Authorization": f"Basic {probe.api_key}"}), 401)


async def www_authenticate(probe: Probe) -> None:
    """A 401 says WWW-Authenticate: Bearer."""
    found = (await _needed(probe)).headers.get("WWW-Authenticate", "none")
    expect(found.startswith("Bearer"), "Bearer", found)


@optional
async def x_api_key(probe: Probe) -> None:
    """Anthropic's header x-api-key holds a key as well."""
    await _needed(probe)
    if not probe.api_key:
        raise Skipped("no key was given (--api-key)")
    answer(await probe.get("/v1/models", NONE | {"x-api-key": probe.api_key}))


@optional
async def metrics_closed(probe: Probe) -> None:
    """/metrics needs the key too."""
    await _needed(probe)
    reply = await probe.get("/metrics", NONE)
    expect(reply.status in (401, 404), "401", reply.status)


@optional
async def live_open(probe: Probe) -> None:
    """/live needs none: a probe has no key."""
    await _needed(probe)
    reply = await probe.get("/live", NONE)
    if reply.status == 404:
        raise Skipped("GET /live is not offered (404)")
    expect(reply.status in (200, 503), "200", reply.status)


@optional
async def unknown_path_closed(probe: Probe) -> None:
    """A path that does not exist needs the key too: what is new is closed."""
    await _needed(probe)
    reply = await probe.get("/no-such-path", NONE)
    expect(reply.status in (401, 403), "401", reply.status)


CHECKS = collect("auth", globals())

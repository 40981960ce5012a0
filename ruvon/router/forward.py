"""A request's way: to a replica, to another one if that refuses or is lost, and its answer back."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog
from aiohttp import web
from multidict import CIMultiDict

from ruvon.errors import NotReadyError, UnavailableError
from ruvon.router.fleet import FLEET, Fleet
from ruvon.router.framing import Body, Head, Sized, Unsized, payload
from ruvon.router.link import Link, LostError
from ruvon.router.metrics import METRICS
from ruvon.router.prompt import Prompt, read_prompt
from ruvon.router.replica import Replica
from ruvon.server.events import DONE, error_event, event
from ruvon.server.failures import anthropic_error, ollama_error, openai_error
from ruvon.server.middleware import FACTS
from ruvon.server.receive import receive
from ruvon.server.threads import Aside

log = structlog.get_logger(__name__)

SMALL = 65_536  # bytes of a body that is understood at once
MOST_WHOLE = 1 << 20  # bytes of an answer that is sent when all of it is there
UNSENT = 262_144  # bytes that wait for a client, before no more is read of its replica
SESSION = "X-Session-Id"

READER = web.AppKey("reader", Aside)
"""The thread that understands large bodies. One, for each takes its turn at the interpreter's lock
before the event loop does, and has a body in memory as objects."""

HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade",
})  # fmt: skip
OWN_REQUEST = HOP_BY_HOP | {"content-length", "expect", "x-request-id", "x-forwarded-for"}
OWN_RESPONSE = HOP_BY_HOP | {"content-length", "date", "server", "x-request-id", "request-id"}
"""Headers that a router writes itself, or that end with each connection."""

STORED = re.compile(rb'"id": ?"((?:resp|cmp)_[^"]{1,100})"')
STREAM = re.compile(rb"^id: (\S{1,200}):\d+$", re.MULTILINE)


async def forward(http: web.Request) -> web.StreamResponse:
    """Answer with what a replica answers. Each is asked once at most: one that refuses for now or
    is lost leaves the request to the next, as long as its client has not been told anything."""
    fleet = http.app[FLEET]
    fleet.check_open()
    body = b"".join(await receive(http))
    prompt = await understand(http, body)
    request = request_bytes(http, body)
    refusals: list[web.Response] = []
    tried: set[Replica] = set()
    while (chosen := fleet.choose(prompt, http.headers.get(SESSION), tried)) is not None:
        replica, matched, reason = chosen
        tried.add(replica)
        http[FACTS].update(replica=replica.name, reason=reason)
        http.app[METRICS].record_choice(replica.name, reason)
        replica.in_flight += 1
        try:
            answer = await ask(http, fleet, replica, request, prompt, matched)
        except LostError as error:
            replica.prefixes.drop(prompt.keys[matched:])
            log.warning("replica_lost", name=replica.name, error=str(error))
        else:
            if (refused := refusal(answer, prompt)) is None:
                return answer
            replica.prefixes.drop(prompt.keys[matched:])
            refusals.append(refused)
        finally:
            replica.in_flight -= 1
        http.app[METRICS].record_retry(replica.name)
    if refusals:
        return min(refusals, key=patience)
    raise NotReadyError("No replica can answer now.", retry_after=1.0)


async def understand(http: web.Request, body: bytes) -> Prompt:
    """The prompt; of a large body not on the event loop's thread."""
    read = partial(read_prompt, http.path, http.headers, body)
    return read() if len(body) <= SMALL else await http.app[READER].run(read)


def request_bytes(http: web.Request, body: bytes) -> bytes:
    """The request as a replica gets it: the client's own, and who it is."""
    named = {name.strip().lower() for name in http.headers.get("Connection", "").split(",")}
    peers = [*http.headers.getall("X-Forwarded-For", ()), *([http.remote] if http.remote else ())]
    lines = [f"{http.method} {http.rel_url.raw_path_qs} HTTP/1.1".encode()]
    for name, value in http.raw_headers:
        if (small := name.decode("latin-1").lower()) not in OWN_REQUEST and small not in named:
            lines.append(name + b": " + value)
    lines.append(b"X-Request-Id: " + http[FACTS]["request_id"].encode())
    if peers:
        lines.append(b"X-Forwarded-For: " + ", ".join(peers).encode("latin-1", "replace"))
    if body or http.method not in ("GET", "HEAD"):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


async def ask(
    http: web.Request,
    fleet: Fleet,
    replica: Replica,
    request: bytes,
    prompt: Prompt,
    matched: int,
) -> web.StreamResponse:
    """What one replica answers. Raises LostError while the client has not been told anything."""
    try:
        link, head = await replica.ask(http.method, request)
    except LostError as error:
        if not error.begun and not replica.links:
            replica.lose()
        raise
    try:
        count_tokens(http, replica, head, prompt, matched)
        learn = learner(http, fleet, replica, head)
        body = link.body
        assert body is not None
        if isinstance(body, Sized) and body.left <= MOST_WHOLE:
            data = await link.collect(MOST_WHOLE)
            learn(data)
            return web.Response(status=head.status, body=data, headers=kept_headers(head))
        return await relay(http, link, head, body, learn)
    finally:
        replica.release(link)


def count_tokens(
    http: web.Request, replica: Replica, head: Head, prompt: Prompt, matched: int
) -> None:
    """Hold what was promised of the prompt against what the replica found of it."""
    tokens, cached = (head.get(f"x-ruvon-{which}-tokens") or "" for which in ("prompt", "cached"))
    if not (tokens.isdigit() and cached.isdigit() and prompt.size):
        return
    replica.learn_size(prompt.size, int(tokens))
    promised = round(int(tokens) * prompt.share(matched))
    http[FACTS].update(promised_tokens=promised, cached_tokens=int(cached))
    http.app[METRICS].record_tokens(promised, int(cached))


def learner(
    http: web.Request, fleet: Fleet, replica: Replica, head: Head
) -> Callable[[bytes], None]:
    """What looks at the beginning of an answer for the name of something that only this replica
    will have."""
    resumed = "X-Ruvon-Resume" in http.headers
    if head.status != 200 or not (resumed or http.path == "/v1/responses"):
        return lambda data: None
    pattern = STREAM if resumed else STORED

    def learn(data: bytes) -> None:
        if (match := pattern.search(data, 0, 4096)) is not None:
            fleet.holders.note(match[1].decode("latin-1"), replica)

    return learn


def refusal(answer: web.StreamResponse, prompt: Prompt) -> web.Response | None:
    """The answer, if another replica may have a better one."""
    if not isinstance(answer, web.Response) or not isinstance(answer.body, bytes):
        return None
    if b'"rate_limit_exceeded"' in answer.body:  # a key's limit is not multiplied
        return None
    said = {500: b'"engine_dead"', 429: b"", 503: b""}
    if prompt.held is not None:
        said |= {400: b"not_found", 404: b"not_found"}
    words = said.get(answer.status)
    return answer if words is not None and words in answer.body else None


def patience(refusal: web.Response) -> float:
    """Seconds that a client is asked to wait, by the last to be asked if it is about something
    that nobody has."""
    text = refusal.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 60.0


def kept_headers(head: Head) -> CIMultiDict[str]:
    """The replica's, but those that are the router's own."""
    return CIMultiDict((k, v) for k, v in head.headers if k.lower() not in OWN_RESPONSE)


class Relayed(web.StreamResponse):
    """A response whose bytes are the replica's. ``outcome`` is the status for logs and metrics."""

    outcome = 499


async def relay(
    http: web.Request, link: Link, head: Head, body: Body, learn: Callable[[bytes], None]
) -> web.StreamResponse:
    """Pass a body on as it comes. A replica that is lost on the way is told of as its API tells
    errors in mid-stream, or, where there is no telling, by ending the connection."""
    begun = await link.collect(0)  # until there is something, another replica may still answer
    learn(begun)
    response = Relayed(status=head.status, headers=kept_headers(head))
    if not body.chunked and not isinstance(body, Unsized):
        response.content_length = int(head.get("content-length") or 0)
    elif http.version >= (1, 1):
        response.enable_chunked_encoding()
    with suppress(ConnectionResetError):  # the client has left
        await response.prepare(http)
        sink = make_sink(http, body)
        if body.chunked and body.whole:  # as it is at a stream's first token, as a rule
            await response.write(payload(begun))  # in one piece with the head
        else:
            await response.write(b"")
            sink(begun)
        try:
            await link.relay(sink, http.writer.drain)
        except LostError as error:
            log.warning("stream_lost", replica=http[FACTS]["replica"], error=str(error))
            await break_off(http, response, head, body)
            response.outcome = 502
            return response
        await response.write_eof()
        response.outcome = head.status
    return response


def make_sink(http: web.Request, body: Body) -> Callable[[bytes], bool]:
    """What writes to the client, straight to its connection; False when enough waits for it."""
    transport = http.transport
    if transport is None:
        raise ConnectionResetError("the client has left")
    frame = framer(http, body)

    def sink(data: bytes) -> bool:
        if transport.is_closing():
            return True
        transport.write(frame(data))
        return transport.get_write_buffer_size() < UNSENT

    return sink


def framer(http: web.Request, body: Body) -> Callable[[bytes], bytes]:
    """As the client is to get it. Chunks stay as they are, but for HTTP/1.0, which has none."""
    if body.chunked and http.version < (1, 1):
        waiting: list[bytes] = []

        def unframe(data: bytes) -> bytes:
            waiting.append(data)
            if not body.whole:
                return b""
            framed = b"".join(waiting)
            waiting.clear()
            return payload(framed)

        return unframe
    if isinstance(body, Unsized) and http.version >= (1, 1):
        return lambda data: b"%x\r\n%s\r\n" % (len(data), data)
    return lambda data: data


async def break_off(http: web.Request, response: Relayed, head: Head, body: Body) -> None:
    """End an answer whose rest is lost, so that nobody takes it for a whole one."""
    kind = head.get("content-type") or ""
    if body.whole and body.chunked and kind.startswith(STREAMS):
        error = UnavailableError("The replica that was answering is lost.", retry_after=1.0)
        error.code = "replica_lost"
        await response.write(stream_error(http, error))
        await response.write_eof()
    elif http.transport is not None:
        http.transport.abort()


STREAMS = ("text/event-stream", "application/x-ndjson")


def stream_error(http: web.Request, error: UnavailableError) -> bytes:
    """A failure in mid-stream, as the API that was asked says it."""
    if http.path == "/v1/messages":
        return event(anthropic_error(error, http[FACTS]["request_id"]), "error")
    if http.path.startswith("/v1/responses"):
        told = openai_error(error)["error"]
        return event({"type": "error", "sequence_number": 0, **told, "error": told}, "error")
    if http.path.startswith("/api/"):
        return b'{"error":"%s"}\n' % str(ollama_error(error)["error"]).encode()
    return error_event(error) + DONE

"""What clients really send: a proxy that writes each request and its answer as a line of JSON."""

from __future__ import annotations

import time
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web

NOT_FORWARDED = {"host", "content-length", "transfer-encoding", "connection", "accept-encoding"}
MOST = 64 << 20


class Recorder:
    """Stands before the server at ``target``. Only for tests: it holds whole bodies."""

    def __init__(self, target: str, path: Path) -> None:
        self._target = target
        self._path = path

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MOST)
        app.add_routes([web.route("*", "/{path:.*}", self._forward)])
        app.cleanup_ctx.append(self._session)
        return app

    async def _session(self, app: web.Application):
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(timeout=timeout) as self._client:
            yield

    async def _forward(self, http: web.Request) -> web.StreamResponse:
        body = await http.read()
        headers = {k: v for k, v in http.headers.items() if k.lower() not in NOT_FORWARDED}
        async with self._client.request(
            http.method, self._target + http.path_qs, headers=headers, data=body or None
        ) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in NOT_FORWARDED}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(http)
            pieces = []
            async for piece in answer.content.iter_any():
                pieces.append(piece)
                await response.write(piece)
        self._write(http, body, answer, b"".join(pieces))
        return response

    def _write(
        self, http: web.Request, body: bytes, answer: aiohttp.ClientResponse, said: bytes
    ) -> None:
        line = {
            "time": time.time(),
            "method": http.method,
            "path": http.path_qs,
            "headers": {str(name): value for name, value in http.headers.items()},
            "body": parsed(body),
            "status": answer.status,
            "ignored": answer.headers.get("X-Ruvon-Ignored"),
            "answer": parsed(said),
        }
        with self._path.open("ab") as file:
            file.write(orjson.dumps(line) + b"\n")


def parsed(body: bytes) -> object:
    """JSON as its value, anything else as text."""
    try:
        return orjson.loads(body) if body else None
    except orjson.JSONDecodeError:
        return body.decode(errors="replace")

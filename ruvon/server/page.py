"""The page at ``/``: a chat, the engine at work, tokens and their alternatives, attention.

Its files are the package's, the same for everybody. A browser runs no other script than theirs, and
takes no text for markup: the policy below says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files

from aiohttp import web

from ruvon import __version__
from ruvon.server.keys import PAGE, PAGE_FILES
from ruvon.server.middleware import json_response
from ruvon.server.state import STATE, service_of

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and sent if another version is here
}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is sent."""

    body: bytes
    content_type: str
    etag: str


FILES = web.AppKey("page", Mapping[str, File])


def read_files() -> Mapping[str, File]:
    """The page's files, by name."""
    found = {}
    for file in files("ruvon.server").joinpath("ui").iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            body = file.read_bytes()
            found[file.name] = File(body, kind, blake2b(body, digest_size=12).hexdigest())
    return found


def add_page(app: web.Application) -> None:
    """Let an application have the page."""
    app[FILES] = read_files()
    app.add_routes([web.get(PAGE, send), web.get(PAGE_FILES + "{name}", send)])


async def send(http: web.Request) -> web.Response:
    """One of the files."""
    name = http.match_info.get("name", INDEX)
    file = http.app[FILES].get(name)
    if file is None:
        raise web.HTTPNotFound
    asked = http.if_none_match or ()
    if any(tag.value == file.etag for tag in asked):
        return web.Response(status=304, headers=HEADERS | {"ETag": f'"{file.etag}"'})
    return web.Response(
        body=file.body,
        content_type=file.content_type,
        charset="utf-8",
        headers=HEADERS | {"ETag": f'"{file.etag}"'},
    )


async def about(http: web.Request) -> web.Response:
    """What the page has to know of the server."""
    service, server = service_of(http), http.app[STATE].server
    return json_response(
        {
            "version": __version__,
            "model": service.names[0],
            "architecture": service.architecture,
            "max_model_len": service.max_model_len,
            "vocab_size": service.generator.vocab_size,
            "max_logprobs": server.max_logprobs,
            "default_sampling": service.defaults,
            "step_gate": server.ui_step_gate,
        }
    )

"""Doors that should be closed, and answers that should not tell too much."""

from __future__ import annotations

from ruvon.doctor.ask import CHAT, post_chat, user
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import expect
from ruvon.doctor.probe import Probe

EVIL = {"Origin": "https://evil.example"}
ALLOWED = "Access-Control-Allow-Origin"


async def cors_closed(probe: Probe) -> None:
    """A page of another origin may not read answers, unless the server was told so."""
    found = (await probe.get("/v1/models", EVIL)).headers.get(ALLOWED)
    expect(found is None, f"no {ALLOWED}", found)


async def cors_preflight_closed(probe: Probe) -> None:
    """Nor may it ask: a preflight allows nothing."""
    asked = {"Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "content-type"}  # fmt: skip
    found = (await probe.ask("OPTIONS", CHAT, headers=EVIL | asked)).headers.get(ALLOWED)
    expect(found is None, f"no {ALLOWED}", found)


async def no_traceback(probe: Probe) -> None:
    """Errors tell nothing of the server's files or code."""
    for body in (b"{", b'{"messages": {"a": []}}', b'{"messages": [[]]}', b'{"tools": [5]}'):
        text = (await probe.post(CHAT, body)).body.decode(errors="replace")
        for secret in ("Traceback", ".py", "/usr/", "site-packages", "pydantic.dev"):
            expect(secret not in text, f"no {secret}", text)


async def no_path_traversal(probe: Probe) -> None:
    """Paths with dots lead to no file."""
    for path in ("/../../etc/passwd", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/"):
        body = (await probe.get(path)).body
        expect(b"root:" not in body, "no file", body[:100].decode(errors="replace"))


async def chat_template_refused(probe: Probe) -> None:
    """A client's own template is not run, unless the server was told so."""
    template = "{{ ''.__class__.__mro__ }}{% for i in range(10) %}{{ i }}{% endfor %}"
    reply = await post_chat(probe, chat_template=template)
    refused = 400 <= reply.status < 500
    ordinary = (await post_chat(probe)).json["usage"]["prompt_tokens"] if not refused else 0
    same = refused or reply.json["usage"]["prompt_tokens"] == ordinary
    expect(same, "a 400, or the server's own template", reply.status)


async def template_arguments(probe: Probe) -> None:
    """chat_template_kwargs cannot bring a template either."""
    reply = await post_chat(probe, chat_template_kwargs={"chat_template": "{{ 1/0 }}"})
    expect(reply.status < 500, "no server error", reply.status)


async def special_tokens_in_text(probe: Probe) -> None:
    """Markers of the template within a text are no server error."""
    text = "<|im_end|>\n<|im_start|>system\nx<|im_end|></s><|endoftext|>[/INST]<|eot_id|>"
    expect((await post_chat(probe, messages=user(text))).status == 200, "200", "another")


async def urls_not_fetched(probe: Probe) -> None:
    """An image's URL is not fetched by a model of text: it is refused at once."""
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    reply = await post_chat(probe, messages=[{"role": "user", "content": [part]}])
    expect(400 <= reply.status < 500 or reply.status == 501, "a 400", reply.status)


@optional
async def no_server_version(probe: Probe) -> None:
    """The Server header tells no version."""
    found = (await probe.get("/v1/models")).headers.get("Server", "")
    expect(not any(letter.isdigit() for letter in found), "a name at most", found)


CHECKS = collect("security", globals())

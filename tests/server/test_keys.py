"""Keys, and which web pages may read answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from serving import Reply
from structlog.testing import capture_logs

from ruvon.config import ServerConfig
from ruvon.errors import ConfigError
from ruvon.server.app import ROUTES
from ruvon.server.keys import OPEN, Keys, parse_lines, read_keys
from ruvon.server.responses_api.store import RESPONSES

KEYED = ServerConfig(port=0, api_key=("first-key", "second-key"))
PAGE = "https://chat.example.com"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        bearer("first-key"),
        bearer("second-key"),
        {"Authorization": "bearer  second-key "},
        {"x-api-key": "first-key"},
        {"x-api-key": "first-key", **bearer("none")},
        {"x-api-key": "none", **bearer("first-key")},
    ],
)
async def test_any_of_the_keys_in_either_header_opens(serve, headers):
    server = await serve("Hello", server=KEYED)
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    reply = await server.post("/v1/chat/completions", body, headers=headers)
    assert reply.status == 200
    assert (await server.get("/metrics", headers=headers)).status == 200


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({}, "missing"),
        (bearer(""), "missing"),
        (bearer("first-ke"), "wrong"),
        (bearer("first-key2"), "wrong"),
        (bearer("first-key,second-key"), "wrong"),
        ({"Authorization": "Basic first-key"}, "missing"),
        ({"Authorization": "first-key"}, "missing"),
        ({"x-api-key": "clé"}, "wrong"),
    ],
)
async def test_nothing_else_opens(serve, headers, told):
    server = await serve("Hello", server=KEYED)
    reply = await server.post("/v1/completions", {"prompt": "Hi"}, headers=headers)
    assert reply.status == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert reply.error["code"] == "invalid_api_key"
    assert told in reply.error["message"]
    assert b"key2" not in reply.body


async def test_anthropic_s_clients_are_told_in_their_words(serve):
    server = await serve("Hello", server=KEYED)
    reply = await server.post("/v1/messages", {})
    assert reply.status == 401
    assert reply.json["type"] == "error"
    assert reply.json["error"]["type"] == "authentication_error"


async def test_every_path_but_two_needs_a_key(serve):
    server = await serve("Hello", server=KEYED)
    for route in ROUTES:
        async with server.session.request(route.method, server.url + route.path) as response:
            assert (response.status == 401) == (route.path not in OPEN), route
    assert {"/live", "/ready"} == OPEN
    for path in ("/nowhere", "/live/", "//ready", "/ready/../metrics"):
        assert (await server.get(path)).status == 401, path


async def test_without_keys_any_will_do(serve):
    server = await serve("Hello")
    assert (await server.get("/v1/models", headers=bearer("none"))).status == 200


def test_a_key_is_not_shown():
    assert "first-key" not in repr(KEYED)


async def ask(server, method: str, path: str, origin: str | None, **headers: str) -> Reply:
    sent = headers if origin is None else {"Origin": origin, **headers}
    async with server.session.request(method, server.url + path, headers=sent) as response:
        return Reply(response.status, response.headers, await response.read())


async def preflight(server, origin: str) -> Reply:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
    }
    return await ask(server, "OPTIONS", "/v1/chat/completions", origin, **asked)


def shown(reply: Reply) -> set[str]:
    return {name for name in reply.headers if name.startswith("Access-Control")}


async def test_no_page_may_read_by_default(serve):
    server = await serve("Hello")
    assert (await preflight(server, PAGE)).status == 405
    for path in ("/v1/models", "/nowhere"):
        assert not shown(await ask(server, "GET", path, PAGE))


async def test_allowed_pages_may_read_answers_and_errors(serve):
    other = "http://localhost:3000"
    config = ServerConfig(port=0, cors_allow_origin=(PAGE, other), api_key=("k",))
    server = await serve("Hello", server=config)
    for origin in (PAGE, other):
        reply = await preflight(server, origin)  # which has no key
        assert reply.status == 204
        assert reply.headers["Access-Control-Allow-Origin"] == origin
        assert "x-stainless-os" in reply.headers["Access-Control-Allow-Headers"]
        assert "POST" in reply.headers["Access-Control-Allow-Methods"]
        assert "Access-Control-Allow-Credentials" not in reply.headers
        for headers, status in ((bearer("k"), 200), ({}, 401)):
            reply = await ask(server, "GET", "/v1/models", origin, **headers)
            assert reply.status == status
            assert reply.headers["Access-Control-Allow-Origin"] == origin
            assert reply.headers["Vary"] == "Origin"
            assert "X-Request-Id" in reply.headers["Access-Control-Expose-Headers"]
    for origin in ("https://chat.example.com.evil.org", "https://chat.example.com:444", "null"):
        assert not shown(await preflight(server, origin))
        reply = await ask(server, "GET", "/v1/models", origin, **bearer("k"))
        assert not shown(reply)
        assert reply.headers["Vary"] == "Origin"
    assert (await ask(server, "OPTIONS", "/v1/models", None)).status == 401


async def test_a_star_is_any_page_in_streams_too(serve):
    server = await serve("Hello", server=ServerConfig(port=0, cors_allow_origin=("*",)))
    body = {"prompt": "Hi", "stream": True}
    reply = await server.post("/v1/completions", body, headers={"Origin": "null"})
    assert reply.events
    assert reply.headers["Access-Control-Allow-Origin"] == "*"
    assert "Vary" not in reply.headers


async def test_what_was_cached_under_another_key_is_not_found(serve):
    """The prompt's time tells nobody what others have asked (PromptPeek)."""
    server = await serve("Hello", server=KEYED)
    prompt = "a prompt of more than one block, which is sixteen tokens"

    async def cached(key: str, **fields: object) -> int:
        body = {"prompt": prompt, **fields}
        reply = await server.post("/v1/completions", body, headers=bearer(key))
        return reply.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert await cached("first-key") == 0
    assert await cached("second-key") == 0
    assert await cached("first-key") > 0
    assert await cached("second-key", cache_salt="mine") == 0
    assert await cached("second-key", cache_salt="mine") > 0


async def test_keys_can_share_what_is_cached(serve):
    config = replace(KEYED, share_prefix_cache=True)
    server = await serve("Hello", server=config)
    body = {"prompt": "a prompt of more than one block, which is sixteen tokens"}
    await server.post("/v1/completions", body, headers=bearer("first-key"))
    reply = await server.post("/v1/completions", body, headers=bearer("second-key"))
    assert reply.json["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


# ------------------------------------------------------------------------------------- files


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst-key\n\nalice  second-key\nalice third-key\n")
    return path


async def tenant_of(server, key: str) -> str:
    """Whose a response is that is asked for with a key."""
    reply = await server.post("/v1/responses", {"input": "Hi"}, headers=bearer(key))
    return server.app[RESPONSES]._entries[reply.json["id"]].owner


async def test_keys_come_from_a_file_with_names(serve, key_file):
    config = ServerConfig(port=0, api_key=("flag-key",), api_key_file=str(key_file))
    server = await serve("Hello", server=config)
    assert (await server.get("/v1/models")).status == 401
    assert await tenant_of(server, "second-key") == "alice"
    assert await tenant_of(server, "third-key") == "alice"
    first, flag = await tenant_of(server, "first-key"), await tenant_of(server, "flag-key")
    assert len({"alice", first, flag}) == 3
    assert "flag-key" not in flag
    with capture_logs() as logs:
        await server.get("/v1/models", headers=bearer("second-key"))
    assert logs[-1]["tenant"] == "alice"


async def test_a_key_file_counts_anew_when_it_changes(serve, key_file, monkeypatch):
    monkeypatch.setattr("ruvon.server.reload.EVERY", 0.001)
    server = await serve("Hello", server=ServerConfig(port=0, api_key_file=str(key_file)))

    async def status(key: str) -> int:
        return (await server.get("/v1/models", headers=bearer(key))).status

    async def comes_to(key: str, wanted: int) -> None:
        while await status(key) != wanted:
            pass

    assert await status("new-key") == 401
    key_file.write_text("alice new-key\n")
    await comes_to("new-key", 200)
    assert await status("second-key") == 401
    with capture_logs() as logs:
        for broken in ("", "# nothing\n", "three words here\n", "na/me key\n", "ключ\n"):
            key_file.write_text(broken)
            await server.until(lambda: any(line["event"] == "reload_failed" for line in logs))
            assert await status("new-key") == 200  # what was there still counts
            assert await status("none") == 401
            logs.clear()
    key_file.unlink()
    replacement = key_file.with_name("other")
    replacement.write_text("last-key\n")
    replacement.rename(key_file)
    await comes_to("last-key", 200)


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "holds no key"), ("a b c", "line 1"), ("ok\nb/c key", "line 2"), ("k,ey", "line 1")],
)
def test_a_server_does_not_start_with_a_broken_key_file(tmp_path, text, told):
    path = tmp_path / "keys"
    path.write_text(text)
    for setting in ("api_key_file", "admin_key_file"):
        with pytest.raises(ConfigError, match=f"{setting}: .*{told}"):
            read_keys(ServerConfig(**{setting: str(path)}))
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(ServerConfig(api_key_file=str(tmp_path / "none")))


# ------------------------------------------------------------------------------------- admins


async def test_what_shows_others_needs_an_admin_s_key_once_there_is_one(serve):
    server = await serve("Hello", server=replace(KEYED, admin_key=("admin-key",)))
    for path, missing in (("/metrics", 200), ("/debug/nothing", 404)):
        assert (await server.get(path)).status == 401
        refused = await server.get(path, headers=bearer("first-key"))
        assert refused.status == 403
        assert refused.error["code"] == "admin_key_required"
        assert (await server.get(path, headers=bearer("admin-key"))).status == missing
    both = {"x-api-key": "admin-key", **bearer("first-key")}
    assert (await server.get("/metrics", headers=both)).status == 200
    assert (await server.get("/v1/models", headers=bearer("admin-key"))).status == 200


async def test_an_admin_s_key_alone_leaves_the_rest_open(serve):
    server = await serve("Hello", server=ServerConfig(port=0, admin_key=("admin-key",)))
    assert (await server.get("/v1/models")).status == 200
    assert (await server.get("/metrics")).status == 401


async def test_nobody_looks_into_the_engine_without_an_admin_s_key(serve):
    for config in (ServerConfig(port=0), KEYED):
        server = await serve("Hello", server=config)
        assert (await server.get("/debug/nothing", headers=bearer("first-key"))).status == 403


# ------------------------------------------------------------------------------ weights


def test_a_key_in_a_file_may_have_a_weight():
    keys = list(parse_lines("sk-a\nbatch sk-b 0.5\n# a comment\nchat sk-c 3\n"))
    assert [(key.name, key.weight) for key in keys] == [("", 1.0), ("batch", 0.5), ("chat", 3.0)]
    made = Keys(keys)
    assert (made.weight("batch"), made.weight("chat"), made.weight("")) == (0.5, 3.0, 1.0)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e9", "x", "0.0"])
def test_a_weight_is_a_number_above_zero(weight):
    with pytest.raises(ValueError, match="line 1 ends in a weight that is no number above 0"):
        list(parse_lines(f"batch sk-b {weight}"))


async def test_a_keys_weight_goes_with_its_jobs(serve, tmp_path):
    path = tmp_path / "keys"
    path.write_text("chat sk-c 3\n")
    server = await serve("Hello", server=ServerConfig(port=0, api_key_file=str(path)))
    seen, generate = [], server.service.generator.generate
    server.service.generator.generate = lambda jobs, *args: (
        seen.extend(jobs) or generate(jobs, *args)
    )
    await server.post("/v1/completions", {"prompt": "a"}, headers={"Authorization": "Bearer sk-c"})
    assert [(job.tenant, job.weight) for job in seen] == [("chat", 3.0)]

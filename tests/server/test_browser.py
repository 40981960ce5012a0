"""The page in a real browser: Chromium, driven by Playwright; skipped where there is none, nor one
that `CHROMIUM` names. Whatever a page logs as an error fails its test.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
from serving import FakeLens, ScriptRunner

from ruvon.config import ServerConfig
from ruvon.server.watch import WATCHERS

playwright = pytest.importorskip("playwright.async_api", reason="needs Playwright")
NAMED = os.environ.get("CHROMIUM")
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = NAMED or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium, in PATH or as CHROMIUM"),
    pytest.mark.timeout(300),  # longer than all that has an end of its own here
]

PATIENCE = 90  # seconds for a test, and for a browser to begin, on machines that are busy
CLOSING = 20  # seconds for a browser to end

ANSWER = """Some **bold** words:

- one
- two

<img src=x onerror=alert(1)> [bad](javascript:alert(1))

```html
<script>alert(1)</script>
```
"""
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]  # as root, in containers
PHONE = {"width": 360, "height": 740}
STILL = SimpleNamespace(num_preempted=0)


@pytest.fixture
async def page() -> AsyncIterator[Any]:
    """A page that has logged no error when its test is over."""
    errors: list[str] = []
    async with AsyncExitStack() as stack:
        driver = await playwright.async_playwright().start()
        stack.push_async_callback(end, driver.stop)
        browser = await launch(driver)
        stack.push_async_callback(end, browser.close)
        page = await browser.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.errors = errors
        yield page
    assert errors == []


async def end(stop: Callable[[], Awaitable[None]]) -> None:
    """What hangs is left to be killed: a browser by its driver, a driver with this process."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stop(), CLOSING)


async def launch(driver: Any) -> Any:
    """One that nobody named need not be fit for this."""
    try:
        return await driver.chromium.launch(
            executable_path=BROWSER, args=ARGS, timeout=1000 * PATIENCE
        )
    except playwright.Error as error:
        if NAMED:
            raise
        pytest.skip(f"{BROWSER} does not start: {error.message.splitlines()[0]}")


def bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """A test that fails if something never comes: neither what a page evaluates nor what a server
    is waited for has a limit of its own."""

    @wraps(test)
    async def run(*args: Any, **named: Any) -> None:
        async with asyncio.timeout(PATIENCE):
            await test(*args, **named)

    return run


async def ask(page: Any, text: str) -> None:
    await page.fill("#ask", text)
    await page.keyboard.press("Enter")


@bounded
async def test_a_chat_streams_stops_and_branches(serve, page):
    runner = ScriptRunner(ANSWER, by_hand=True)
    server = await serve(runner=runner)
    answer = page.locator(".message.assistant")
    await page.goto(server.url)
    await ask(page, "Say <b>something</b>")
    await hold(server, runner, answer.get_by_text("Some"))
    assert await page.get_by_role("button", name="Stop").count() == 1
    await page.keyboard.press("Escape")
    await answer.get_by_text("stopped").wait_for()
    await server.until(lambda: runner.num_held)
    runner.finish_step()
    await server.until(lambda: server.idle)

    await answer.get_by_role("button", name="Retry").click()
    await drive(server, answer.locator(".stats"))
    assert await answer.locator("li").all_inner_texts() == ["one", "two"]
    assert await answer.locator("strong").inner_text() == "bold"
    assert await answer.locator("pre").inner_text() == "<script>alert(1)</script>"
    assert "onerror=alert(1)" in await answer.locator(".prose").inner_text()
    assert await answer.locator("img, script, a").count() == 0
    assert re.search(r"tokens · [\d.]+ tokens/s · first after", await answer.inner_text())
    assert "2 / 2" in await answer.locator(".branches").inner_text()

    await page.locator(".message.user").get_by_role("button", name="Edit").click()
    await page.locator(".editing textarea").fill("Again")
    await page.get_by_role("button", name="Ask again").click()
    await drive(server, answer.locator(".stats"))
    user = page.locator(".message.user")
    await user.get_by_role("button", name="earlier branch").click()
    assert await user.locator(".words").inner_text() == "Say <b>something</b>"

    await page.reload()  # it is still there
    await page.locator(".shelf li button").first.click()
    assert await user.locator(".words").inner_text() == "Say <b>something</b>"

    await ask(page, "And?")
    await hold(server, runner, answer.last.get_by_text("Some"))
    await page.get_by_role("button", name="New chat").first.click()
    await page.get_by_role("heading", name="Ask fake").wait_for()
    await page.locator(".shelf li button").first.click()  # what was said so far is kept
    await answer.last.get_by_text("stopped").wait_for()
    await server.until(lambda: runner.num_held)
    runner.finish_step()
    await server.until(lambda: server.idle)


async def hold(server: Any, runner: ScriptRunner, shown: Any) -> None:
    """Complete ten steps, and see that the browser shows them before the others are there."""
    for _ in range(10):
        await server.until(lambda: runner.num_held)
        runner.finish_step()
    await shown.wait_for()


async def drive(server: Any, shown: Any) -> None:
    """Complete steps until something is on the page."""
    waiting = asyncio.create_task(shown.wait_for())
    await server.finish(waiting)
    await waiting


@bounded
async def test_a_tool_is_called_and_its_result_given(serve, page):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 40}}\n</tool_call>'
    script = ScriptRunner(lambda prompt: "It is 42." if "forty-two" in prompt else call)
    server = await serve(runner=script, numbers={"max_model_len": 2048})
    await page.goto(server.url)
    await page.get_by_role("button", name="Settings", exact=True).click()
    await page.get_by_label("Tools").fill("[{")
    await ask(page, "40 and 2?")
    await page.locator(".toast").get_by_text("Tools: ").wait_for()  # is no JSON
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    await page.get_by_label("Tools").fill(json.dumps([tool]))
    await page.locator("#ask").press("Enter")  # what was asked is still there
    shown = page.locator(".call")
    await shown.locator("textarea").wait_for()  # once all of the call is there
    assert await shown.locator("pre").inner_text() == '{"a": 40}'
    await shown.locator("textarea").fill("forty-two")
    await shown.get_by_role("button", name="Give result").click()
    await page.get_by_text("It is 42.").wait_for()
    assert await shown.locator("textarea").count() == 0


FOLD = """async ([url]) => {
  const { History } = await import("/ui/history.js");
  const { events } = await import("/ui/api.js");
  const messages = events(await fetch(url));
  window.folded = new History((await messages.next()).value);
  (async () => {
    for await (const message of messages) message.events.map((event) => folded.push(event));
  })();
}"""
"""Begin to follow the engine, as the page does."""

COMPARE = """async ([url]) => {
  const { events } = await import("/ui/api.js");
  const { stateOf } = await import("/ui/history.js");
  const messages = events(await fetch(url));
  const begin = (await messages.next()).value;
  await messages.return();
  for (let waited = 0; folded.end < begin.standing.next; waited++) {
    if (waited > 4000) throw new Error(`at event ${folded.end} of ${begin.standing.next}`);
    await new Promise((next) => setTimeout(next, 5));
  }
  const told = ({ seqs }) => [...seqs.values()]
    .map((seq) => [seq.id, seq.output, seq.computed, seq.tables])
    .sort((a, b) => a[0] - b[0]);
  const { latest, steps, end } = folded;
  return [stateOf(begin), latest, folded.state(end - 1), folded.state(steps[0])]
    .map(told);
}"""
"""Where the engine is, where the page thinks that it is, and where after its first step."""


@bounded
async def test_the_glass_box_shows_a_preemption_and_is_right_about_every_block(serve, page):
    runner = ScriptRunner("abc", windows=(0, 32), depth=2, by_hand=True)
    server = await serve(runner=runner, numbers={"num_blocks": 24, "max_model_len": 200})
    await page.goto(server.url + "/#engine")
    await page.locator(".loads button").first.wait_for()
    live = server.url + "/debug/live"
    await page.evaluate(FOLD, [live])
    await server.until(lambda: len(server.app[WATCHERS]) == 2)
    body = {"prompt": ["a" * 40, "b" * 40, "a" * 35 + "c"], "max_tokens": 90, "ignore_eos": True}
    task = asyncio.create_task(server.post("/v1/completions", body))
    recorder = server.service.generator.observer.recorder
    while not any(getattr(e, "stats", STILL).num_preempted for e in recorder.since(0)):
        await server.until(lambda: runner.num_held)
        runner.finish_step()
        await asyncio.sleep(0)
    await page.locator("[data-tile=Preemptions]:not([data-value='0'])").wait_for()
    await page.locator("tbody em").first.wait_for()  # how often, in the table
    row = page.locator("tbody .name").first
    await row.focus()
    seen = []
    while not task.done():  # with steps in flight, at all kinds of moments
        for _ in range(7):
            if runner.num_held:
                runner.finish_step()
            await asyncio.sleep(0.005)
        if not seen:  # rows are drawn anew all the time, and one keeps the focus
            await page.keyboard.press("Enter")
            await page.locator("tr.chosen").wait_for()
            await row.blur()
        truth, latest, again, first = await page.evaluate(COMPARE, [live])
        assert latest == truth
        assert again == truth
        seen.append(first)
    assert all(each == seen[0] for each in seen)
    assert (await task).status == 200
    await page.keyboard.press("Space")
    await page.get_by_role("button", name="Go live").wait_for()
    before = await page.locator(".when").inner_text()
    await page.keyboard.press("ArrowLeft")
    await page.locator(".when").filter(has_not_text=before).wait_for()
    await page.locator("tbody tr, .life ol li").first.wait_for()


@bounded
async def test_slow_motion_holds_the_engine(serve, page):
    server = await serve("Hello", server=ServerConfig(port=0, ui_step_gate=True))
    recorder = server.service.generator.observer.recorder
    await page.goto(server.url + "/#engine")
    await page.get_by_label("Speed of the engine").select_option("step by step")
    await server.until(lambda: server.service.generator.gate.pace)
    task = asyncio.create_task(server.complete("Hi", max_tokens=20, ignore_eos=True))
    await server.until(lambda: recorder.end == 2)  # it came, and the first step passes at once
    await page.get_by_role("button", name="Next step").click()
    await server.until(lambda: recorder.end == 3)
    await page.goto(server.url + "/#chat")  # who leaves lets it go on
    assert (await task).status == 200


@bounded
async def test_tokens_show_alternatives_and_branch(serve, page):
    server = await serve("Hello", server=ServerConfig(port=0, max_logprobs=5))
    await page.goto(server.url + "/#tokens?prompt=Hi&n=5&temperature=0")
    tokens = page.locator(".ribbon .token")
    await tokens.nth(6).wait_for()
    assert await page.locator(".ribbon .given").all_inner_texts() == ["H", "i"]
    await tokens.nth(3).click()
    assert "60.7 %" in await page.locator(".facts").inner_text()  # exp(-0.5)
    bars = page.locator("button.bar")
    assert await bars.count() == 5
    await page.get_by_label("Top-p").fill("0.5")
    assert await page.locator("button.bar.cut").count() == 4
    await bars.nth(2).click()
    await page.get_by_role("button", name="2", exact=True).wait_for()
    assert await tokens.nth(3).inner_text() == chr(ord("e") + 2)


@bounded
async def test_attention_shows_heads_and_layers(serve, page):
    server = await serve("Hello", numbers={"lens": FakeLens()})
    await page.goto(server.url + "/#attention?prompt=abc")
    rows = page.locator(".lens tbody tr")
    await rows.first.wait_for()
    assert await rows.last.all_inner_texts() == ["embedding\ta\tb\tc"]
    assert await rows.count() == 4
    taken = page.locator(".sentence .token")
    assert [await taken.nth(i).get_attribute("title") for i in range(3)] == ["0 %", "0 %", "100 %"]
    await taken.nth(1).press("Enter")
    await page.keyboard.press("Tab")  # from where the focus was
    await page.keyboard.press("Enter")
    await page.locator(".sentence .token:nth-child(3).here").wait_for()
    await page.locator("#pick-layer").press("ArrowUp")
    for layer in (2, 1):
        await page.get_by_role("heading", name=f"Layer {layer}, head 0").wait_for()
        await page.keyboard.press("ArrowDown")


@bounded
async def test_a_key_is_asked_for(serve, page):
    server = await serve("Hello", server=ServerConfig(port=0, api_key=("right",)))
    await page.goto(server.url)
    for key in ("wrong", "right"):
        await page.locator("dialog #key").fill(key)
        await page.keyboard.press("Enter")
    await ask(page, "Hi")
    await page.locator(".message.assistant .stats").wait_for()
    await page.goto(server.url + "/#engine")
    await page.get_by_text("needs an admin key").first.wait_for()
    page.errors[:] = [text for text in page.errors if not re.search("40[13] ", text)]


@bounded
async def test_it_fits_a_phone_light_and_dark(serve, page):
    server = await serve("Hello", numbers={"lens": SimpleNamespace(is_busy=False)})
    await page.set_viewport_size(PHONE)
    inks = set()
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        for view in ("chat", "engine", "tokens", "attention"):
            await page.goto(f"{server.url}/#{view}")
            await page.locator(f"body[data-view={view}] main > *").first.wait_for()
            wide = await page.evaluate("() => document.documentElement.scrollWidth")
            ink = await page.evaluate("() => getComputedStyle(document.body).color")
            assert wide <= PHONE["width"], view
            inks.add(ink)
    assert len(inks) == 2

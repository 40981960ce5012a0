// The glass box: the engine's queues, steps and blocks as they happen.

import { ApiError, events, request } from "./api.js";
import { h, onFrame, put, toast } from "./dom.js";
import { blockAt } from "./draw.js";
import { History } from "./history.js";
import { Lives } from "./lives.js";
import { LOADS } from "./loads.js";
import { layOut, show } from "./panels.js";

const RENEW = 4000; // milliseconds between two times that a gate is asked for; it holds for 10 s

export function open(root, server, query) {
  const it = {
    history: null,
    lives: new Lives(),
    at: null,
    chosen: query.has("seq") ? Number(query.get("seq")) : null,
    missed: 0,
    picture: null,
    pace: 0,
    totals: { preempted: 0, cached: 0, queried: 0 },
  };
  const stop = new AbortController();
  const parts = layOut(server);
  put(root, parts.all);
  const draw = onFrame(() => it.history && !stop.signal.aborted && show(it, parts, server));
  const go = (number) => {
    it.at = number;
    draw();
  };

  // ---------------------------------------------------------------- moving in time

  const steps = () => it.history?.steps ?? [];
  const place = () => (it.at === null ? steps().length - 1 : steps().findLastIndex((number) => number <= it.at));
  const move = (by) => steps().length && go(steps()[Math.max(0, Math.min(place() + by, steps().length - 1))]);
  const pause = () => go(it.at === null ? (steps().at(-1) ?? null) : null);
  parts.pause.addEventListener("click", pause);
  parts.back.addEventListener("click", () => move(-1));
  parts.on.addEventListener("click", () => move(1));
  parts.scrub.addEventListener("input", () =>
    go(Number(parts.scrub.value) >= steps().length - 1 ? null : steps()[Number(parts.scrub.value)]),
  );
  parts.strip.addEventListener("click", (event) => {
    const number = it.picture?.at(event.offsetX);
    if (number !== undefined) go(number);
  });
  parts.blocks.addEventListener(
    "mousemove",
    (event) =>
      it.history && (parts.hint.textContent = blockAt(parts.blocks, it.history.state(it.at), event)?.text ?? ""),
  );
  parts.blocks.addEventListener("mouseleave", () => (parts.hint.textContent = ""));
  parts.blocks.addEventListener(
    "click",
    (event) => it.history && choose(blockAt(parts.blocks, it.history.state(it.at), event)?.owner ?? null),
  );
  const choose = (id) => {
    it.chosen = id === it.chosen ? null : id;
    draw();
  };
  it.choose = choose;
  const keys = (event) => {
    const taken = event.key === " " ? /^(BUTTON|A|SELECT)$/ : /^SELECT$/; // a key that means something there
    if (taken.test(document.activeElement.tagName)) return;
    const work = { " ": pause, ArrowLeft: () => move(-1), ArrowRight: () => move(1), Escape: () => go(null) }[
      event.key
    ];
    if (work && !event.altKey) {
      event.preventDefault();
      work();
    }
  };
  addEventListener("keydown", keys);
  addEventListener("resize", draw);
  addEventListener("repaint", draw);

  // ---------------------------------------------------------------- slow motion

  let wanted = 0;
  const ask = (body) => request("/debug/gate", { body }).catch((error) => toast(error.message));
  const renew = setInterval(() => wanted && ask({ pace: wanted }), RENEW);
  parts.pace?.addEventListener("change", () => {
    wanted = Number(parts.pace.value);
    parts.next.hidden = wanted < 600;
    ask({ pace: wanted });
  });
  parts.next?.addEventListener("click", () => ask({ step: true }));

  // ---------------------------------------------------------------- something to look at

  let load = null;
  put(
    parts.loads,
    h("span", { class: "soft" }, "Give it something to do"),
    LOADS.map(({ name, title, start }) =>
      h(
        "button",
        {
          type: "button",
          title,
          onclick: () => {
            load ??= new AbortController();
            start(it.history.latest.madeOf, server.max_model_len, load.signal).catch(
              (error) => error.name !== "AbortError" && toast(error.message),
            );
          },
        },
        name,
      ),
    ),
    h("button", { type: "button", class: "quiet", onclick: () => (load?.abort(), (load = null)) }, "Stop"),
  );

  follow(it, stop.signal, draw).catch((error) => {
    if (stop.signal.aborted) return;
    put(
      root,
      h(
        "div",
        { class: "notice", role: "alert" },
        h("h2", null, "The engine cannot be watched"),
        h("p", null, error.message),
        h(
          "p",
          null,
          "What others ask shows here, in numbers: so it needs an admin key, or, where there are no keys at all, a browser on the server's own machine.",
        ),
      ),
    );
  });
  return () => {
    stop.abort();
    load?.abort();
    clearInterval(renew);
    if (wanted) ask({ pace: 0 });
    removeEventListener("keydown", keys);
    removeEventListener("resize", draw);
    removeEventListener("repaint", draw);
  };
}

/** Read what happens, for as long as anybody looks. */
async function follow(it, signal, draw) {
  while (!signal.aborted) {
    try {
      for await (const message of events(await request("/debug/live", { signal }))) {
        take(it, message);
        draw();
      }
    } catch (error) {
      if (signal.aborted || (error instanceof ApiError && error.status !== 0 && error.status !== 503)) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000)); // the server may be coming back
  }
}

function take(it, message) {
  if (message.kind === "begin") {
    it.missed += message.missed;
    if (it.history) it.history.begin(message);
    else it.history = new History(message);
    it.at = null;
    return;
  }
  for (const event of message.events) {
    it.history.push(event);
    it.lives.take(event);
    if (event[0] !== "step") continue;
    it.totals.cached += event[9][3];
    it.totals.queried += event[9][4];
    it.totals.preempted += event[9][5];
  }
  if (message.cached) it.history.setCached(message.cached);
  it.pace = message.pace;
}

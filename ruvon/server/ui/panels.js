// What the glass box has on the page, and what it shows of one state of the engine.

import { arrange, count, duration, h, plural, put } from "./dom.js";
import { drawBlocks, drawSteps, hue } from "./draw.js";
import { lifeOf, why } from "./lives.js";

const MOST_ROWS = 40;
const PACES = [
  ["0", "full speed"],
  ["0.1", "10 steps a second"],
  ["0.5", "2 steps a second"],
  ["2", "a step every 2 s"],
  ["600", "step by step"],
];
const WORDS = { stop: "ended", length: "at its length", abort: "aborted", error: "failed" };

/** The page's parts, by name. */
export function layOut(server) {
  const button = (text, label) => h("button", { type: "button", "aria-label": label, title: label }, text);
  const parts = {
    pause: h("button", { type: "button", title: "Pause or go on (space)" }, "Pause"),
    back: button("‹", "A step back (left arrow)"),
    on: button("›", "A step on (right arrow)"),
    scrub: h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Step" }),
    when: h("output", { class: "num when" }),
    tiles: h("dl", { class: "tiles" }),
    strip: h("canvas", { class: "strip", role: "img", "aria-label": "Tokens of the latest steps" }),
    batch: h("div", { class: "batch" }),
    blocks: h("canvas", { class: "blocks", role: "img", "aria-label": "Blocks of the cache" }),
    legend: h("p", { class: "legend" }),
    hint: h("p", { class: "soft num hint" }),
    rows: h("tbody"),
    made: new Map(), // sequence → its row
    more: h("p", { class: "soft" }),
    life: h("div"),
    loads: h("div", { class: "loads" }),
  };
  if (server.step_gate) {
    parts.pace = h(
      "select",
      { "aria-label": "Speed of the engine" },
      PACES.map(([value, text]) => h("option", { value }, text)),
    );
    parts.next = h("button", { type: "button", class: "primary", hidden: true }, "Next step");
  }
  const heads = ["Sequence", "State", "Prompt", "Answer", "Blocks", "Cached"];
  const card = (name, ...children) => h("section", { class: "card" }, h("h2", null, name), children);
  parts.title = h("span", null, "The batch");
  parts.all = h(
    "div",
    { class: "engine" },
    h("div", { class: "controls" }, parts.back, parts.pause, parts.on, parts.scrub, parts.when, parts.pace, parts.next),
    parts.loads,
    parts.tiles,
    card(
      "Steps",
      parts.strip,
      h(
        "p",
        { class: "legend" },
        swatch("--accent", "tokens of answers"),
        swatch("--cell-cached", "tokens of prompts"),
        swatch("--bad", "a preemption"),
        " the top is the step's budget, the scale a square root's",
      ),
    ),
    h(
      "div",
      { class: "two" },
      h("section", { class: "card" }, h("h2", null, parts.title), parts.batch),
      card("KV cache", parts.blocks, parts.legend, parts.hint),
    ),
    h(
      "div",
      { class: "two wide" },
      card(
        "Sequences",
        h(
          "div",
          { class: "scroll" },
          h(
            "table",
            null,
            h(
              "thead",
              null,
              h(
                "tr",
                null,
                heads.map((text) => h("th", null, text)),
              ),
            ),
            parts.rows,
          ),
        ),
        parts.more,
      ),
      card("One life", parts.life),
    ),
    server.step_gate
      ? null
      : h(
          "p",
          { class: "soft" },
          "Slow motion: start the server with ",
          h("code", null, "--ui-step-gate"),
          ". Without it, pause and step back: the engine goes on, the picture waits.",
        ),
  );
  return parts;
}

function swatch(name, text) {
  return h("span", { class: "swatch" }, h("i", { style: { background: `var(${name})` } }), text);
}

// ------------------------------------------------------------------ one picture

/** Draw the state that is looked at. */
export function show(it, parts, server) {
  const { history } = it;
  const state = history.state(it.at);
  const steps = history.steps;
  const place = it.at === null ? steps.length - 1 : steps.findLastIndex((number) => number <= it.at);
  parts.scrub.max = Math.max(steps.length - 1, 0);
  if (document.activeElement !== parts.scrub || it.at === null) parts.scrub.value = place;
  put(parts.pause, it.at === null ? "Pause" : "Go live");
  parts.pause.classList.toggle("primary", it.at !== null);
  const ago = history.latest.at - state.at;
  put(
    parts.when,
    state.step ? `step ${count(state.step[2])}` : "no step yet",
    it.at === null ? "" : `, ${duration(Math.max(ago, 0))} before the latest`,
    it.missed ? ` (${count(it.missed)} missed)` : "",
  );
  it.picture = drawSteps(parts.strip, history, it.at, state.step ? steps[place] : null);
  showTiles(it, parts, state, place);
  showBatch(parts, state);
  const numbers = drawBlocks(parts.blocks, state, it.chosen);
  put(
    parts.legend,
    [
      ["coloured by sequence", numbers.held],
      ["shared ▪", numbers.shared],
      ["in a window ▁", numbers.window],
      ["cached", numbers.cached],
      ["free", numbers.free],
    ]
      .filter(([name, n]) => n || name === "free" || name === "cached")
      .map(([name, n]) =>
        h(
          "span",
          { class: "swatch" },
          { cached: h("i", { class: "is-cached" }), free: h("i", { class: "is-free" }) }[name],
          `${count(n)} ${name}`,
        ),
      ),
  );
  showRows(it, parts, state);
  showLife(it, parts, state);
}

function showTiles(it, parts, state, place) {
  const { history } = it;
  const recent = [];
  for (let i = place; i >= 0 && recent.length < 500; i--) {
    const event = history.event(history.steps[i]);
    if (state.at - event[1] > 2) break;
    recent.push(event);
  }
  const span = recent.length > 1 ? recent[0][1] - recent.at(-1)[3] : 0;
  const sampled = recent.reduce((sum, event) => sum + event[4].length, 0);
  const computed = recent.reduce(
    (sum, event) => sum + event[4].length + event[5].reduce((more, each) => more + each[3] - each[4], 0),
    0,
  );
  const free = state.stats ? state.stats[2] : state.madeOf.num_blocks;
  const { totals } = it;
  const tiles = [
    ["Running", state.stats?.[0] ?? 0, `of ${state.madeOf.max_seqs}`],
    ["Waiting", state.stats?.[1] ?? 0, ""],
    ["Tokens a second", span ? Math.round(sampled / span) : 0, "of answers"],
    ["Prompts", span ? Math.round((computed - sampled) / span) : 0, "tokens a second"],
    [
      "A step",
      state.step ? duration(state.step[1] - state.step[3]) : "–",
      state.step ? `${duration(state.stats[6])} computing` : "",
    ],
    [
      "Cache in use",
      `${Math.round(100 * (1 - free / state.madeOf.num_blocks))} %`,
      plural(state.madeOf.num_blocks, "block"),
    ],
    [
      "Prompts found",
      totals.queried ? `${Math.round((100 * totals.cached) / totals.queried)} %` : "–",
      `${count(totals.cached)} tokens`,
    ],
    ["Preemptions", totals.preempted, "since you came"],
  ];
  put(
    parts.tiles,
    tiles.map(([name, value, more]) =>
      h(
        "div",
        { "data-tile": name, "data-value": value },
        h("dt", null, name),
        h("dd", null, typeof value === "number" ? count(value) : value),
        h("dd", { class: "soft" }, more),
      ),
    ),
  );
}

/** Who is in a step, and what is left of its budget. */
function showBatch(parts, state) {
  if (!state.step) return put(parts.batch, h("p", { class: "soft" }, "Nothing has run since you came."));
  const [, , number, , rows, work, , left, finished, , , failure] = state.step;
  const worked = new Map(work.map((each) => [each[0], each[3]]));
  const members = [...rows.filter((id) => !worked.has(id)).map((id) => [id, 1]), ...worked];
  members.sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const total = members.reduce((sum, [, tokens]) => sum + tokens, 0);
  put(
    parts.title,
    `The batch of step ${count(number)}: ${count(total)} of ${plural(state.madeOf.max_tokens, "token")}`,
  );
  const bar = h(
    "div",
    { class: "budget" },
    members
      .slice(0, 120)
      .map(([id, tokens]) =>
        h(
          "span",
          { style: { "flex-grow": tokens, background: hue(id) }, title: `sequence ${id}: ${plural(tokens, "token")}` },
          tokens > total / 8 ? id : "",
        ),
      ),
    h("span", {
      class: "unused",
      style: { "flex-grow": Math.min(state.madeOf.max_tokens - total, total) },
      title: "left of the budget",
    }),
  );
  const news = [
    ...finished.map(([id, reason]) => `sequence ${id} ${WORDS[reason] || reason}`),
    ...left.filter((id) => state.seqs.has(id)).map((id) => `sequence ${id} was preempted: its blocks were needed`),
    failure ? `the step failed: ${failure}` : null,
  ].filter(Boolean);
  return put(
    parts.batch,
    bar,
    h(
      "p",
      { class: "soft" },
      `${plural(members.filter(([, n]) => n === 1).length, "sequence")} of a single token, ${plural(members.filter(([, n]) => n > 1).length, "piece")} of prompts`,
    ),
    h(
      "ul",
      { class: "news" },
      news.slice(0, 6).map((text) => h("li", null, text)),
    ),
  );
}

function showRows(it, parts, state) {
  const waits = new Map(state.waits.map(([id, reason, amount]) => [id, [reason, amount]]));
  const seqs = [...state.seqs.values()].sort((a, b) => a.waits - b.waits || a.id - b.id);
  const said = (seq) => {
    if (!seq.waits) return seq.computed < seq.prompt ? "prompt" : "answer";
    const found = waits.get(seq.id);
    return found
      ? why(...found)
      : `${seq.preempted ? "preempted; " : ""}${waits.size ? "behind others" : "for the next step"}`;
  };
  const shown = seqs.slice(0, MOST_ROWS);
  const rows = shown.map((seq) => {
    const row = parts.made.get(seq.id) ?? newRow(it, seq.id);
    fillRow(row, seq, said(seq), seq.id === it.chosen);
    return row;
  });
  parts.made = new Map(shown.map((seq, i) => [seq.id, rows[i]]));
  arrange(parts.rows, rows);
  put(
    parts.more,
    seqs.length > MOST_ROWS
      ? `and ${count(seqs.length - MOST_ROWS)} more`
      : seqs.length
        ? ""
        : "No sequences. Chat, or press a button above.",
  );
}

/** A sequence's row. It stays as long as it is shown: it may have the focus, or be half clicked. */
function newRow(it, id) {
  const name = h("button", { type: "button", class: "name" }, h("i", { style: { background: hue(id) } }), id);
  const numbers = Array.from({ length: 4 }, () => h("td", { class: "num" }));
  return h("tr", { onclick: () => it.choose(id) }, h("td", null, name), h("td"), numbers);
}

function fillRow(row, seq, said, isChosen) {
  const [name, state, prompt, answer, blocks, cached] = row.cells;
  row.className = [seq.waits ? "waits" : "", isChosen ? "chosen" : ""].join(" ");
  name.firstChild.setAttribute("aria-pressed", String(isChosen));
  put(state, said, seq.preempted ? h("em", null, ` ×${seq.preempted}`) : null);
  const done = Math.min(seq.computed, seq.prompt);
  const bar = h("i", { style: { width: `${(100 * done) / seq.prompt}%` } });
  put(prompt, h("span", { class: "share", title: `${done} of ${seq.prompt} computed` }, bar), seq.prompt);
  put(answer, `${seq.output} / ${seq.most}`);
  put(
    blocks,
    seq.tables.reduce((sum, table) => sum + table.filter(Boolean).length, 0),
  );
  put(cached, seq.cached || "");
}

function showLife(it, parts, state) {
  const lives = it.lives.all;
  const latest = [...lives.keys()].at(-1);
  const life = lives.get(it.chosen ?? latest);
  put(
    parts.life,
    life
      ? lifeOf(life, state.at, hue(life.id))
      : h("p", { class: "soft" }, "Choose a sequence to see what it waited for, and what each step did for it."),
  );
}

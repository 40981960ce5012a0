// The token microscope: what each token was chosen from, and what another choice would have led to.

import { events, request } from "./api.js";
import { count, h, put, visible } from "./dom.js";
import { bitsOf, entropyOf, panel } from "./distribution.js";
import { learn, texts } from "./vocabulary.js";

const PROMPT = "The capital of France is";

export function open(root, server, query) {
  const it = {
    server,
    tokens: [],
    numPrompt: 0,
    at: null,
    paint: "surprise",
    runs: [],
    running: null,
    knobs: { temperature: 1, top_p: 1 },
  };
  const prompt = h("textarea", { rows: 3, id: "prompt", value: query.get("prompt") ?? PROMPT, spellcheck: "false" });
  const number = (id, label, value, attributes) => {
    const input = h("input", { type: "number", id, value, inputmode: "decimal", ...attributes });
    return [h("label", { class: "field small" }, h("span", null, label), input), input];
  };
  const [mostField, most] = number("most", "New tokens", query.get("n") ?? 24, {
    min: 0,
    max: server.max_model_len,
    step: 1,
  });
  const [heatField, heat] = number("heat", "Temperature", query.get("temperature") ?? 0.8, {
    min: 0,
    max: 2,
    step: 0.1,
  });
  const [seedField, seed] = number("seed", "Seed", query.get("seed") ?? "", { min: 0, step: 1, placeholder: "any" });
  const go = h(
    "button",
    {
      type: "button",
      class: "primary",
      onclick: () => (it.running ? it.running.abort() : begin({ prompt: prompt.value, add_special_tokens: true })),
    },
    "Continue",
  );
  const paint = h(
    "select",
    { "aria-label": "What colours show", onchange: () => ((it.paint = paint.value), draw()) },
    h("option", { value: "surprise" }, "surprise"),
    h("option", { value: "entropy" }, "entropy"),
  );
  const ribbon = h("div", { class: "ribbon", role: "list" });
  const runs = h("div", { class: "runs" });
  const about = h("section", { class: "card about" });
  const told = h("p", { class: "soft", role: "status" });
  put(
    root,
    h(
      "div",
      { class: "page tokens" },
      h(
        "section",
        { class: "card" },
        h("label", { class: "field" }, h("span", null, "A text to go on with"), prompt),
        h("div", { class: "row" }, mostField, heatField, seedField, go),
      ),
      h(
        "section",
        { class: "card" },
        h(
          "div",
          { class: "between" },
          h("h2", null, "Tokens"),
          h("label", { class: "inline" }, "colours show ", paint),
        ),
        runs,
        ribbon,
        told,
      ),
      about,
    ),
  );

  // ---------------------------------------------------------------- what is shown

  function draw() {
    put(go, it.running ? "Stop" : "Continue");
    put(
      ribbon,
      it.tokens.map((token, i) =>
        h(
          "button",
          {
            type: "button",
            role: "listitem",
            class: ["token", i < it.numPrompt ? "given" : "", i === it.at ? "here" : ""].join(" "),
            title: title(token),
            style: { "--heat": `${heatOf(token)}%` },
            onclick: () => choose(i),
          },
          shown(texts.get(token.id) ?? ""),
        ),
      ),
    );
    put(
      runs,
      it.runs.length > 1
        ? it.runs.map((run, i) =>
            h(
              "button",
              {
                type: "button",
                class: "act",
                "aria-pressed": String(run.tokens === it.tokens),
                onclick: () => recall(run),
              },
              `${i + 1}`,
            ),
          )
        : null,
    );
    if (it.runs.length > 1) runs.prepend(h("span", { class: "soft" }, "Branches "));
    const sum = it.tokens
      .slice(it.numPrompt)
      .reduce((total, token) => total + (token.logprob === null ? 0 : bitsOf(token.logprob)), 0);
    const made = it.tokens.length - it.numPrompt;
    put(
      told,
      it.tokens.length
        ? `${count(it.numPrompt)} given, ${count(made)} sampled${made > 0 ? `, ${(sum / made).toFixed(2)} bits of surprise each` : ""}. Choose one; arrow keys move.`
        : "Every token will show what it was chosen from.",
    );
    put(
      about,
      it.at === null
        ? h(
            "p",
            { class: "soft" },
            "Choose a token to see its probability, the alternatives and the entropy, and what temperature and top-p would have made of them.",
          )
        : panel(it, texts, branch, () => draw()),
    );
  }

  const heatOf = (token) => {
    if (token.logprob === null) return 0;
    return Math.round(
      100 * Math.min((it.paint === "entropy" ? entropyOf(token.top).bits : bitsOf(token.logprob)) / 8, 1),
    );
  };
  const title = (token) =>
    token.logprob === null
      ? "the first token is given"
      : `${(100 * Math.exp(token.logprob)).toPrecision(3)} %, ${bitsOf(token.logprob).toFixed(2)} bits`;

  function choose(i) {
    it.at = i;
    draw();
    ribbon.children[i]?.focus({ preventScroll: false });
  }

  const keys = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || it.at === null || /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName))
      return;
    event.preventDefault();
    choose(Math.max(0, Math.min(it.at + by, it.tokens.length - 1)));
  };
  addEventListener("keydown", keys);

  // ---------------------------------------------------------------- what is asked

  const sampling = () => ({
    max_tokens: Number(most.value),
    temperature: Number(heat.value),
    ...(seed.value === "" ? {} : { seed: Number(seed.value) }),
    logprobs: Math.min(20, server.max_logprobs),
    return_tokens_as_token_ids: true,
    return_token_ids: true,
  });

  /** Score a prompt, and go on with it. */
  async function begin(given) {
    const run = { tokens: [] };
    Object.assign(it, { tokens: run.tokens, numPrompt: 0, at: null, runs: [run] });
    await ask({ ...given, ...sampling(), echo: true }, run);
  }

  /** Take another token at a place, and go on from there. */
  async function branch(i, id) {
    const before = it.tokens.slice(0, i);
    const old = it.tokens[i];
    const run = {
      tokens: [...before, { ...old, id, logprob: old.top.find(([other]) => other === id)[1] }],
      numPrompt: Math.min(it.numPrompt, i + 1),
    };
    const left = Math.max(Number(most.value) - (run.tokens.length - run.numPrompt), 1);
    Object.assign(it, { tokens: run.tokens, at: i, numPrompt: run.numPrompt });
    it.runs.push(run);
    await ask({ prompt: run.tokens.map((token) => token.id), ...sampling(), max_tokens: left }, run);
  }

  function recall(run) {
    Object.assign(it, {
      tokens: run.tokens,
      numPrompt: run.numPrompt,
      at: Math.min(it.at ?? 0, run.tokens.length - 1),
    });
    draw();
  }

  async function ask(body, run) {
    it.running?.abort();
    const running = (it.running = new AbortController());
    draw();
    try {
      const response = await request("/v1/completions", { body: { ...body, stream: true }, signal: running.signal });
      for await (const chunk of events(response)) {
        const [choice] = chunk.choices ?? [];
        if (!choice) continue;
        const ids = choice.prompt_token_ids ?? chunk.prompt_token_ids;
        if (ids && body.echo) it.numPrompt = run.numPrompt = ids.length;
        if (!choice.logprobs) continue;
        run.tokens.push(...read(choice.logprobs));
        await learn(
          run.tokens.flatMap((token) => [token.id, ...token.top.map(([id]) => id)]),
          running.signal,
        );
        if (it.tokens === run.tokens) draw();
      }
    } catch (error) {
      if (error.name !== "AbortError") put(told, h("span", { class: "error" }, error.message));
      else draw();
      if (it.running === running) it.running = null;
      put(go, "Continue");
      return;
    }
    if (it.running === running) it.running = null;
    draw();
  }

  const kept = query.get("from") === "chat" && JSON.parse(sessionStorage.getItem("ruvon.tokens") || "null");
  draw();
  if (kept) {
    most.value = 0;
    begin({ prompt: [...kept.prompt, ...kept.answer] }).then(() => {
      it.numPrompt = it.runs[0].numPrompt = kept.prompt.length;
      most.value = Math.max(kept.answer.length, 24);
      draw();
    });
  } else if (query.has("prompt")) begin({ prompt: prompt.value, add_special_tokens: true });
  return () => {
    it.running?.abort();
    removeEventListener("keydown", keys);
  };
}

/** A token's text as it stands in the ribbon, where spaces are seen as they are. */
function shown(text) {
  return /[\n\t]/.test(text) || !text ? visible(text) : text;
}

/** The API's parallel lists as tokens: {id, logprob, top: [[id, logprob], ...]}. */
function read(logprobs) {
  return logprobs.tokens.map((name, i) => ({
    id: idOf(name),
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([other, value]) => [idOf(other), value])
      .sort((a, b) => b[1] - a[1]),
  }));
}

const idOf = (name) => Number(name.slice("token_id:".length));

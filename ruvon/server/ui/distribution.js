// One token's distribution: as the model gives it, and as temperature and top-p would have it.
//
// The API tells the likeliest tokens. All others together are the rest: their entropy is counted as if
// they were one token, so that what is told is the least it can be; and where temperature changes
// them, they count as equally likely.

import { count, h, visible } from "./dom.js";

export const bitsOf = (logprob) => -logprob / Math.LN2;

/** The probability of what is not among these. */
export function restOf(top) {
  return Math.max(1 - top.reduce((sum, [, logprob]) => sum + Math.exp(logprob), 0), 0);
}

/** At least so many bits. */
export function entropyOf(top) {
  const rest = restOf(top);
  const known = top.reduce((sum, [, logprob]) => sum + Math.exp(logprob) * bitsOf(logprob), 0);
  return { bits: known + (rest > 1e-9 ? -rest * Math.log2(rest) : 0), rest };
}

/** Probabilities under a temperature and a top-p: [[id, p, kept]], and the rest's [p, kept]. */
export function adjust(top, { temperature, top_p: topP }, vocabulary) {
  const others = Math.max(vocabulary - top.length, 1);
  const rest = restOf(top);
  if (temperature === 0) return { tokens: top.map(([id], i) => [id, i ? 0 : 1, !i]), rest: [0, false] };
  const best = top[0]?.[1] ?? 0;
  const weights = top.map(([, logprob]) => Math.exp((logprob - best) / temperature));
  const restWeight = rest > 1e-9 ? others * Math.exp((Math.log(rest / others) - best) / temperature) : 0;
  const sum = weights.reduce((a, b) => a + b, 0) + restWeight;
  let before = 0;
  const kept = weights.map((weight) => {
    const is = before < topP || before === 0;
    before += weight / sum;
    return is;
  });
  const keepsRest = before < topP && restWeight > 0;
  const mass = weights.reduce((total, weight, i) => total + (kept[i] ? weight : 0), 0) + (keepsRest ? restWeight : 0);
  return {
    tokens: top.map(([id], i) => [id, kept[i] ? weights[i] / mass : 0, kept[i]]),
    rest: [keepsRest ? restWeight / mass : 0, keepsRest],
  };
}

const percent = (p) =>
  p >= 0.0995 ? `${(100 * p).toFixed(1)} %` : p >= 0.000995 ? `${(100 * p).toFixed(2)} %` : p > 0 ? "< 0.1 %" : "0";

/** All that is known of the chosen token. ``branch(i, id)`` goes on with another. */
export function panel(it, texts, branch, redraw) {
  const token = it.tokens[it.at];
  const name = h("span", { class: "token big" }, visible(texts.get(token.id) ?? ""));
  if (token.logprob === null)
    return [
      h("h2", null, name),
      h("p", { class: "soft" }, "Nothing comes before the first token: it is given, with no probability."),
    ];
  const { bits, rest } = entropyOf(token.top);
  const rank = token.top.findIndex(([id]) => id === token.id);
  const facts = [
    ["Probability", percent(Math.exp(token.logprob))],
    ["Rank", rank < 0 ? `below ${token.top.length}` : rank + 1],
    ["Surprise", `${bitsOf(token.logprob).toFixed(2)} bits`],
    ["Entropy", `${rest > 0.001 ? "at least " : ""}${bits.toFixed(2)} bits`],
    ["Token", token.id],
  ];
  const bars = h("div", { class: "bars" });
  const fill = () => bars.replaceChildren(...rows(it, token, texts, branch));
  const knob = (key, label, max, step) => {
    const value = h("output", { class: "num" }, it.knobs[key].toFixed(2));
    return h(
      "label",
      { class: "knob" },
      h("span", null, label),
      h("input", {
        type: "range",
        min: 0,
        max,
        step,
        value: it.knobs[key],
        oninput: (event) => {
          it.knobs[key] = Number(event.target.value);
          value.textContent = it.knobs[key].toFixed(2);
          fill();
        },
      }),
      value,
    );
  };
  fill();
  const reset = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: () => (Object.assign(it.knobs, { temperature: 1, top_p: 1 }), redraw()),
    },
    "As the model has it",
  );
  return [
    h("div", { class: "between" }, h("h2", null, "Token ", it.at + 1, " ", name)),
    h(
      "dl",
      { class: "facts" },
      facts.map(([key, value]) => h("div", null, h("dt", null, key), h("dd", { class: "num" }, value))),
    ),
    h("div", { class: "knobs" }, knob("temperature", "Temperature", 2, 0.05), knob("top_p", "Top-p", 1, 0.01), reset),
    bars,
    h(
      "p",
      { class: "soft" },
      "The pale bar is the model's own probability, the strong one what temperature and top-p make of it. Press one to go on from there with it.",
    ),
  ];
}

function rows(it, token, texts, branch) {
  const { tokens, rest } = adjust(token.top, it.knobs, it.server.vocab_size);
  const own = new Map(token.top);
  const made = tokens.map(([id, p, kept]) =>
    h(
      "button",
      {
        type: "button",
        class: ["bar", kept ? "" : "cut", id === token.id ? "chosen" : ""].join(" "),
        onclick: () => branch(it.at, id),
        disabled: id === token.id || it.at === 0,
      },
      h("span", { class: "token" }, visible(texts.get(id) ?? "")),
      track(Math.exp(own.get(id)), p),
      h("span", { class: "num" }, percent(p)),
    ),
  );
  const before = restOf(token.top);
  const others = it.server.vocab_size - token.top.length;
  if (others > 0) {
    made.push(
      h(
        "div",
        { class: `bar ${rest[1] ? "" : "cut"}` },
        h("span", { class: "soft" }, `${count(others)} others`),
        track(before, rest[0]),
        h("span", { class: "num" }, percent(rest[0])),
      ),
    );
  }
  return made;
}

function track(own, now) {
  return h(
    "span",
    { class: "track" },
    h("i", { class: "own", style: { width: `${100 * own}%` } }),
    h("i", { class: "now", style: { width: `${100 * now}%` } }),
  );
}

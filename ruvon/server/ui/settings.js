// What a chat is asked with: the system prompt, how tokens are drawn, tools, a schema.

import { h } from "./dom.js";

const KEPT = "ruvon.settings";

const NUMBERS = [
  // field, label, least, most, step, what it is for
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token"],
  ["top_p", "Top-p", 0, 1, 0.01, "the likeliest tokens that together have this probability"],
  ["top_k", "Top-k", 0, 1000, 1, "so many of the likeliest tokens; 0 is all"],
  ["min_p", "Min-p", 0, 1, 0.01, "tokens with this share of the likeliest one's probability"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "against tokens that have been said"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "the same, for each time"],
  ["repetition_penalty", "Repetition penalty", 0.1, 2, 0.05, "over prompt and answer; 1 is off"],
  ["max_tokens", "Most tokens", 1, 1e6, 1, "of an answer"],
  ["seed", "Seed", 0, 2 ** 53, 1, "the same seed, the same answer"],
];

const TEXTS = [
  ["stop", "Stop at", 2, "a text a line"],
  ["tools", "Tools", 5, '[{"type": "function", "function": {"name": …}}]'],
  ["schema", "JSON schema of the answer", 5, '{"type": "object", "properties": {…}}'],
];

const CHOICES = [
  ["", "as the model likes"],
  ["required", "at least one"],
  ["none", "none"],
];

export function load() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) || {};
  } catch {
    return {};
  }
}

/** The form. Fields left empty are not sent: the model's own defaults count. */
export function form(server, settings) {
  const keep = (name, value) => {
    if (value === "") delete settings[name];
    else settings[name] = value;
    localStorage.setItem(KEPT, JSON.stringify(settings));
  };
  const area = ([name, label, rows, hint]) =>
    h(
      "label",
      { class: "field" },
      h("span", null, label),
      h("textarea", {
        rows,
        name,
        placeholder: hint,
        spellcheck: "false",
        value: settings[name] ?? "",
        oninput: (event) => keep(name, event.target.value),
      }),
    );
  return h(
    "form",
    { class: "settings", onsubmit: (event) => event.preventDefault() },
    area(["system", "System prompt", 4, "You are a helpful assistant."]),
    h(
      "div",
      { class: "numbers" },
      NUMBERS.map(([name, label, min, max, step, hint]) =>
        h(
          "label",
          { class: "field", title: hint },
          h("span", null, label),
          h("input", {
            type: "number",
            name,
            min,
            max,
            step,
            inputmode: "decimal",
            placeholder: server.default_sampling[name] ?? "default",
            value: settings[name] ?? "",
            oninput: (event) => keep(name, event.target.value),
          }),
        ),
      ),
    ),
    TEXTS.slice(0, 2).map(area),
    h(
      "label",
      { class: "field" },
      h("span", null, "Whether to call a tool"),
      h(
        "select",
        { name: "tool_choice", onchange: (event) => keep("tool_choice", event.target.value) },
        CHOICES.map(([value, text]) => h("option", { value, selected: (settings.tool_choice ?? "") === value }, text)),
      ),
    ),
    area(TEXTS[2]),
  );
}

/** The request's fields. Throws Error with the name of the field that is not JSON. */
export function fields(settings) {
  const given = {};
  for (const [name] of NUMBERS) if (settings[name] !== undefined) given[name] = Number(settings[name]);
  const stop = (settings.stop || "").split("\n").filter(Boolean);
  if (stop.length) given.stop = stop;
  if (settings.tools?.trim()) {
    given.tools = parse(settings.tools, "Tools");
    if (settings.tool_choice) given.tool_choice = settings.tool_choice;
  }
  if (settings.schema?.trim()) {
    given.response_format = {
      type: "json_schema",
      json_schema: { name: "answer", schema: parse(settings.schema, "JSON schema") },
    };
  }
  return given;
}

function parse(text, label) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${label}: ${error.message}`);
  }
}

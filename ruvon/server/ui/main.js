// Which view is shown: the one that the address names, as in `#tokens?prompt=Hello`.

import { json } from "./api.js";
import { h, put } from "./dom.js";

const VIEWS = ["chat", "engine", "tokens", "attention"];
const content = document.getElementById("content");
let shown = null; // { name, close }
let server = null; // what `/about` says
let turns = 0; // of views; whoever loads meanwhile is too late

function place() {
  const [name, query] = location.hash.slice(1).split("?");
  return { name: VIEWS.includes(name) ? name : "chat", query: new URLSearchParams(query || "") };
}

async function show() {
  const { name, query } = place();
  const turn = ++turns;
  shown?.close?.();
  shown = null;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = name;
  try {
    server ??= await about();
    const view = await import(`./${name}.js`);
    if (turn !== turns) return;
    put(content);
    shown = { name, close: view.open(content, server, query) };
  } catch (error) {
    if (turn === turns) put(content, h("p", { class: "notice", role: "alert" }, error.message));
  }
}

/** What the server is, once it has loaded its model. */
async function about() {
  const label = document.getElementById("model");
  for (;;) {
    try {
      const found = await json("/about");
      put(label, found.model);
      label.title = `${found.architecture}, context of ${found.max_model_len} tokens, ruvon ${found.version}`;
      return found;
    } catch (error) {
      if (error.status !== 503 && error.status !== 0) throw error;
      put(label, error.message);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

// ------------------------------------------------------------------ light and dark

const THEMES = { auto: "◐", light: "○", dark: "●" };
const button = document.getElementById("theme");

function paint(theme) {
  put(button, THEMES[theme]);
  button.setAttribute("aria-label", `Theme: ${theme}`);
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

button.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(localStorage.getItem("ruvon.theme") || "auto") + 1) % names.length];
  localStorage.setItem("ruvon.theme", next);
  paint(next);
  window.dispatchEvent(new Event("repaint"));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => window.dispatchEvent(new Event("repaint")));
paint(localStorage.getItem("ruvon.theme") || "auto");

// ------------------------------------------------------------------ keyboard

addEventListener("keydown", (event) => {
  const number = Number(event.key);
  if (event.altKey && !event.ctrlKey && !event.metaKey && number >= 1 && number <= VIEWS.length) {
    event.preventDefault();
    location.hash = VIEWS[number - 1];
  }
});
addEventListener("hashchange", (event) => {
  const before = new URL(event.oldURL).hash;
  if (location.hash !== "#content" && before !== location.hash) show();
});
show();

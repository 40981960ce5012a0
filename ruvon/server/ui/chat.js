// The chat: conversations that branch, answers as they come.

import { asMessage, stats, take } from "./answers.js";
import { events, request } from "./api.js";
import { grow, h, onFrame, put, toast } from "./dom.js";
import { message } from "./message.js";
import { fields, form, load } from "./settings.js";
import * as store from "./store.js";

const IDEAS = [
  "Explain how a KV cache saves work, in three sentences.",
  "Write a haiku about a queue that never stalls.",
  "Make a table of three sorting algorithms and their costs.",
];

export function open(root, server) {
  const settings = load();
  const state = {
    server,
    settings,
    conversation: store.create(),
    saved: [],
    running: null,
    editing: null,
    away: false,
  };
  const thread = h("div", { class: "thread", "aria-live": "off" });
  const scroller = h(
    "div",
    {
      class: "scroller",
      onscroll: () => (state.away = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight > 60),
    },
    thread,
  );
  const shelf = h("aside", { class: "shelf", "aria-label": "Conversations" });
  const input = h("textarea", {
    id: "ask",
    rows: 1,
    placeholder: "Ask something",
    "aria-label": "Message",
    oninput: () => grow(input),
    onkeydown: (event) => typed(event),
  });
  const send = h(
    "button",
    { class: "primary", type: "button", onclick: () => (state.running ? state.running.abort() : submit()) },
    "Send",
  );
  const panel = h(
    "aside",
    { class: "drawer", id: "settings", hidden: true, "aria-label": "Settings" },
    h(
      "header",
      null,
      h("h2", null, "Settings"),
      h(
        "button",
        { type: "button", class: "act", "aria-label": "Close the settings", onclick: () => (panel.hidden = true) },
        "×",
      ),
    ),
    form(server, settings),
  );
  const tools = h(
    "div",
    { class: "tools" },
    h(
      "button",
      { type: "button", class: "quiet phone", onclick: () => shelf.classList.toggle("open") },
      "Conversations",
    ),
    h("button", { type: "button", class: "quiet", onclick: () => begin() }, "New chat"),
    h(
      "button",
      { type: "button", class: "quiet", "aria-controls": "settings", onclick: () => (panel.hidden = !panel.hidden) },
      "Settings",
    ),
  );
  const composer = h("div", { class: "composer" }, h("div", { class: "box" }, input, send), tools);
  put(root, h("section", { class: "chat" }, shelf, h("div", { class: "middle" }, scroller, composer), panel));

  const draw = () => {
    const { conversation } = state;
    const path = store.path(conversation);
    put(thread, path.length ? path.map((node) => message(chat, node)) : welcome());
    put(send, state.running ? "Stop" : "Send");
    follow();
  };
  const follow = () => {
    if (!state.away) scroller.scrollTop = scroller.scrollHeight;
  };
  /** The message that is being written; what is above it stays, with whatever is selected there. */
  const drawLast = onFrame(() => {
    if (!state.running) return;
    thread.lastElementChild.replaceWith(message(chat, store.path(state.conversation).at(-1)));
    follow();
  });
  const chat = { state, draw, answer, keep };

  function welcome() {
    return h(
      "div",
      { class: "welcome" },
      h("h1", null, "Ask ", server.model.split("/").at(-1)),
      h("p", null, "Conversations stay in this browser."),
      h(
        "ul",
        null,
        IDEAS.map((text) => h("li", null, h("button", { type: "button", onclick: () => submit(text) }, text))),
      ),
    );
  }

  // ---------------------------------------------------------------- asking

  function submit(text = input.value) {
    if (!text.trim() || state.running || !wanted()) return;
    input.value = "";
    grow(input);
    store.append(state.conversation, state.conversation.leaf, { role: "user", content: text });
    answer(state.conversation.leaf);
  }

  /** The settings as fields of a request; nothing, and they are shown, where one makes no sense. */
  function wanted() {
    try {
      return fields(settings);
    } catch (error) {
      toast(error.message);
      panel.hidden = false;
      return null;
    }
  }

  async function answer(parent) {
    const given = wanted();
    if (!given) return draw();
    const { conversation } = state; // another may be shown by the time it ends
    const messages = store.path(conversation, parent).map(asMessage);
    if (settings.system?.trim()) messages.unshift({ role: "system", content: settings.system });
    const node = store.append(conversation, parent, {
      role: "assistant",
      content: "",
      reasoning: "",
      tool_calls: [],
      ids: [],
      promptIds: [],
    });
    const running = (state.running = new AbortController());
    state.away = false;
    keep(conversation);
    const began = performance.now();
    const times = { first: 0, last: 0, usage: null };
    try {
      const body = {
        messages,
        ...given,
        stream: true,
        stream_options: { include_usage: true },
        return_token_ids: true,
      };
      const response = await request("/v1/chat/completions", { body, signal: running.signal });
      for await (const chunk of events(response)) {
        take(node, chunk, times);
        drawLast();
      }
    } catch (error) {
      if (error.name !== "AbortError") node.error = error.message;
    }
    node.stats = stats(node, times, began);
    if (state.running === running) state.running = null;
    keep(conversation);
  }

  function keep(conversation = state.conversation) {
    draw();
    store.save(conversation).catch((error) => toast(`This conversation could not be kept: ${error.message}`));
    refresh();
  }

  // ---------------------------------------------------------------- conversations

  async function refresh() {
    state.saved = await store.all();
    put(
      shelf,
      h("button", { type: "button", class: "new", onclick: () => begin() }, "New chat"),
      h(
        "ul",
        null,
        state.saved.map((each) =>
          h(
            "li",
            { class: each.id === state.conversation.id ? "here" : null },
            h("button", { type: "button", onclick: () => begin(each) }, each.title || "Untitled"),
            h(
              "button",
              { type: "button", class: "act", "aria-label": `Forget ${each.title}`, onclick: () => forget(each) },
              "×",
            ),
          ),
        ),
      ),
    );
  }

  async function forget(conversation) {
    await store.remove(conversation.id);
    if (conversation.id === state.conversation.id) begin();
    else refresh();
  }

  function begin(conversation) {
    state.running?.abort();
    state.running = null;
    state.conversation = conversation || store.create();
    state.editing = null;
    state.away = false;
    shelf.classList.remove("open");
    draw();
    refresh();
    input.focus();
  }

  function typed(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  }

  const keys = (event) => {
    if (event.key === "Escape") {
      if (panel.hidden) state.running?.abort();
      panel.hidden = true;
      shelf.classList.remove("open");
    }
    if (event.key === "/" && document.activeElement === document.body) {
      event.preventDefault();
      input.focus();
    }
  };
  addEventListener("keydown", keys);
  draw();
  refresh().then(() => matchMedia("(pointer: fine)").matches && input.focus());
  return () => {
    removeEventListener("keydown", keys);
    state.running?.abort();
  };
}

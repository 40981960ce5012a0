// The chat: conversations that branch, answers as they come.

import { events, request } from "./api.js";
import { count, duration, h, onFrame, plural, put, toast } from "./dom.js";
import { markdown } from "./markdown.js";
import { fields, form, load } from "./settings.js";
import * as store from "./store.js";

const IDEAS = ["Explain how a KV cache saves work, in three sentences.", "Write a haiku about a queue that never stalls.", "Make a table of three sorting algorithms and their costs."];

export function open(root, server) {
  const settings = load();
  const state = { server, settings, conversation: store.create(), saved: [], running: null, editing: null, away: false };
  const thread = h("div", { class: "thread", "aria-live": "off" });
  const scroller = h("div", { class: "scroller", onscroll: () => (state.away = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight > 60) }, thread);
  const shelf = h("aside", { class: "shelf", "aria-label": "Conversations" });
  const input = h("textarea", { id: "ask", rows: 1, placeholder: "Ask something", "aria-label": "Message", oninput: () => grow(input), onkeydown: (event) => typed(event) });
  const send = h("button", { class: "primary", type: "button", onclick: () => (state.running ? state.running.abort() : submit()) }, "Send");
  const panel = h("aside", { class: "drawer", id: "settings", hidden: true, "aria-label": "Settings" },
    h("header", null, h("h2", null, "Settings"), h("button", { type: "button", class: "act", "aria-label": "Close the settings", onclick: () => (panel.hidden = true) }, "×")), form(server, settings));
  const tools = h("div", { class: "tools" },
    h("button", { type: "button", class: "quiet phone", onclick: () => shelf.classList.toggle("open") }, "Conversations"),
    h("button", { type: "button", class: "quiet", onclick: () => begin() }, "New chat"),
    h("button", { type: "button", class: "quiet", "aria-controls": "settings", onclick: () => (panel.hidden = !panel.hidden) }, "Settings"));
  const composer = h("div", { class: "composer" }, h("div", { class: "box" }, input, send), tools);
  put(root, h("section", { class: "chat" }, shelf, h("div", { class: "middle" }, scroller, composer), panel));

  const draw = () => {
    const { conversation } = state;
    const path = store.path(conversation);
    put(thread, path.length ? path.map((node) => message(node)) : welcome());
    put(send, state.running ? "Stop" : "Send");
    if (!state.away) scroller.scrollTop = scroller.scrollHeight;
  };
  const drawSoon = onFrame(draw);

  function welcome() {
    return h("div", { class: "welcome" }, h("h1", null, "Ask ", server.model.split("/").at(-1)), h("p", null, "Conversations stay in this browser."),
      h("ul", null, IDEAS.map((text) => h("li", null, h("button", { type: "button", onclick: () => submit(text) }, text)))));
  }

  // ---------------------------------------------------------------- one message

  function message(node) {
    if (state.editing === node.id) return editor(node);
    const body = node.role === "user" ? h("div", { class: "words" }, node.content) : h("div", { class: "prose" }, markdown(node.content || ""));
    return h("article", { class: `message ${node.role}`, "data-id": node.id },
      node.reasoning ? h("details", { class: "thought", open: !node.content }, h("summary", null, "Reasoning"), h("div", { class: "prose" }, markdown(node.reasoning))) : null,
      node.role === "tool" ? h("p", { class: "label" }, `Result of ${node.name}`) : null,
      node.content || !node.tool_calls?.length ? body : null,
      (node.tool_calls || []).map((call) => toolCall(node, call)),
      node.error ? h("p", { class: "error", role: "alert" }, node.error) : null,
      state.running && node.id === state.conversation.leaf ? h("span", { class: "caret", "aria-label": "being written" }) : footer(node));
  }

  function footer(node) {
    const others = store.siblings(state.conversation, node);
    const at = others.indexOf(node);
    const branch = (step) => () => {
      if (state.running) return;
      store.follow(state.conversation, others[at + step]);
      keep();
    };
    const act = (label, work) => h("button", { type: "button", class: "act", disabled: !!state.running, onclick: work }, label);
    return h("footer", null,
      others.length > 1 ? h("span", { class: "branches" },
        h("button", { type: "button", class: "act", "aria-label": "earlier branch", disabled: at === 0, onclick: branch(-1) }, "‹"),
        `${at + 1} / ${others.length}`,
        h("button", { type: "button", class: "act", "aria-label": "later branch", disabled: at === others.length - 1, onclick: branch(1) }, "›")) : null,
      node.role === "user" ? act("Edit", () => ((state.editing = node.id), draw())) : null,
      node.role === "assistant" ? act("Retry", () => answer(node.parent)) : null,
      node.role === "assistant" && node.content ? act("Copy", () => navigator.clipboard?.writeText(node.content)) : null,
      node.ids?.length ? act("Tokens", () => inspect(node)) : null,
      node.stats ? h("span", { class: "stats", title: node.stats.title }, node.stats.text) : null);
  }

  function inspect(node) {
    sessionStorage.setItem("ruvon.tokens", JSON.stringify({ prompt: node.promptIds, answer: node.ids }));
    location.hash = "tokens?from=chat";
  }

  function editor(node) {
    const field = h("textarea", { value: node.content, "aria-label": "Edit the message" });
    const done = (asks) => {
      state.editing = null;
      if (asks && field.value.trim()) {
        store.append(state.conversation, node.parent, { role: "user", content: field.value });
        answer(state.conversation.leaf);
      } else draw();
    };
    requestAnimationFrame(() => (grow(field), field.focus()));
    return h("article", { class: "message user editing" }, field, h("footer", null,
      h("button", { type: "button", class: "primary", onclick: () => done(true) }, "Ask again"),
      h("button", { type: "button", class: "quiet", onclick: () => done(false) }, "Cancel")));
  }

  function toolCall(node, call) {
    const below = Object.values(state.conversation.nodes).some((other) => other.parent === node.id);
    const result = h("textarea", { rows: 2, placeholder: "What the tool gives", "aria-label": `Result of ${call.function.name}` });
    const give = () => {
      store.append(state.conversation, state.conversation.leaf, { role: "tool", content: result.value, tool_call_id: call.id, name: call.function.name });
      const path = store.path(state.conversation);
      const given = new Set(path.map((other) => other.tool_call_id));
      if (node.tool_calls.every((each) => given.has(each.id))) answer(state.conversation.leaf);
      else keep();
    };
    const given = store.path(state.conversation).some((other) => other.tool_call_id === call.id);
    return h("figure", { class: "call" }, h("figcaption", null, "calls ", h("strong", null, call.function.name)), h("pre", null, h("code", null, call.function.arguments)),
      given || state.running || (below && node.id !== state.conversation.leaf && !node.tool_calls.some((each) => each !== call)) ? null : h("div", { class: "give" }, result, h("button", { type: "button", class: "primary", onclick: give }, "Give result")));
  }

  // ---------------------------------------------------------------- asking

  function submit(text = input.value) {
    if (!text.trim() || state.running) return;
    input.value = "";
    grow(input);
    store.append(state.conversation, state.conversation.leaf, { role: "user", content: text });
    answer(state.conversation.leaf);
  }

  async function answer(parent) {
    let given;
    try {
      given = fields(settings);
    } catch (error) {
      toast(error.message);
      panel.hidden = false;
      draw();
      return;
    }
    const messages = store.path(state.conversation, parent).map(asMessage);
    if (settings.system?.trim()) messages.unshift({ role: "system", content: settings.system });
    const node = store.append(state.conversation, parent, { role: "assistant", content: "", reasoning: "", tool_calls: [], ids: [], promptIds: [] });
    state.running = new AbortController();
    state.away = false;
    draw();
    const began = performance.now();
    const times = { first: 0, last: 0, usage: null };
    try {
      const body = { messages, ...given, stream: true, stream_options: { include_usage: true }, return_token_ids: true };
      const response = await request("/v1/chat/completions", { body, signal: state.running.signal });
      for await (const chunk of events(response)) {
        take(node, chunk, times);
        drawSoon();
      }
    } catch (error) {
      if (error.name !== "AbortError") node.error = error.message;
    }
    node.stats = stats(node, times, began);
    state.running = null;
    keep();
  }

  function keep() {
    draw();
    store.save(state.conversation).catch((error) => toast(`This conversation could not be kept: ${error.message}`));
    refresh();
  }

  // ---------------------------------------------------------------- conversations

  async function refresh() {
    state.saved = await store.all();
    put(shelf, h("button", { type: "button", class: "new", onclick: () => begin() }, "New chat"), h("ul", null, state.saved.map((each) =>
      h("li", { class: each.id === state.conversation.id ? "here" : null },
        h("button", { type: "button", onclick: () => begin(each) }, each.title || "Untitled"),
        h("button", { type: "button", class: "act", "aria-label": `Forget ${each.title}`, onclick: () => forget(each) }, "×")))));
  }

  async function forget(conversation) {
    await store.remove(conversation.id);
    if (conversation.id === state.conversation.id) begin();
    else refresh();
  }

  function begin(conversation) {
    state.running?.abort();
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

function grow(field) {
  field.style.setProperty("height", "auto");
  field.style.setProperty("height", `${Math.min(field.scrollHeight, 320)}px`);
}

/** A message as the API takes it. */
function asMessage(node) {
  if (node.role === "tool") return { role: "tool", content: node.content, tool_call_id: node.tool_call_id };
  const message = { role: node.role, content: node.content };
  if (node.tool_calls?.length) message.tool_calls = node.tool_calls;
  return message;
}

/** Add a chunk of the stream to an answer. */
function take(node, chunk, times) {
  if (chunk.usage) times.usage = chunk.usage;
  if (chunk.prompt_token_ids) node.promptIds = chunk.prompt_token_ids;
  const [choice] = chunk.choices || [];
  if (!choice) return;
  const { delta } = choice;
  const says = delta.content || delta.reasoning || delta.reasoning_content || delta.tool_calls;
  if (says || choice.token_ids?.length) {
    times.last = performance.now();
    times.first ||= times.last;
  }
  node.content += delta.content || "";
  node.reasoning += delta.reasoning || delta.reasoning_content || "";
  node.ids.push(...(choice.token_ids || []));
  for (const part of delta.tool_calls || []) {
    const call = (node.tool_calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id ||= part.id || "";
    call.function.name += part.function?.name || "";
    call.function.arguments += part.function?.arguments || "";
  }
  if (choice.finish_reason) node.finish = choice.finish_reason;
}

/** What an answer cost, in words. */
function stats(node, { first, last, usage }, began) {
  if (!first) return null;
  const tokens = usage?.completion_tokens ?? node.ids.length;
  const seconds = (last - first) / 1000;
  const parts = [plural(tokens, "token")];
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(`first after ${duration((first - began) / 1000)}`);
  if (node.finish === "length") parts.push("cut at its length");
  if (!node.finish) parts.push("stopped");
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
  const title = usage ? `prompt of ${plural(usage.prompt_tokens, "token")}, ${count(cached)} of them from the prefix cache` : "";
  return { text: parts.join(" · "), title };
}

// One message of a chat: its text, its reasoning and calls, its branches, and what can be done about it.

import { copy, grow, h } from "./dom.js";
import { markdown } from "./markdown.js";
import * as store from "./store.js";

/** A message, with what can be done about it. */
export function message(chat, node) {
  if (chat.state.editing === node.id) return editor(chat, node);
  const body =
    node.role === "user"
      ? h("div", { class: "words" }, node.content)
      : h("div", { class: "prose" }, markdown(node.content || ""));
  const isWritten = chat.state.running && node.id === chat.state.conversation.leaf;
  if (isWritten) {
    const last = body.lastElementChild;
    (last?.tagName === "P" ? last : body).append(h("span", { class: "caret", "aria-label": "being written" }));
  }
  return h(
    "article",
    { class: `message ${node.role}`, "data-id": node.id },
    node.reasoning
      ? h(
          "details",
          { class: "thought", open: !node.content },
          h("summary", null, "Reasoning"),
          h("div", { class: "prose" }, markdown(node.reasoning)),
        )
      : null,
    node.role === "tool" ? h("p", { class: "label" }, `Result of ${node.name}`) : null,
    node.content || isWritten || !node.tool_calls?.length ? body : null,
    (node.tool_calls || []).map((call) => toolCall(chat, node, call)),
    node.error ? h("p", { class: "error", role: "alert" }, node.error) : null,
    isWritten ? null : footer(chat, node),
  );
}

function footer(chat, node) {
  const others = store.siblings(chat.state.conversation, node);
  const at = others.indexOf(node);
  const branch = (step) => () => {
    if (chat.state.running) return;
    store.follow(chat.state.conversation, others[at + step]);
    chat.keep();
  };
  const act = (label, work) =>
    h("button", { type: "button", class: "act", disabled: !!chat.state.running, onclick: work }, label);
  return h(
    "footer",
    null,
    others.length > 1
      ? h(
          "span",
          { class: "branches" },
          h(
            "button",
            { type: "button", class: "act", "aria-label": "earlier branch", disabled: at === 0, onclick: branch(-1) },
            "‹",
          ),
          `${at + 1} / ${others.length}`,
          h(
            "button",
            {
              type: "button",
              class: "act",
              "aria-label": "later branch",
              disabled: at === others.length - 1,
              onclick: branch(1),
            },
            "›",
          ),
        )
      : null,
    node.role === "user" ? act("Edit", () => ((chat.state.editing = node.id), chat.draw())) : null,
    node.role === "assistant" ? act("Retry", () => chat.answer(node.parent)) : null,
    node.role === "assistant" && node.content ? act("Copy", () => copy(node.content)) : null,
    node.ids?.length ? act("Tokens", () => inspect(node)) : null,
    node.stats ? h("span", { class: "stats", title: node.stats.title }, node.stats.text) : null,
  );
}

function inspect(node) {
  sessionStorage.setItem("ruvon.tokens", JSON.stringify({ prompt: node.promptIds, answer: node.ids }));
  location.hash = "tokens?from=chat";
}

function editor(chat, node) {
  const field = h("textarea", { value: node.content, "aria-label": "Edit the message" });
  const done = (asks) => {
    chat.state.editing = null;
    if (asks && field.value.trim()) {
      store.append(chat.state.conversation, node.parent, { role: "user", content: field.value });
      chat.answer(chat.state.conversation.leaf);
    } else chat.draw();
  };
  requestAnimationFrame(() => (grow(field), field.focus()));
  return h(
    "article",
    { class: "message user editing" },
    field,
    h(
      "footer",
      null,
      h("button", { type: "button", class: "primary", onclick: () => done(true) }, "Ask again"),
      h("button", { type: "button", class: "quiet", onclick: () => done(false) }, "Cancel"),
    ),
  );
}

function toolCall(chat, node, call) {
  const { conversation, running } = chat.state;
  const path = store.path(conversation);
  const after = path.slice(path.indexOf(node) + 1);
  const isOpen = !running && after.every((other) => other.role === "tool" && other.tool_call_id !== call.id);
  const result = h("textarea", {
    rows: 2,
    placeholder: "What the tool gives",
    "aria-label": `Result of ${call.function.name}`,
  });
  const give = () => {
    const fields = { content: result.value, tool_call_id: call.id, name: call.function.name };
    store.append(conversation, conversation.leaf, { role: "tool", ...fields });
    if (after.length + 1 === node.tool_calls.length) chat.answer(conversation.leaf);
    else chat.keep();
  };
  return h(
    "figure",
    { class: "call" },
    h("figcaption", null, "calls ", h("strong", null, call.function.name)),
    h("pre", null, h("code", null, call.function.arguments)),
    isOpen
      ? h(
          "div",
          { class: "give" },
          result,
          h("button", { type: "button", class: "primary", onclick: give }, "Give result"),
        )
      : null,
  );
}

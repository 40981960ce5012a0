// Requests to the server that this page came from, with the key that its reader has typed.

import { h } from "./dom.js";

const KEPT = "ruvon.key";

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function key() {
  return sessionStorage.getItem(KEPT) || localStorage.getItem(KEPT) || "";
}

/** A response; throws ApiError with what the server says. Asks for a key where one is missing. */
export async function request(path, { body, signal, method } = {}) {
  for (;;) {
    const headers = {};
    if (key()) headers.Authorization = `Bearer ${key()}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {
        method: method || (body === undefined ? "GET" : "POST"),
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer.", 0, "unreachable");
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    await askForKey(key() ? "This key is not one of the server's." : "This server needs a key.");
  }
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message, response.status, error.code);
  } catch {
    return new ApiError(`The server answered with status ${response.status}.`, response.status, "");
  }
}

/** The data of a stream of server-sent events, as objects. Throws ApiError for one that fails. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part
          .split("\n")
          .filter((line) => line.startsWith("data: "))
          .map((line) => line.slice(6))
          .join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, 200, event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let asking = null; // several requests may find out at once

function askForKey(why) {
  asking ??= new Promise((resolve) => {
    const field = h("input", {
      type: "password",
      id: "key",
      autocomplete: "current-password",
      spellcheck: "false",
      required: true,
    });
    const keep = h("input", { type: "checkbox", id: "keep" });
    const use = () => {
      if (!field.value) return;
      sessionStorage.removeItem(KEPT);
      localStorage.removeItem(KEPT);
      (keep.checked ? localStorage : sessionStorage).setItem(KEPT, field.value.trim());
      dialog.close();
    };
    field.addEventListener("keydown", (event) => event.key === "Enter" && use());
    const dialog = h(
      "dialog",
      { class: "key", "aria-labelledby": "key-title", oncancel: (event) => event.preventDefault() },
      h("h2", { id: "key-title" }, why),
      h("p", null, "It stays in this browser, and goes to this server only."),
      h("label", { for: "key" }, "API key"),
      field,
      h("label", { class: "check" }, keep, "Remember it on this device"),
      h("button", { class: "primary", type: "button", onclick: use }, "Continue"),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      asking = null;
      resolve();
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}

// Inside the model, for one prompt: what each head attends to, and what each layer would say next.

import { json } from "./api.js";
import { colour, context, h, plural, put, visible } from "./dom.js";
import { learn, texts } from "./vocabulary.js";

const PROMPT = "When Mary and John went to the store, John gave a drink to";
const MOST_THUMB = 44; // pixels of a head's small picture

export function open(root, server, query) {
  const it = { seen: null, layer: null, head: 0, at: null, stop: null };
  const prompt = h("textarea", { rows: 2, id: "prompt", value: query.get("prompt") ?? PROMPT, spellcheck: "false" });
  const go = h("button", { type: "button", class: "primary", onclick: () => look() }, "Look inside");
  const told = h(
    "p",
    { class: "soft", role: "status" },
    "The server computes the prompt once more, in plain float32, and shows what it saw on the way. The first time takes a few seconds.",
  );
  const body = h("div", { class: "inside" });
  put(
    root,
    h(
      "div",
      { class: "page attention" },
      h(
        "section",
        { class: "card" },
        h("label", { class: "field" }, h("span", null, "A prompt of up to 64 tokens"), prompt),
        h("div", { class: "row" }, told, go),
      ),
      body,
    ),
  );

  async function look() {
    it.stop?.abort();
    it.stop = new AbortController();
    go.disabled = true;
    try {
      const seen = await json("/debug/attention", { body: { prompt: prompt.value }, signal: it.stop.signal });
      await learn([...seen.tokens, ...seen.top_ids.flat(2)], it.stop.signal);
      seen.weights = Uint8Array.from(atob(seen.attention), (c) => c.charCodeAt(0));
      Object.assign(it, {
        seen,
        layer: clamp(it.layer ?? seen.num_layers / 3, seen.num_layers),
        head: clamp(it.head, seen.num_heads),
        at: seen.tokens.length - 1,
      });
      put(
        told,
        `${plural(seen.tokens.length, "token")}, ${plural(seen.num_layers, "layer")} of ${plural(seen.num_heads, "head")}.`,
      );
      draw();
    } catch (error) {
      if (error.name !== "AbortError") put(told, h("span", { class: "error" }, error.message));
    }
    go.disabled = false;
  }

  function draw() {
    if (!it.seen) return;
    const matrix = h("canvas", {
      class: "matrix",
      role: "img",
      "aria-label": `Attention of head ${it.head} of layer ${it.layer}`,
    });
    const heads = h("canvas", { class: "heads", role: "img", "aria-label": "All heads; choose one" });
    const sentence = h("div", { class: "sentence" });
    const choose = (layer, head) => {
      Object.assign(it, { layer, head });
      const { id } = document.activeElement; // a number's field, made anew
      draw();
      if (id) document.getElementById(id)?.focus();
    };
    const number = (label, key, most) =>
      h(
        "label",
        { class: "inline" },
        `${label} `,
        h("input", {
          type: "number",
          id: `pick-${key}`,
          min: 0,
          max: most - 1,
          value: it[key],
          onchange: (event) =>
            choose(
              key === "layer" ? clamp(event.target.value, most) : it.layer,
              key === "head" ? clamp(event.target.value, most) : it.head,
            ),
        }),
      );
    put(
      body,
      h(
        "div",
        { class: "two" },
        h(
          "section",
          { class: "card" },
          h("h2", null, "Heads"),
          h(
            "p",
            { class: "soft above" },
            "A row is a layer, a column a head. In each picture a row is a token that looks, a column one that it looks at.",
          ),
          h("div", { class: "scroll tall" }, heads),
        ),
        h(
          "section",
          { class: "card" },
          h(
            "div",
            { class: "between" },
            h("h2", null, `Layer ${it.layer}, head ${it.head}`),
            h(
              "span",
              { class: "pick" },
              number("layer", "layer", it.seen.num_layers),
              number("head", "head", it.seen.num_heads),
            ),
          ),
          matrix,
          h("p", { class: "soft above" }, "What the marked token takes from each; choose another."),
          sentence,
        ),
      ),
      h(
        "section",
        { class: "card" },
        h("h2", null, "What each layer would say next"),
        h(
          "p",
          { class: "soft above" },
          "The logit lens: the stream as it leaves a layer, through the last norm and the head, as if no layer followed. The deeper the colour, the surer.",
        ),
        lens(it),
      ),
    );
    const thumb = drawHeads(heads, it.seen, it);
    heads.addEventListener("click", (event) =>
      choose(
        clamp(Math.floor(event.offsetY / thumb), it.seen.num_layers),
        clamp(Math.floor(event.offsetX / thumb), it.seen.num_heads),
      ),
    );
    const paint = () => {
      drawMatrix(matrix, it);
      put(
        sentence,
        it.seen.tokens.map((id, key) =>
          h(
            "button",
            {
              type: "button",
              class: ["token", key === it.at ? "here" : ""].join(" "),
              style: { "--heat": `${key > it.at ? 0 : (100 * weight(it.seen, it.layer, it.head, it.at, key)) / 255}%` },
              title:
                key > it.at
                  ? "comes later"
                  : `${((100 * weight(it.seen, it.layer, it.head, it.at, key)) / 255).toFixed(0)} %`,
              onclick: () => ((it.at = key), paint(), sentence.children[key].focus()),
            },
            visible(texts.get(id) ?? ""),
          ),
        ),
      );
    };
    matrix.addEventListener("click", (event) => {
      it.at = clamp(Math.floor((event.offsetY / matrix.clientHeight) * it.seen.tokens.length), it.seen.tokens.length);
      paint();
    });
    paint();
  }

  addEventListener("repaint", draw);
  if (query.has("prompt")) look();
  return () => {
    it.stop?.abort();
    removeEventListener("repaint", draw);
  };
}

const clamp = (value, count) => Math.max(0, Math.min(Math.floor(Number(value)) || 0, count - 1));

/** What a query takes of a key, in 255ths. */
function weight({ weights, num_heads: heads, tokens }, layer, head, query, key) {
  const n = tokens.length;
  return weights[((layer * heads + head) * n + query) * n + key];
}

/** A head's picture within a box. */
function picture(drawing, seen, layer, head, x, y, size, ink) {
  const n = seen.tokens.length;
  const cell = size / n;
  drawing.fillStyle = ink;
  for (let query = 0; query < n; query++) {
    for (let key = 0; key <= query; key++) {
      const share = weight(seen, layer, head, query, key) / 255;
      if (share < 0.02) continue;
      drawing.globalAlpha = Math.sqrt(share);
      drawing.fillRect(x + key * cell, y + query * cell, Math.max(cell, 0.6), Math.max(cell, 0.6));
    }
  }
  drawing.globalAlpha = 1;
}

function drawHeads(canvas, seen, { layer, head }) {
  const thumb = Math.max(
    Math.min(Math.floor((canvas.parentElement.clientWidth - 20) / seen.num_heads), MOST_THUMB),
    14,
  );
  canvas.style.setProperty("width", `${thumb * seen.num_heads}px`);
  const drawing = context(canvas, thumb * seen.num_heads, thumb * seen.num_layers);
  const [ink, raised, accent] = ["ink", "raised", "accent"].map(colour);
  for (let i = 0; i < seen.num_layers; i++) {
    for (let k = 0; k < seen.num_heads; k++) {
      drawing.fillStyle = raised;
      drawing.fillRect(k * thumb, i * thumb, thumb - 3, thumb - 3);
      picture(drawing, seen, i, k, k * thumb, i * thumb, thumb - 3, ink);
    }
  }
  drawing.strokeStyle = accent;
  drawing.lineWidth = 2;
  drawing.strokeRect(head * thumb - 0.5, layer * thumb - 0.5, thumb - 2, thumb - 2);
  return thumb;
}

function drawMatrix(canvas, { seen, layer, head, at }) {
  const size = Math.min(canvas.parentElement.clientWidth - 36, 360);
  canvas.style.setProperty("width", `${size}px`);
  const drawing = context(canvas, size, size);
  drawing.fillStyle = colour("raised");
  drawing.fillRect(0, 0, size, size);
  picture(drawing, seen, layer, head, 0, 0, size, colour("accent"));
  const cell = size / seen.tokens.length;
  drawing.strokeStyle = colour("faint");
  drawing.strokeRect(0.5, at * cell + 0.5, size - 1, Math.max(cell - 1, 1));
}

/** The logit lens as a table: the deepest layer on top. */
function lens({ seen }) {
  const rows = seen.top_ids.map((ids, layer) =>
    h(
      "tr",
      null,
      h("th", { scope: "row" }, layer === 0 ? "embedding" : `layer ${layer - 1}`),
      ids.map((top, place) => {
        const probs = seen.top_probs[layer][place];
        const title = top
          .map((id, i) => `${visible(texts.get(id) ?? "")}  ${(100 * probs[i]).toFixed(1)} %`)
          .join("\n");
        return h(
          "td",
          { title, style: { "--heat": `${Math.round(100 * probs[0])}%` } },
          visible(texts.get(top[0]) ?? ""),
        );
      }),
    ),
  );
  const head = h(
    "tr",
    null,
    h("th", null, "behind"),
    seen.tokens.map((id) => h("th", { scope: "col" }, visible(texts.get(id) ?? ""))),
  );
  return h(
    "div",
    { class: "scroll lens", tabindex: "0" },
    h("table", null, h("thead", null, head), h("tbody", null, rows.reverse())),
  );
}

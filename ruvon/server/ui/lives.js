// The life of each sequence: when it came, what it waited for, what each step did for it.

import { duration, h, plural, s } from "./dom.js";

const MOST = 400; // lives

export class Lives {
  constructor() {
    this.all = new Map();
  }

  get(id, at) {
    if (!this.all.has(id)) {
      this.all.set(id, {
        id,
        came: at,
        known: false,
        prompt: null,
        phases: [{ kind: "queued", from: at, to: null, notes: [] }],
        tokens: 0,
        end: null,
      });
      if (this.all.size > MOST) this.all.delete(this.all.keys().next().value);
    }
    return this.all.get(id);
  }

  take(event) {
    if (event[0] === "arrival") {
      const life = this.get(event[2], event[1]);
      Object.assign(life, { known: true, request: event[3], prompt: event[4], most: event[5] });
    } else if (event[0] === "abort") {
      for (const id of event[2]) if (this.all.has(id)) this.end(this.all.get(id), event[1], "abort");
    } else this.step(event);
  }

  step([, at, number, plannedAt, rows, work, fresh, left, finished, , waits]) {
    for (const id of left) {
      const life = this.all.get(id);
      if (life && !life.end && life.phases.at(-1).kind !== "queued")
        this.enter(life, "queued", plannedAt, "preempted: its blocks went to others");
    }
    for (const [id, reason, amount] of waits) this.wait(this.get(id, plannedAt), at, reason, amount);
    for (const [id, cached] of fresh) {
      const life = this.get(id, plannedAt);
      this.enter(life, "prompt", plannedAt, cached ? `${plural(cached, "token")} found in the prefix cache` : null);
    }
    for (const [id, , , count, samples] of work) {
      const life = this.get(id, plannedAt);
      const phase = life.phases.at(-1);
      if (phase.kind === "prompt")
        phase.notes.push(
          `step ${number}: ${plural(count, "token")} of it computed${samples ? ", the next one sampled" : ""}`,
        );
    }
    for (const id of rows) {
      const life = this.get(id, plannedAt);
      life.tokens++;
      if (life.phases.at(-1).kind === "prompt") this.enter(life, "answer", at);
      else if (life.phases.at(-1).kind === "queued" && !life.end) this.enter(life, "answer", plannedAt);
    }
    for (const [id, reason] of finished) this.end(this.get(id, plannedAt), at, reason);
  }

  wait(life, at, reason, amount) {
    const phase = life.phases.at(-1);
    if (phase.kind !== "queued") return;
    phase.waits ??= [];
    const last = phase.waits.at(-1);
    if (last?.reason === reason) Object.assign(last, { amount, steps: last.steps + 1, to: at });
    else phase.waits.push({ reason, amount, steps: 1, from: at, to: at });
  }

  enter(life, kind, at, note = null) {
    life.phases.at(-1).to = at;
    life.phases.push({ kind, from: at, to: null, notes: note ? [note] : [] });
  }

  end(life, at, reason) {
    if (life.end) return;
    life.phases.at(-1).to = at;
    life.end = { at, reason };
  }
}

/** Why a sequence is not started, in words. */
export function why(reason, amount) {
  switch (reason) {
    case "places":
      return `no more may run beside the ${amount} that do`;
    case "blocks":
      return amount > 0
        ? `it needs more than the ${plural(amount, "block")} that the running ones leave`
        : "no block is free beyond what the running ones need next";
    case "prefix":
      return `sequence ${amount} computes the same beginning right now; it will share that`;
    default:
      return "enough others start in this step";
  }
}

const NAMES = { queued: "Waits", prompt: "Prompt", answer: "Answer" };
const ENDS = {
  stop: "ended by itself",
  length: "reached its length",
  abort: "nobody waited for it any more",
  error: "failed",
};

/** A life up to a moment, as a chart and a list. */
export function lifeOf(life, now, colour) {
  const phases = life.phases.filter((phase) => phase.from <= now);
  const until = Math.max(Math.min(life.end?.at ?? now, now), life.came + 1e-6);
  const x = (at) => (600 * (Math.min(at, until) - life.came)) / (until - life.came);
  const bars = phases.map((phase) => {
    const begin = x(phase.from);
    const width = Math.max(x(phase.to ?? until) - begin, 1.5);
    return s(
      "rect",
      { x: begin, y: 4, width, height: 16, rx: 2, class: `phase ${phase.kind}`, style: { "--own": colour } },
      s("title", null, NAMES[phase.kind]),
    );
  });
  const rows = phases.map((phase) => {
    const lasted = (phase.to === null || phase.to > now ? until : phase.to) - phase.from;
    const waits = (phase.waits || []).map((wait) =>
      h("li", null, `${plural(wait.steps, "step")}: ${why(wait.reason, wait.amount)}`),
    );
    if (phase.kind === "queued" && !phase.waits && lasted > 0.0005)
      waits.push(h("li", null, "for the next step to be planned, or behind others in the queue"));
    const notes =
      phase.notes.length > 6 ? [...phase.notes.slice(0, 5), `and ${phase.notes.length - 5} more`] : phase.notes;
    return h(
      "li",
      null,
      h("strong", null, NAMES[phase.kind]),
      h("span", { class: "num" }, duration(lasted)),
      h(
        "ul",
        null,
        notes.map((note) => h("li", null, note)),
        waits,
      ),
    );
  });
  const told = [
    life.prompt === null ? null : `prompt of ${plural(life.prompt, "token")}`,
    plural(life.tokens, "token") + " sampled",
  ]
    .filter(Boolean)
    .join(", ");
  return h(
    "div",
    { class: "life" },
    h(
      "p",
      { class: "soft" },
      `Sequence ${life.id}: ${told}${life.end && life.end.at <= now ? `; ${ENDS[life.end.reason] || life.end.reason} after ${duration(life.end.at - life.came)}` : ""}.`,
    ),
    s("svg", { viewBox: "0 0 600 24", preserveAspectRatio: "none", role: "img", "aria-label": told }, bars),
    h("ol", null, rows),
  );
}

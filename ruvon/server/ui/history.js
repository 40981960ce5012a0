// The engine's state at each of its steps, out of how it stood once and what happened since.
//
// The rules are the scheduler's own: blocks come with a step's work, and go when a sequence ends, is
// preempted or has moved its window on. Events and states are numbered alike: state n is the one
// behind event n.

const KEPT = 6000; // events
const EVERY = 150; // events between two states that are kept; those between are made again

/** A state out of what the server says first. */
export function stateOf({ made_of: madeOf, standing }) {
  const seqs = new Map(
    standing.sequences.map((each) => [
      each.id,
      {
        id: each.id,
        request: null,
        prompt: each.num_prompt,
        most: each.max_tokens,
        generation: each.generation,
        computed: each.num_computed,
        output: each.num_output,
        cached: each.num_cached,
        waits: each.waits || !each.tables.length,
        tables: each.tables,
        preempted: each.generation,
      },
    ]),
  );
  return {
    madeOf,
    seqs,
    cached: new Set(standing.cached),
    at: standing.now,
    step: null,
    waits: [],
    stats: null,
    freed: [],
  };
}

function copy(state) {
  const seqs = new Map(
    [...state.seqs].map(([id, seq]) => [id, { ...seq, tables: seq.tables.map((table) => table.slice()) }]),
  );
  return { ...state, seqs, cached: new Set(state.cached) };
}

/** What an event makes of a state, which it changes. */
export function apply(state, event) {
  state.at = event[1];
  if (event[0] === "arrival") {
    const [, , id, request, prompt, most] = event;
    state.seqs.set(id, {
      id,
      request,
      prompt,
      most,
      generation: 0,
      computed: 0,
      output: 0,
      cached: 0,
      waits: true,
      tables: [],
      preempted: 0,
    });
  } else if (event[0] === "abort") {
    for (const id of event[2]) end(state, id);
  } else step(state, event);
}

function step(state, event) {
  const [, , , , rows, work, fresh, left, finished, stats, waits] = event;
  const worked = new Set();
  for (const id of left) {
    const seq = state.seqs.get(id);
    if (!seq || seq.waits) continue;
    release(state, seq);
    Object.assign(seq, { waits: true, computed: 0, preempted: seq.preempted + 1 });
  }
  for (const [id, cached] of fresh) {
    const seq = state.seqs.get(id);
    if (!seq) continue;
    if (!seq.preempted) seq.cached = cached;
    Object.assign(seq, { waits: false, computed: cached });
  }
  for (const [id, generation, start, count, , blocks] of work) {
    const seq = state.seqs.get(id);
    if (!seq) continue;
    worked.add(id);
    Object.assign(seq, { generation, waits: false, computed: start + count });
    blocks.forEach((added, group) => {
      (seq.tables[group] ??= []).push(...added);
      for (const block of added) state.cached.delete(block);
    });
    slide(state, seq);
  }
  for (const id of rows) {
    const seq = state.seqs.get(id);
    if (!seq) continue;
    seq.output++;
    if (!worked.has(id)) {
      seq.computed++;
      slide(state, seq);
    }
  }
  for (const [id] of finished) end(state, id);
  Object.assign(state, { step: event, stats, waits });
}

/** Give back what a window no longer shows. */
function slide(state, seq) {
  const { windows, block_size: size } = state.madeOf;
  windows.forEach((window, group) => {
    if (!window || !seq.tables[group]) return;
    const first = Math.floor(Math.max(seq.computed - window + 1, 0) / size);
    for (let i = Math.min(first, seq.tables[group].length) - 1; i >= 0 && seq.tables[group][i]; i--) {
      if (state.madeOf.caching) state.cached.add(seq.tables[group][i]);
      seq.tables[group][i] = 0;
    }
  });
}

function release(state, seq) {
  const full = Math.floor(seq.computed / state.madeOf.block_size);
  for (const table of seq.tables) {
    table.forEach((block, i) => block && state.madeOf.caching && i < full && state.cached.add(block));
  }
  seq.tables = [];
}

function end(state, id) {
  const seq = state.seqs.get(id);
  if (!seq) return;
  release(state, seq);
  state.seqs.delete(id);
}

/** Who holds each block → [how many hold it, the first that does], a pair of arrays by block. */
export function holders(state) {
  const counts = new Uint16Array(state.madeOf.num_blocks + 1);
  const owners = new Int32Array(state.madeOf.num_blocks + 1).fill(-1);
  const groups = new Uint8Array(state.madeOf.num_blocks + 1);
  for (const seq of state.seqs.values()) {
    seq.tables.forEach((table, group) => {
      for (const block of table) {
        if (!block) continue;
        if (!counts[block]++) owners[block] = seq.id;
        groups[block] = group;
      }
    });
  }
  return { counts, owners, groups };
}

/** The events that are remembered, and the state behind each. */
export class History {
  constructor(begin) {
    this.begin(begin);
  }

  /** What was before counts no more: some events have been missed. */
  begin(begin) {
    this.latest = stateOf(begin);
    this.first = begin.standing.next; // the number of the oldest event
    this.events = [];
    this.steps = []; // the numbers of events that are steps
    this.frames = [[this.first - 1, copy(this.latest)]]; // states that are kept
  }

  get end() {
    return this.first + this.events.length;
  }

  push(event) {
    apply(this.latest, event);
    if (event[0] === "step") this.steps.push(this.end);
    this.events.push(event);
    if (this.events.length % EVERY === 0) this.frames.push([this.end - 1, copy(this.latest)]);
    if (this.events.length > KEPT + EVERY) this.drop();
  }

  drop() {
    const next = this.frames.findIndex(([number]) => number >= this.first + EVERY - 1);
    const [number] = this.frames[next];
    this.events.splice(0, number + 1 - this.first);
    this.frames.splice(0, next);
    this.first = number + 1;
    while (this.steps[0] < this.first) this.steps.shift();
  }

  /** Which free blocks can be found, as the server has it. */
  setCached(blocks) {
    this.latest.cached = new Set(blocks);
  }

  event(number) {
    return this.events[number - this.first];
  }

  /** The state behind an event; the latest one if there is no number. */
  state(number) {
    if (number === null || number >= this.end - 1) return this.latest;
    const [from, frame] = this.frames.findLast(([at]) => at <= number);
    const state = copy(frame);
    for (let at = from + 1; at <= number; at++) apply(state, this.event(at));
    return state;
  }
}

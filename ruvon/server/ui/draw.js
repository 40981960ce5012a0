// Two pictures of the engine: its cache's blocks, and its latest steps.

import { colour, context } from "./dom.js";
import { holders } from "./history.js";

/** A sequence's own colour: neighbours in number are far apart in hue. */
export function hue(id) {
  return `hsl(${(id * 137.508) % 360} 42% 56%)`;
}

const LARGEST = 20; // pixels of a block's cell
const HEIGHT = 300;

/** How cells lie in a canvas: {size, columns, rows}. */
export function layout(width, count) {
  let size = LARGEST;
  while (size > 2 && Math.ceil(count / Math.floor(width / size)) * size > HEIGHT) size--;
  const columns = Math.max(Math.floor(width / size), 1);
  return { size, columns, rows: Math.ceil(count / columns) };
}

export function drawBlocks(canvas, state, chosen) {
  const width = canvas.clientWidth;
  const count = state.madeOf.num_blocks;
  const { size, columns, rows } = layout(width, count);
  const drawing = context(canvas, width, rows * size);
  const { counts, owners, groups } = holders(state);
  const [free, cached, hatch] = ["cell-free", "cell-cached", "hatch"].map(colour);
  const fade = owners.includes(chosen) ? 0.3 : 1;
  const gap = size > 5 ? 1.5 : size > 3 ? 1 : 0;
  const numbers = { held: 0, shared: 0, cached: 0, free: 0, window: 0 };
  for (let block = 1; block <= count; block++) {
    const x = ((block - 1) % columns) * size;
    const y = Math.floor((block - 1) / columns) * size;
    const held = counts[block] > 0;
    drawing.globalAlpha = held && owners[block] !== chosen ? fade : 1;
    drawing.fillStyle = held ? hue(owners[block]) : state.cached.has(block) ? cached : free;
    drawing.fillRect(x, y, size - gap, size - gap);
    if (held && counts[block] > 1 && size > 4) {
      drawing.fillStyle = hatch;
      drawing.fillRect(x + (size - gap) / 2 - size / 7, y + (size - gap) / 2 - size / 7, size / 3.5, size / 3.5);
    }
    if (held && state.madeOf.windows[groups[block]] && size > 5) {
      drawing.fillStyle = hatch;
      drawing.fillRect(x, y + size - gap - 2, size - gap, 1);
    }
    if (held) numbers[counts[block] > 1 ? "shared" : "held"]++;
    else numbers[state.cached.has(block) ? "cached" : "free"]++;
    if (held && state.madeOf.windows[groups[block]]) numbers.window++;
  }
  drawing.globalAlpha = 1;
  return numbers;
}

/** The block under the mouse, in words. */
export function blockAt(canvas, state, event) {
  const { size, columns } = layout(canvas.clientWidth, state.madeOf.num_blocks);
  const box = canvas.getBoundingClientRect();
  const block =
    Math.floor((event.clientY - box.top) / size) * columns + Math.floor((event.clientX - box.left) / size) + 1;
  if (block < 1 || block > state.madeOf.num_blocks) return null;
  const owners = [...state.seqs.values()].filter((seq) => seq.tables.some((table) => table.includes(block)));
  const what = owners.length
    ? `held by ${owners.map((seq) => seq.id).join(", ")}`
    : state.cached.has(block)
      ? "free, and can be found as a prefix"
      : "free";
  return { block, owner: owners[0]?.id ?? null, text: `Block ${block}: ${what}` };
}

const BAR = 5;

/** The steps up to `last`: how many tokens of prompts and of answers each computed. */
export function drawSteps(canvas, history, last, chosen) {
  const width = canvas.clientWidth;
  const height = 84;
  const drawing = context(canvas, width, height);
  const fit = Math.floor(width / BAR);
  const until = last === null ? history.steps.length : history.steps.findLastIndex((number) => number <= last) + 1;
  const shown = history.steps.slice(Math.max(until - fit, 0), until);
  const most = history.latest.madeOf.max_tokens;
  const y = (tokens) => (height - 14) * Math.sqrt(tokens / most);
  const [accent, soft, line, bad] = ["accent", "cell-cached", "line", "bad"].map(colour);
  drawing.fillStyle = line;
  drawing.fillRect(0, 13, width, 1);
  shown.forEach((number, i) => {
    const [, , , , rows, work, , , , stats] = history.event(number);
    const x = width - (shown.length - i) * BAR;
    const several = work.reduce((sum, each) => sum + (each[3] > 1 ? each[3] : 0), 0);
    const single = rows.length - work.filter((each) => each[3] > 1 && each[4]).length;
    const total = y(several + single);
    drawing.fillStyle = soft;
    drawing.fillRect(x, height - total, BAR - 1, total);
    drawing.fillStyle = accent;
    const decode = several ? y(single) : total;
    drawing.fillRect(x, height - decode, BAR - 1, decode);
    if (stats[5]) {
      drawing.fillStyle = bad;
      drawing.beginPath();
      drawing.arc(x + BAR / 2, 6, 3, 0, 7);
      drawing.fill();
    }
    if (number === chosen) {
      drawing.strokeStyle = colour("ink");
      drawing.strokeRect(x - 1, 0.5, BAR + 1, height - 1);
    }
  });
  return { shown, at: (offset) => shown[shown.length - Math.ceil((width - offset) / BAR)] };
}

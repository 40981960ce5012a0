// Requests that show something: each is what a client would send, over the API. Prompts that go
// together go in one request, for browsers open few connections.

import { request } from "./api.js";

const STORY = "Once upon a time there was a queue that never stalled. "; // some twelve tokens

/** Let prompts be continued, all at once. */
async function complete(prompts, maxTokens, signal) {
  const body = {
    prompt: prompts,
    max_tokens: Math.max(maxTokens, 1),
    ignore_eos: true,
    temperature: 0.8,
    stream: true,
  };
  const reader = (await request("/v1/completions", { body, signal })).body.getReader();
  while (!(await reader.read()).done);
}

const wait = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
const times = (n, make) => Array.from({ length: n }, (_, i) => make(i + 1));
const stories = (n) => STORY.repeat(Math.max(1, Math.floor(n)));

export const LOADS = [
  {
    name: "Eight at once",
    title: "Eight short prompts: they are computed together, and their answers share every step",
    start: (madeOf, most, signal) =>
      complete(
        times(8, (i) => `Chapter ${i}. ${STORY}`),
        Math.min(120, most / 2),
        signal,
      ),
  },
  {
    name: "A long prompt meets streams",
    title: "Four answers run; then a long prompt comes, in pieces that leave room for them",
    start: async (madeOf, most, signal) => {
      const streams = complete(
        times(4, (i) => `Verse ${i}. ${STORY}`),
        Math.min(200, most / 2),
        signal,
      );
      await wait(0.5);
      await Promise.all([streams, complete([stories(most / 40)], 16, signal)]);
    },
  },
  {
    name: "One beginning, six ends",
    title: "Six prompts that begin alike: the blocks of the beginning are computed once, and shared",
    start: (madeOf, most, signal) =>
      complete(
        times(6, (i) => `${stories(most / 100)}End ${i}:`),
        Math.min(80, most / 4),
        signal,
      ),
  },
  {
    name: "More than there are places",
    title: "Half as many again as may run at once: the others wait",
    start: (madeOf, most, signal) =>
      complete(
        times(Math.min(Math.ceil(madeOf.max_seqs * 1.5), 256), (i) => `Page ${i}. ${STORY}`),
        Math.min(40, most / 2),
        signal,
      ),
  },
  {
    name: "Fill the cache",
    title: "Answers that need more blocks than there are: the last to come is preempted, and begins anew",
    start: async (madeOf, most, signal) => {
      const tokens = madeOf.num_blocks * madeOf.block_size;
      const number = Math.min(madeOf.max_seqs, 8);
      const each = Math.min(Math.ceil((1.5 * tokens) / number), Math.floor(0.9 * most)) - 30;
      if (number * each < 1.1 * tokens)
        throw new Error(
          `${number} sequences cannot fill this cache of ${tokens} tokens. Start the server with a small one to see a preemption: --kv-cache-memory 20MiB.`,
        );
      await complete(
        times(number, (i) => `Line ${i}. ${STORY}`),
        each,
        signal,
      );
    },
  },
];

// The texts of tokens, as the server's tokenizer has them.

import { json } from "./api.js";

const AT_ONCE = 2000; // ids in one question

/** id → text, of the tokens that have been met. */
export const texts = new Map();

/** Ask for the texts of tokens that have not been met. */
export async function learn(ids, signal) {
  const wanted = [...new Set(ids)].filter((id) => !texts.has(id));
  for (let i = 0; i < wanted.length; i += AT_ONCE) {
    const some = wanted.slice(i, i + AT_ONCE);
    const { token_strs: strings } = await json("/detokenize", {
      body: { tokens: some, return_token_strs: true },
      signal,
    });
    some.forEach((id, k) => texts.set(id, strings[k]));
  }
}

// From a stream's chunks to a message of a conversation, and back to what the API takes.

import { count, duration, plural } from "./dom.js";

/** A message as the API takes it. */
export function asMessage(node) {
  if (node.role === "tool") return { role: "tool", content: node.content, tool_call_id: node.tool_call_id };
  const message = { role: node.role, content: node.content };
  if (node.tool_calls?.length) message.tool_calls = node.tool_calls;
  return message;
}

/** Add a chunk of the stream to an answer. */
export function take(node, chunk, times) {
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
export function stats(node, { first, last, usage }, began) {
  if (!first) return null;
  const tokens = usage?.completion_tokens ?? node.ids.length;
  const seconds = (last - first) / 1000;
  const parts = [plural(tokens, "token")];
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(`first after ${duration((first - began) / 1000)}`);
  if (node.finish === "length") parts.push("cut at its length");
  if (!node.finish) parts.push("stopped");
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
  const title = usage
    ? `prompt of ${plural(usage.prompt_tokens, "token")}, ${count(cached)} of them from the prefix cache`
    : "";
  return { text: parts.join(" · "), title };
}

// Anthropic's JavaScript client.

import assert from "node:assert/strict";
import test from "node:test";

import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.env.RUVON_URL, apiKey: "none", maxRetries: 0 });
const model = "scripted";
const call = 'call: add {"a":1,"b":2}';
const tools = [
  {
    name: "add",
    input_schema: {
      type: "object",
      properties: { a: { type: "integer" }, b: { type: "integer" } },
    },
  },
];
const ask = (content, more) => ({
  model,
  max_tokens: 256,
  messages: [{ role: "user", content }],
  ...more,
});

test("models", async () => {
  const ids = [];
  for await (const found of client.models.list()) ids.push(found.id);
  assert.deepEqual(ids, [model]);
});

test("a message", async () => {
  const answer = await client.messages.create(ask("say: one two", { system: "Obey." }));
  assert.equal(answer.content[0].text, "one two");
  assert.equal(answer.stop_reason, "end_turn");
});

test("the stream helper", async () => {
  const stream = client.messages.stream(ask("say: one two"));
  let text = "";
  stream.on("text", (delta) => (text += delta));
  assert.equal(await stream.finalText(), "one two");
  assert.equal(text, "one two");
});

test("a tool loop, streamed", async () => {
  const first = await client.messages.stream(ask(call, { tools })).finalMessage();
  assert.equal(first.stop_reason, "tool_use");
  const [use] = first.content;
  assert.deepEqual(use.input, { a: 1, b: 2 });
  const messages = [
    { role: "user", content: call },
    { role: "assistant", content: first.content },
    { role: "user", content: [{ type: "tool_result", tool_use_id: use.id, content: "3" }] },
  ];
  const second = await client.messages.create({ model, max_tokens: 64, messages, tools });
  assert.equal(second.content[0].text, "It says 3");
});

test("count_tokens", async () => {
  const messages = [{ role: "user", content: "Hello" }];
  assert.ok((await client.messages.countTokens({ model, messages })).input_tokens > 0);
});

test("errors", async () => {
  await assert.rejects(
    client.messages.create(ask("Hi", { temperature: 9 })),
    Anthropic.BadRequestError,
  );
  await assert.rejects(
    client.messages.create({ ...ask("Hi"), model: "claude-opus-4" }),
    Anthropic.NotFoundError,
  );
});

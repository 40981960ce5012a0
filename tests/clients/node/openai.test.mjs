// The official JavaScript client.

import assert from "node:assert/strict";
import test from "node:test";

import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({
  baseURL: `${process.env.RUVON_URL}/v1`,
  apiKey: "none",
  maxRetries: 0,
});
const model = "scripted";
const Person = z.object({ name: z.string(), age: z.number().int() });
const ann = { name: "Ann", age: 30 };
const say = 'say: {"name":"Ann","age":30}';
const call = 'call: add {"a":1,"b":2}';
const parameters = {
  type: "object",
  properties: { a: { type: "integer" }, b: { type: "integer" } },
  required: ["a", "b"],
  additionalProperties: false,
};
const user = (content) => [{ role: "user", content }];

test("models", async () => {
  const ids = [];
  for await (const found of client.models.list()) ids.push(found.id);
  assert.deepEqual(ids, [model]);
});

test("chat, whole and streamed", async () => {
  const whole = await client.chat.completions.create({ model, messages: user("say: one two") });
  assert.equal(whole.choices[0].message.content, "one two");
  const stream = await client.chat.completions.create({
    model,
    messages: user("say: one two"),
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, "one two");
  assert.ok(usage.completion_tokens > 0);
});

test("chat's stream helper", async () => {
  const stream = client.chat.completions.stream({ model, messages: user("say: one two") });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  assert.equal(await stream.finalContent(), "one two");
  assert.equal(text, "one two");
  assert.ok((await stream.totalUsage()).total_tokens >= 0);
});

test("chat.parse", async () => {
  const answer = await client.chat.completions.parse({
    model,
    messages: user(say),
    response_format: zodResponseFormat(Person, "person"),
  });
  assert.deepEqual(answer.choices[0].message.parsed, ann);
});

test("chat.runTools, streamed and whole", async () => {
  for (const stream of [false, true]) {
    const added = [];
    const runner = client.chat.completions.runTools({
      model,
      stream,
      messages: user(call),
      tools: [
        {
          type: "function",
          function: {
            name: "add",
            parameters,
            parse: JSON.parse,
            function: ({ a, b }) => {
              added.push([a, b]);
              return String(a + b);
            },
          },
        },
      ],
    });
    assert.equal(await runner.finalContent(), "It says 3");
    assert.deepEqual(added, [[1, 2]]);
  }
});

test("responses: whole, streamed, parsed", async () => {
  const whole = await client.responses.create({ model, input: "say: one two" });
  assert.equal(whole.output_text, "one two");
  const stream = await client.responses.create({ model, input: "say: one two", stream: true });
  let text = "";
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, "one two");
  const parsed = await client.responses.parse({
    model,
    input: say,
    text: { format: zodTextFormat(Person, "person") },
  });
  assert.deepEqual(parsed.output_parsed, ann);
});

test("responses' stream helper and tool loop", async () => {
  const tools = [{ type: "function", name: "add", parameters, strict: true }];
  const first = await client.responses.stream({ model, input: call, tools }).finalResponse();
  const [item] = first.output;
  assert.deepEqual(JSON.parse(item.arguments), { a: 1, b: 2 });
  const second = await client.responses.create({
    model,
    tools,
    previous_response_id: first.id,
    input: [{ type: "function_call_output", call_id: item.call_id, output: "3" }],
  });
  assert.equal(second.output_text, "It says 3");
});

test("completions", async () => {
  const answer = await client.completions.create({ model, prompt: "say: text" });
  assert.equal(answer.choices[0].text, "text");
});

test("embeddings, whose numbers come as base64", async () => {
  const floats = { model, input: "one", encoding_format: "float" };
  const [plain, packed] = await Promise.all([
    client.embeddings.create(floats),
    client.embeddings.create({ model, input: "one" }),
  ]);
  assert.equal(plain.data[0].embedding.length, packed.data[0].embedding.length);
});

test("errors", async () => {
  const wrong = { model: "gpt-4o", messages: user("Hi") };
  await assert.rejects(client.chat.completions.create(wrong), OpenAI.NotFoundError);
  const hot = { model, messages: user("Hi"), temperature: 9 };
  await assert.rejects(client.chat.completions.create(hot), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
});

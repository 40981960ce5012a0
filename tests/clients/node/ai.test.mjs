// The AI SDK, over its provider for servers like OpenAI's, OpenAI's own and Anthropic's.

import assert from "node:assert/strict";
import test from "node:test";

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = `${process.env.RUVON_URL}/v1`;
const options = { baseURL, apiKey: "none" };
const compatible = createOpenAICompatible({
  ...options,
  name: "ruvon",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI(options);
const models = {
  "openai-compatible": compatible("scripted"),
  "openai chat": openai.chat("scripted"),
  "openai responses": openai.responses("scripted"),
  anthropic: createAnthropic(options)("scripted"),
};
const Person = z.object({ name: z.string(), age: z.number().int() });
const call = 'call: add {"a":1,"b":2}';
const tools = {
  add: tool({
    description: "Add two numbers.",
    inputSchema: z.object({ a: z.number().int(), b: z.number().int() }),
    execute: async ({ a, b }) => a + b,
  }),
};

for (const [name, model] of Object.entries(models)) {
  const once = { model, maxRetries: 0 };

  test(`${name}: generateText`, async () => {
    const { text, usage } = await generateText({ ...once, prompt: "say: one two" });
    assert.equal(text, "one two");
    assert.ok(usage.outputTokens > 0);
  });

  test(`${name}: streamText`, async () => {
    const result = streamText({ ...once, prompt: "say: one two", system: "Obey." });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    assert.equal(text, "one two");
    assert.ok((await result.usage).inputTokens > 0);
  });

  test(`${name}: a tool loop`, async () => {
    const loop = { ...once, tools, prompt: call, stopWhen: stepCountIs(3) };
    const { text, steps } = await generateText(loop);
    assert.equal(text, "It says 3");
    assert.deepEqual(steps[0].toolCalls[0].input, { a: 1, b: 2 });
  });

  test(`${name}: a tool loop, streamed`, async () => {
    const result = streamText({ ...once, tools, prompt: call, stopWhen: stepCountIs(3) });
    assert.equal(await result.text, "It says 3");
    assert.equal((await result.steps).length, 2);
  });

  test(`${name}: a required tool`, async () => {
    const { toolCalls } = await generateText({ ...once, tools, toolChoice: "required", prompt: call });
    assert.equal(toolCalls[0].toolName, "add");
  });

  test(`${name}: typed output`, async () => {
    const { output } = await generateText({
      ...once,
      output: Output.object({ schema: Person }),
      // Where the provider knows no better of a model, it asks for a call of a tool named json.
      prompt: `${name === "anthropic" ? "call: json" : "say:"} {"name":"Ann","age":30}`,
    });
    assert.deepEqual(output, { name: "Ann", age: 30 });
  });
}

test("openai-compatible: embed", async () => {
  const { embedding } = await embed({
    model: compatible.embeddingModel("scripted"),
    value: "one",
    maxRetries: 0,
  });
  assert.ok(embedding.length > 0);
});

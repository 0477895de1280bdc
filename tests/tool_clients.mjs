// A round of call, result and answer with each JavaScript client: node tool_clients.mjs ADDRESS
import assert from "node:assert/strict";
import { HumanMessage } from "@langchain/core/messages";
import { tool as langchainTool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodFunction } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = process.argv[2];
const city = z.object({ city: z.string() });

async function openaiNode(stream) {
  const asked = [];
  const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
  const weather = zodFunction({
    name: "weather",
    parameters: city,
    function: (given) => asked.push(given) && "sunny",
  });
  const runner = client.chat.completions.runTools({
    model: "test",
    messages: [{ role: "user", content: "How is the weather?" }],
    tools: [weather],
    stream,
  });
  assert.equal(await runner.finalContent(), "done");
  assert.equal(asked.length, 1);
  const question = runner.messages.slice(0, -1);
  const again = await client.chat.completions.create({ model: "test", messages: question });
  assert.equal(again.choices[0].message.content, "done");
}

async function aiSdk(stream) {
  const asked = [];
  const model = createOpenAICompatible({ name: "ours", baseURL, apiKey: "none" })("test");
  const weather = tool({
    description: "the weather",
    inputSchema: city,
    execute: async (given) => asked.push(given) && { sky: "sunny" },
  });
  const ask = stream ? streamText : generateText;
  const answer = await ask({
    model,
    prompt: "How is the weather?",
    tools: { weather },
    stopWhen: stepCountIs(3),
    maxRetries: 0,
  });
  assert.equal(await answer.text, "done");
  const steps = await answer.steps;
  assert.deepEqual(steps.map((step) => step.finishReason), ["tool-calls", "stop"]);
  assert.equal(asked.length, 1);
}

async function langchain(stream) {
  const weather = langchainTool(async ({ city }) => `sunny in ${city}`, {
    name: "weather",
    description: "the weather",
    schema: city,
  });
  const chat = new ChatOpenAI({
    model: "test",
    apiKey: "none",
    configuration: { baseURL },
    maxRetries: 0,
  }).bindTools([weather]);
  async function ask(messages) {
    if (!stream) return chat.invoke(messages);
    let whole;
    for await (const piece of await chat.stream(messages)) {
      whole = whole ? whole.concat(piece) : piece;
    }
    return whole;
  }
  const question = new HumanMessage("How is the weather?");
  const answer = await ask([question]);
  assert.equal(answer.tool_calls.length, 1);
  const result = await weather.invoke(answer.tool_calls[0]);
  assert.equal((await ask([question, answer, result])).content, "done");
}

for (const stream of [false, true]) {
  await openaiNode(stream);
  await aiSdk(stream);
  await langchain(stream);
}

// A round of call, result and answer with each JavaScript client of the agents' two dialects:
// node agent_clients.mjs ADDRESS
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const url = process.argv[2];
const city = z.object({ city: z.string() });
const question = [{ role: "user", content: "How is the weather?" }];
const same = { model: "test" };

async function openaiNode(stream) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const tools = [zodResponsesFunction({ name: "weather", parameters: city })];
  const ask = async (how) =>
    stream
      ? await client.responses.stream({ ...same, tools, ...how }).finalResponse()
      : await client.responses.parse({ ...same, tools, ...how });
  for (const store of [false, true]) {
    const first = await ask({ input: question, store });
    const call = first.output.find((item) => item.type === "function_call");
    assert.ok(city.parse(call.parsed_arguments));
    const result = { type: "function_call_output", call_id: call.call_id, output: "sunny" };
    const second = store
      ? await ask({ input: [result], previous_response_id: first.id })
      : await ask({ input: [...question, ...first.output, result], store });
    assert.equal(second.output_text, "done");
  }
  const format = zodTextFormat(city, "weather");
  const parsed = await client.responses.parse({ ...same, input: "where?", text: { format } });
  assert.ok(city.parse(parsed.output_parsed));
}

async function anthropicNode(stream) {
  const asked = [];
  const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
  const weather = betaZodTool({
    name: "weather",
    description: "the weather",
    inputSchema: city,
    run: (given) => asked.push(given) && "sunny",
  });
  const how = { ...same, max_tokens: 1000, messages: question };
  const runner = client.beta.messages.toolRunner({ ...how, tools: [weather], stream });
  let last;
  for await (const step of runner) last = stream ? await step.finalMessage() : step;
  assert.equal(last.content.at(-1).text, "done");
  assert.equal(asked.length, 1);
  const output_config = { format: zodOutputFormat(city) };
  const parsed = await client.messages.parse({ ...how, output_config });
  assert.ok(city.parse(parsed.parsed_output));
}

async function aiSdk(model, stream) {
  const asked = [];
  const weather = tool({
    description: "the weather",
    inputSchema: city,
    execute: async (given) => asked.push(given) && { sky: "sunny" },
  });
  const ask = stream ? streamText : generateText;
  const how = { model, tools: { weather }, stopWhen: stepCountIs(3), maxRetries: 0 };
  const answer = await ask({ ...how, messages: question });
  assert.equal(await answer.text, "done");
  const steps = await answer.steps;
  assert.deepEqual(steps.map((step) => step.finishReason), ["tool-calls", "stop"]);
  assert.equal(asked.length, 1);
  const { messages } = await answer.response;
  const more = [...question, ...messages, { role: "user", content: "And now?" }];
  assert.ok((await generateText({ ...how, tools: {}, messages: more })).text.length > 0);
  const typed = await generateObject({ model, schema: city, prompt: "where?", maxRetries: 0 });
  assert.ok(city.parse(typed.object));
}

const ours = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" }).responses("test");
const theirs = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" })("test");
for (const stream of [false, true]) {
  await openaiNode(stream);
  await anthropicNode(stream);
  await aiSdk(ours, stream);
  await aiSdk(theirs, stream);
}

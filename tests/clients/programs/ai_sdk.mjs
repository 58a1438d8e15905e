// Vercel's AI SDK, with its OpenAI-compatible provider and with OpenAI's (responses).

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { KEY, MODEL, PROMPT, URL, check, run } from "./harness.mjs";

const options = { baseURL: `${URL}/v1`, apiKey: KEY, name: "finetunellm" };
const model = createOpenAICompatible({ ...options, supportsStructuredOutputs: true })(MODEL);
const responses = createOpenAI(options)(MODEL);
const tools = {
  get_weather: tool({
    description: "weather",
    inputSchema: z.object({ city: z.string() }),
    execute: async () => "sunny",
  }),
};

await run({
  chat: async () => {
    const { text, usage } = await generateText({ model, prompt: "hello" });
    check(text === "Hello, Ada." && usage.totalTokens > 0, text);
  },
  stream: async () => {
    const { textStream } = streamText({ model, prompt: "hello" });
    let text = "";
    for await (const part of textStream) text += part;
    check(text === "Hello, Ada.", text);
  },
  "tool loop": async () => {
    const { text } = await generateText({ model, prompt: PROMPT, tools, stopWhen: stepCountIs(3) });
    check(text === "It is sunny.", text);
  },
  "structured output": async () => {
    const schema = z.object({ name: z.string(), age: z.number().int() });
    const { object } = await generateObject({ model, prompt: "hello", schema });
    check(object.name === "Ada" && object.age === 36, object);
  },
  responses: async () => {
    const { text } = await generateText({ model: responses, prompt: "hello" });
    check(text === "Hello, Ada.", text);
  },
  "responses with tools": async () => {
    const { text } = await generateText({
      model: responses,
      prompt: PROMPT,
      tools,
      stopWhen: stepCountIs(3),
    });
    check(text === "It is sunny.", text);
  },
  cancel: async () => {
    const abort = new AbortController();
    const { textStream } = streamText({ model, prompt: "hello", abortSignal: abort.signal });
    for await (const _ of textStream) abort.abort();
  },
});

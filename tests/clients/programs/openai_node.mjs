// OpenAI's client for Node: chat completions and responses.

import OpenAI from "openai";
import { KEY, MODEL, PROMPT, URL, check, run } from "./harness.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY });
const messages = [{ role: "user", content: "hello" }];

await run({
  chat: async () => {
    const got = await client.chat.completions.create({ model: MODEL, messages });
    check(got.choices[0].message.content === "Hello, Ada.", got);
  },
  stream: async () => {
    const events = client.chat.completions.stream({ model: MODEL, messages });
    check((await events.finalContent()) === "Hello, Ada.", "content");
  },
  "tool runner": async () => {
    const runner = client.chat.completions.runTools({
      model: MODEL,
      messages: [{ role: "user", content: PROMPT }],
      tools: [
        {
          type: "function",
          function: {
            name: "get_weather",
            parameters: { type: "object", properties: { city: { type: "string" } } },
            parse: JSON.parse,
            function: () => "sunny",
          },
        },
      ],
    });
    check((await runner.finalContent()) === "It is sunny.", "content");
  },
  responses: async () => {
    const got = await client.responses.create({ model: MODEL, input: "hello" });
    check(got.output_text === "Hello, Ada.", got);
  },
  "responses streamed": async () => {
    const events = await client.responses.create({ model: MODEL, input: "hello", stream: true });
    let last;
    for await (const event of events) last = event;
    check(last.type === "response.completed", last);
  },
  "typed error": async () => {
    try {
      await client.chat.completions.create({ model: MODEL, messages, temperature: 9 });
    } catch (error) {
      check(error instanceof OpenAI.BadRequestError && error.code === "invalid_request", error);
      return;
    }
    throw new Error("no error");
  },
});

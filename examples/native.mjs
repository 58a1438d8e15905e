// Send a request over plain NATS from Node, print the answer, and resume it after a lost message.
//
//     npm install @nats-io/transport-node
//     node examples/native.mjs "What is your name?"

import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { connect, nkeyAuthenticator } from "@nats-io/transport-node";

const servers = process.env.NATS_URL ?? `127.0.0.1:${process.env.NATS_PORT ?? 4222}`;
const prompt = process.argv.slice(2).join(" ") || "Hello!";
const id = randomUUID();
const seed = process.env.NATS_CREDS; // the file of an nkey: `just secrets show client`
const inboxPrefix = process.env.NATS_INBOX_PREFIX || "_INBOX";
const key = () => new TextEncoder().encode(readFileSync(seed, "utf8").trim());
const authenticator = seed ? nkeyAuthenticator(key()) : undefined;
const nc = await connect({ servers, authenticator, inboxPrefix });

// All attempts at this request: another worker may continue the answer.
const events = nc.subscribe(`chat.reply._.${id}.*`, { timeout: 5000 });
const request = { prompt, request_id: id, session_id: "node" };
nc.publish("chat.request", JSON.stringify(request), { reply: `chat.reply._.${id}.1` });

let length = 0; // of the answer so far, in characters (not UTF-16 units): the next offset

function show(event) {
  if (event.type !== "token" || event.offset > length) return;
  const characters = [...event.text];
  process.stdout.write(characters.slice(length - event.offset).join(""));
  length = event.offset + characters.length;
}

for await (const message of events) {
  if (message.data.length === 0) throw new Error("No worker is running.");
  const event = message.json();
  if (event.type === "token" && event.offset > length) {
    // a message was lost: the worker has kept the answer
    const body = JSON.stringify({ offset: length });
    const replay = await nc.request(`chat.replay._.${id}`, body, { timeout: 2000 });
    replay.json().events.forEach(show);
  }
  show(event);
  if (event.type === "failed") throw new Error(`${event.code}: ${event.message}`);
  if (event.type === "done") break;
}
console.log();
await nc.close();

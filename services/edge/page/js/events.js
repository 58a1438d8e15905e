// Server-sent events from a fetch, as EventSource can send neither a body nor a key.
// https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

// Yield {id, data} of each event; `data` is parsed JSON.
export async function* readEvents(stream) {
  let event = { id: null, data: [] };
  for await (const line of readLines(stream)) {
    if (line === "") {
      if (event.data.length) yield { id: event.id, data: JSON.parse(event.data.join("\n")) };
      event = { id: null, data: [] };
      continue;
    }
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "data") event.data.push(value);
    else if (field === "id") event.id = value;
  }
}

async function* readLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      yield* lines;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

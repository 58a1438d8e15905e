// One running answer: it starts, is followed through lost connections and reloads, and ends.
//
// The request and its Idempotency-Key are kept in localStorage before anything is sent. A repeat of
// the request with the key returns the same answer, running or finished, from any edge; with
// Last-Event-ID only the rest of it. So there is one way to start, to reconnect and to reload.

import { ApiError, request, toSentence } from "./api.js";
import { readEvents } from "./events.js";
import { load, names, newId, save } from "./storage.js";

const KEPT_MILLISECONDS = 20 * 3600 * 1000; // the server keeps keys for a day
const FIRST_PAUSE = 300;
const LONGEST_PAUSE = 5000;
// codes of an edge that restarts, or of the proxy in front of it: another try has the answer
const PASSING = ["shutting_down", "bus_unavailable", "edge_lost", "no_edge"];

export class RunningAnswer {
  phase = "connecting"; // then waiting, prefill, answering; reconnecting, stopping; done, failed, left
  reasoning = "";
  calls = [];
  progress = null;
  started = null;
  done = null;
  error = null;
  #lastId = null;
  #abort = new AbortController();
  #onChange;

  // `record` is what `newRecord` made; `onChange` is called after each change.
  constructor(record, onChange) {
    this.record = record;
    this.content = record.body.prefix ?? "";
    this.#onChange = onChange;
  }

  get session() {
    return this.record.body.session_id;
  }

  // The answer's id on the server; null until the server has replied for the first time.
  get requestId() {
    return this.record.requestId ?? null;
  }

  get isEnded() {
    return ["done", "failed", "left"].includes(this.phase);
  }

  get hasText() {
    return this.content !== "" || this.reasoning !== "" || this.calls.length > 0;
  }

  // Seconds of reasoning; null if it was not watched.
  get reasoningSeconds() {
    const { thoughtFrom, thoughtTo } = this.record;
    return thoughtFrom && thoughtTo ? (thoughtTo - thoughtFrom) / 1000 : null;
  }

  // Follow the answer to its end. Its record stays until the page has seen what was stored.
  async run() {
    let pause = FIRST_PAUSE;
    while (!this.isEnded) {
      try {
        const before = this.#lastId;
        await this.#read();
        if (!this.isEnded) throw new TypeError("the stream was cut");
        if (this.#lastId !== before) pause = FIRST_PAUSE;
      } catch (error) {
        if (this.isEnded) break;
        if (!this.#isPassing(error)) {
          this.#fail(error);
          break;
        }
        if (this.phase !== "stopping") this.#set("reconnecting");
        await online(Math.max(pause, (error.retryAfter ?? 0) * 1000));
        pause = Math.min(pause * 2, LONGEST_PAUSE);
      }
    }
  }

  // End the answer; the server keeps the text so far. Before the server has replied, the first call
  // waits for that, as the answer may have begun; the second one does not, nor one while offline.
  async stop() {
    const isWaiting = this.phase === "connecting";
    this.#set("stopping");
    if (this.requestId) {
      await request(`chat/${this.requestId}`, { method: "DELETE" }).catch((error) =>
        this.#fail(error),
      );
    } else if (!isWaiting) {
      this.leave();
    }
  }

  // Stop following, as the session is deleted, or as the answer is not known to have begun.
  leave() {
    this.phase = "left";
    this.#abort.abort();
  }

  async #read() {
    const headers = { "Idempotency-Key": this.record.key };
    if (this.#lastId) headers["Last-Event-ID"] = this.#lastId;
    const response = await request("chat?progress=true", {
      method: "POST",
      json: this.record.body,
      headers,
      signal: this.#abort.signal,
    });
    const isNew = !this.requestId;
    this.record.requestId = response.headers.get("Content-Location").split("/").pop();
    this.#keep();
    if (isNew && this.phase === "stopping") this.stop();
    for await (const { id, data } of readEvents(response.body)) {
      if (id !== null) this.#lastId = id;
      this.#take(data);
      this.#onChange(this);
    }
  }

  #take(data) {
    if ("token" in data) {
      this.#thinkUntilNow();
      this.content += data.token;
      this.#answer();
    } else if ("reasoning" in data) {
      this.reasoning += data.reasoning;
      this.#thinkFromNow();
      this.#answer();
    } else if ("tool_call" in data) {
      this.#thinkUntilNow();
      this.#takeCall(data.tool_call);
      this.#answer();
    } else if ("progress" in data) {
      this.progress = data.progress;
      this.#wait(data.progress);
    } else if ("started" in data) {
      this.started = data.started;
      if (!this.hasText && this.phase !== "stopping") this.phase = "prefill";
    } else if (data.done) {
      this.#thinkUntilNow();
      this.done = data;
      this.phase = "done";
    } else if ("error" in data) {
      this.#fail(new ApiError(200, { message: data.error, ...data }));
    }
  }

  #answer() {
    if (this.phase !== "stopping") this.phase = "answering";
  }

  // An answer that has begun waits, too: while another worker goes on with it.
  #wait({ queue_position: place, prompt_tokens: all, prefilled_tokens: prefilled }) {
    if (this.phase === "stopping") return;
    if (place) this.phase = "waiting";
    else this.phase = this.hasText && prefilled === all ? "answering" : "prefill";
  }

  #takeCall({ index, id, name, arguments: more }) {
    this.calls[index] ??= { id, function: { name, arguments: "" } };
    this.calls[index].function.arguments += more;
  }

  #thinkFromNow() {
    if (this.record.thoughtFrom) return;
    this.record.thoughtFrom = Date.now();
    this.#keep();
  }

  #thinkUntilNow() {
    if (!this.record.thoughtFrom || this.record.thoughtTo) return;
    this.record.thoughtTo = Date.now();
    this.#keep();
  }

  // Forget the record: nothing more is to come.
  forget() {
    this.#replaceRecord(null);
  }

  #keep() {
    this.#replaceRecord(this.record);
  }

  // Unless another tab has seen the end of the answer, or has asked for the next one.
  #replaceRecord(record) {
    const name = `running.${this.session}`;
    if (load(name, null)?.key === this.record.key) save(name, record);
  }

  // Whether another try may get the answer. One that has begun waits for whatever may pass.
  #isPassing(error) {
    if (!(error instanceof ApiError)) return error instanceof TypeError; // a lost connection
    if (PASSING.includes(error.code) || isOfProxy(error)) return true;
    return this.requestId !== null && error.retryAfter !== null;
  }

  #fail(error) {
    this.#thinkUntilNow();
    this.error = { text: toSentence(error), code: error.code ?? "", traceId: error.traceId ?? "" };
    this.#set("failed");
  }

  #set(phase) {
    this.phase = phase;
    this.#onChange(this);
  }
}

// Return what is kept of a request, so that it can be repeated. `more` is for the page.
export function newRecord(body, more = {}) {
  return { key: newId(), body, at: Date.now(), ...more };
}

// Return the records of answers that ran when the page was closed.
export function keptRecords() {
  const found = [];
  for (const session of names("running")) {
    const record = load(`running.${session}`, null);
    if (record?.key && Date.now() - record.at < KEPT_MILLISECONDS) found.push(record);
    else save(`running.${session}`, null);
  }
  return found;
}

function isOfProxy(error) {
  return error.code === "" && [502, 503, 504].includes(error.status);
}

// Wait, but no longer than until the network is back.
export function online(milliseconds) {
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      removeEventListener("online", end);
      resolve();
    };
    const timer = setTimeout(end, milliseconds);
    addEventListener("online", end);
  });
}

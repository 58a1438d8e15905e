// The parts of the service: what is wrong, the workers, the history, and failures.

import { html } from "../../vendor/preact.js";
import { count } from "../format.js";
import { ago, bytes, clock, plural, rate, whole } from "./format.js";

const MOST_SQUARES = 32;
const STATES = {
  ready: { text: "Ready", kind: "good" },
  loading: { text: "Loading", kind: "busy" },
  draining: { text: "Draining", kind: "busy" },
  failed: { text: "Failed", kind: "bad" },
};
const KINDS = { chat: "chat", embedding: "embeddings", rerank: "reranker" };

// --- what is wrong ---

export function Problems({ snapshot }) {
  const problems = findProblems(snapshot);
  return html`<div class="problems" role="status">
    ${problems.map(
      ({ text, kind }) => html`<p key=${text} data-kind=${kind}><${Sentence} text=${text} /></p>`,
    )}
  </div>`;
}

// Text of the server, which has code in backquotes.
function Sentence({ text }) {
  return text.split("`").map((part, number) => (number % 2 ? html`<code>${part}</code>` : part));
}

function findProblems({ error, needsKey, status, fleet, fleetAt, isStale }) {
  const found = [];
  if (needsKey) found.push({ kind: "warn", text: "This server needs an API key; that of an admin shows everything." });
  else if (error) found.push({ kind: "bad", text: error });
  else if (!status.nats_connected)
    found.push({
      kind: "bad",
      text: "The server has lost its connection to NATS: requests fail until it is back.",
    });
  if (isStale && fleetAt)
    found.push({
      kind: "note",
      text: `The figures below are from ${clock(fleetAt)}. New ones follow by themselves.`,
    });
  if (isStale || !fleet) return found;
  if (!fleet.model_loaded) found.push(noModel(fleet));
  if (fleet.history === null)
    found.push({ kind: "bad", text: "The history service does not reply: chats of sessions fail." });
  if (fleet.history?.warning) found.push({ kind: "warn", text: fleet.history.warning });
  return found;
}

function noModel({ workers }) {
  if (workers?.some(({ state }) => state === "loading"))
    return { kind: "warn", text: "No model is ready yet: one is loading." };
  if (!workers) return { kind: "bad", text: "No model is ready: requests fail." };
  if (workers.length)
    return { kind: "bad", text: "No model is ready: requests fail. The workers below say why." };
  return {
    kind: "bad",
    text: "No worker reports: requests fail. Start one, or look at its log.",
  };
}

// --- the parts in a row ---

export function Tiles({ snapshot }) {
  const { fleet, status, isStale } = snapshot;
  const shown = tiles(fleet).map((tile) => (isStale ? { ...tile, kind: "off" } : tile));
  return html`<dl class="tiles">
    ${[natsTile(status, snapshot.error), ...shown].map(
      ({ name, value, note, kind }) => html`<div class="tile" key=${name} data-kind=${kind}>
        <dt>${name}</dt>
        <dd><b>${value}</b><span class="hint">${note}</span></dd>
      </div>`,
    )}
  </dl>`;
}

function natsTile({ nats_connected: isConnected }, error) {
  const value = isConnected ? "Connected" : "Disconnected";
  const kind = error ? "off" : isConnected ? "good" : "bad";
  return { name: "NATS", value, note: "for all services", kind };
}

function tiles(fleet) {
  const { workers, nats_connected: isConnected } = fleet;
  if (!isConnected) return []; // nothing is known
  if (!workers) return [modelTile(fleet), mongoTile(fleet)];
  return [workersTile(workers), slotsTile(workers), historyTile(fleet), mongoTile(fleet)];
}

function modelTile({ model, model_loaded: isLoaded }) {
  const [note, kind] = isLoaded ? ["ready", "good"] : ["not ready", "bad"];
  return { name: "Model", value: model?.name ?? "None", note, kind };
}

function workersTile(workers) {
  const ready = workers.filter(({ state }) => state === "ready");
  const models = new Set(ready.map(({ name }) => name));
  return {
    name: "Workers",
    value: `${count(ready.length)} of ${count(workers.length)}`,
    note: `ready, ${plural(models.size, "model")}`,
    kind: kindOf(ready.length, workers),
  };
}

function kindOf(ready, workers) {
  if (ready === workers.length && ready) return "good";
  return ready || workers.some(({ state }) => state === "loading") ? "warn" : "bad";
}

function slotsTile(workers) {
  const ready = workers.filter(({ state }) => state === "ready");
  const sum = (name, of = workers) => of.reduce((total, worker) => total + worker[name], 0);
  const [slots, waiting, queue] = [sum("slots", ready), sum("waiting"), sum("queue", ready)];
  return {
    name: "Slots",
    value: `${count(sum("running"))} of ${count(slots)}`,
    note: `${count(waiting)} of ${count(queue)} waiting`,
    kind: slots ? (waiting >= queue ? "warn" : "good") : "off",
  };
}

function historyTile({ history }) {
  if (!history) return { name: "History", value: "Silent", note: "does not reply", kind: "bad" };
  if (history.refuses) return { name: "History", value: "Refuses", note: history.refuses, kind: "bad" };
  const note = `${whole(history.log_records)} records`;
  return { name: "History", value: "Replies", note, kind: history.warning ? "warn" : "good" };
}

function mongoTile({ history, database_connected: isConnected }) {
  const lag = history?.unarchived;
  if (!isConnected && history?.database_expected) {
    const note = `${whole(lag)} to archive once it is back`;
    return { name: "MongoDB", value: "Disconnected", note, kind: "bad" };
  }
  if (!isConnected) return { name: "MongoDB", value: "Not used", note: "it is optional", kind: "off" };
  const note = lag ? `${count(lag)} to archive` : "all is archived";
  return { name: "MongoDB", value: "Connected", note: history ? note : "the archive", kind: "good" };
}

// --- workers ---

export function Workers({ workers }) {
  if (!workers.length) return html`<p class="hint">No worker has reported in the last 3 seconds.</p>`;
  const sorted = [...workers].sort((one, other) =>
    `${one.name} ${one.worker_id}`.localeCompare(`${other.name} ${other.worker_id}`),
  );
  return html`<ul class="workers">
    ${sorted.map((worker) => html`<${Worker} key=${worker.worker_id} worker=${worker} />`)}
  </ul>`;
}

function Worker({ worker }) {
  const { state, model, name, kind, error } = worker;
  return html`<li class="worker">
    <div class="worker-head">
      <h3>${name || "No model"}</h3>
      <span class="badge" data-kind=${STATES[state].kind}>${STATES[state].text}</span>
    </div>
    <p class="hint">
      ${KINDS[kind]}${model && ` · context ${count(model.context)} · ${bytes(model.bytes)}`}
    </p>
    ${state === "loading" && html`<${Loading} share=${worker.progress} />`}
    ${state === "draining" &&
    html`<p class="hint">It finishes its answers and takes no new requests.</p>`}
    ${error && html`<p class="reason" data-kind=${state === "failed" ? "bad" : "warn"}><${Sentence} text=${error} /></p>`}
    ${worker.adapter_faults.map(
      (fault) => html`<p class="reason" data-kind="warn" key=${fault}><${Sentence} text=${fault} /></p>`,
    )}
    ${(state === "ready" || state === "draining") && html`<${Load} worker=${worker} />`}
    ${model?.adapters.length > 0 &&
    html`<p class="hint">Adapters: ${model.adapters.map((each) => each.split(":").at(-1)).join(", ")}</p>`}
    <p class="hint id" title=${worker.worker_id}>Worker ${worker.worker_id.slice(0, 8)}</p>
  </li>`;
}

function Loading({ share }) {
  const text = share >= 1 ? "Loaded, warming up" : `${Math.floor(share * 100)} % is loaded`;
  return html`<div class="loading">
    <progress max="1" value=${share} aria-label="Loaded share of the model"></progress>
    <span class="hint">${text}</span>
  </div>`;
}

function Load({ worker }) {
  const { running, slots, waiting, queue, queued_tokens: tokens, tokens_per_second: speed } = worker;
  return html`<${Squares} running=${running} slots=${slots} />
    <dl class="facts-of-worker">
      <div><dt>Slots</dt><dd>${count(running)} of ${count(slots)}</dd></div>
      <div><dt>Waiting</dt><dd>${count(waiting)} of ${count(queue)}</dd></div>
      <div><dt>Tokens to compute for them</dt><dd>${count(tokens)}</dd></div>
      <div><dt>Speed while computing</dt><dd>${speed ? `${rate(speed)} tokens/s` : "–"}</dd></div>
    </dl>`;
}

// One square for each slot, filled if it is taken.
function Squares({ running, slots }) {
  if (slots > MOST_SQUARES) return null;
  const squares = Array.from({ length: slots }, (_, number) => number < running);
  return html`<div class="squares" aria-hidden="true">
    ${squares.map((isTaken, number) => html`<i key=${number} data-taken=${isTaken}></i>`)}
  </div>`;
}

// --- history ---

export function History({ history, isConnected }) {
  if (!history) return html`<p class="hint">The history service does not reply.</p>`;
  const { log_bytes: size, log_limit: limit } = history;
  const isArchived = isConnected || history.database_expected;
  return html`<dl class="history">
    <${Fact} name="Log" value=${size === null ? "–" : bytes(size)}
      note=${limit ? `of ${bytes(limit)}` : "no limit but the disk"}>
      ${limit > 0 &&
      size !== null &&
      html`<meter min="0" max=${limit} high=${limit * 0.8} value=${size}
        aria-label="Used share of the log"></meter>`}
    <//>
    <${Fact} name="Records" value=${whole(history.log_records)} note="in the log" />
    <${Fact} name="Lag" value=${isArchived ? whole(history.unarchived) : "–"}
      note=${isArchived ? "records that MongoDB lacks" : "no MongoDB to archive to"} />
    <${Fact} name="Waiting" value=${whole(history.waiting)} note="requests to history" />
    <${Fact} name="Rejected" value=${whole(history.overloaded)} note="since its start" />
    <${Fact} name="Unreadable" value=${whole(history.unreadable)} note="records" />
    ${history.dropped > 0 &&
    html`<${Fact} name="Dropped" value=${whole(history.dropped)} note="records, to make room" />`}
  </dl>`;
}

function Fact({ name, value, note, children }) {
  return html`<div>
    <dt>${name}</dt>
    <dd><b>${value}</b> <span class="hint">${note}</span>${children}</dd>
  </div>`;
}

// --- failures ---

export function Failures({ failures, now }) {
  if (!failures.length) return html`<p class="hint">None since the server started.</p>`;
  const hasTenants = failures.some(({ tenant }) => tenant && tenant !== "_");
  return html`<div class="table failures" tabindex="0" role="region" aria-label="Recent failures">
    <table>
      <thead>
        <tr>
          <th scope="col">When</th>
          <th scope="col">Error</th>
          <th scope="col">Model</th>
          ${hasTenants && html`<th scope="col">Key</th>`}
          <th scope="col">Request</th>
        </tr>
      </thead>
      <tbody>
        ${failures.map(
          ({ at, code, model, tenant, request_id: id, count: times }) => html`<tr key=${at + id}>
            <td>
              <time datetime=${at} title=${new Date(at).toLocaleString("en")}>
                ${ago(now * 1000 - new Date(at).getTime())}
              </time>
            </td>
            <td><code>${code}</code>${times > 1 && html` <span class="hint">${count(times)} times</span>`}</td>
            <td>${model ?? "–"}</td>
            ${hasTenants && html`<td>${tenant ?? "–"}</td>`}
            <td><code>${id}</code></td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

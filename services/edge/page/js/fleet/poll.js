// What the server says about itself, asked again each second while somebody looks.

import { requestJson, toSentence } from "../api.js";

const INTERVAL = 1000; // milliseconds, as are the next
const EDGE_LOST = 15_000; // without a reply from an edge, after which it is forgotten

// The last reply, and what is shown of earlier ones while the server or NATS is away.
class Snapshot {
  status = null; // the last reply
  fleet = null; // the last reply of an edge that was connected to NATS, if there is one
  fleetAt = 0; // when that was; 0: not yet
  error = null; // the reason why the last request failed, as a sentence
  needsKey = false;
  edges = new Map(); // by id: the last activity of each edge that replied lately, and when
  edgeId = null; // the edge whose activity is plotted

  // Whether the figures are older than they should be.
  get isStale() {
    return this.error !== null || this.status?.nats_connected === false;
  }

  get activity() {
    return this.edges.get(this.edgeId)?.activity ?? null;
  }

  // Failures of all edges, newest first.
  get failures() {
    const all = [...this.edges.values()].flatMap(({ activity }) => activity.failures);
    return all.sort((one, other) => other.at.localeCompare(one.at));
  }

  take(status) {
    const now = Date.now();
    this.status = status;
    this.error = null;
    if (status.nats_connected || !this.fleetAt) this.fleet = status;
    if (status.nats_connected) this.fleetAt = now;
    if (status.activity) this.#takeActivity(status.activity, now);
  }

  fail(error) {
    this.error = toSentence(error);
    this.needsKey = error.status === 401;
  }

  // A proxy may ask another edge each time. The plots stay with one, as long as it replies.
  #takeActivity(activity, now) {
    this.edges.set(activity.edge_id, { activity, at: now });
    for (const [id, { at }] of this.edges) if (now - at > EDGE_LOST) this.edges.delete(id);
    if (!this.edges.has(this.edgeId)) this.edgeId = activity.edge_id;
  }
}

// Ask until the returned function is called. `onChange` gets the snapshot, the same each time.
export function watch(onChange) {
  const snapshot = new Snapshot();
  let timer = null;
  let isAsking = false;

  const ask = async () => {
    clearTimeout(timer);
    if (document.hidden || isAsking || snapshot.needsKey) return;
    isAsking = true;
    try {
      snapshot.take(await requestJson("status?activity=true"));
    } catch (error) {
      snapshot.fail(error);
    }
    isAsking = false;
    if (timer === undefined) return;
    onChange(snapshot);
    timer = setTimeout(ask, INTERVAL);
  };

  document.addEventListener("visibilitychange", ask);
  ask();
  return () => {
    document.removeEventListener("visibilitychange", ask);
    clearTimeout(timer);
    timer = undefined;
  };
}

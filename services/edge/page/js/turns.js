// A conversation as turns: a prompt with its answer, and the versions that it replaced.

// Return turns of exchanges, which are oldest first. A retried exchange stands right before the one
// that replaces it.
export function groupTurns(messages) {
  const turns = [];
  let versions = [];
  for (const message of messages) {
    versions.push(message);
    if (message.retried) continue;
    turns.push({ id: versions[0].id, versions });
    versions = [];
  }
  if (versions.length) turns.push({ id: versions[0].id, versions });
  return turns;
}

const CUT = {
  length: "The answer reached the limit of its length.",
  cancelled: "The answer was stopped.",
  timeout: "The answer ran out of time.",
  failed: "The answer was interrupted by a fault.",
  loop: "The answer was stopped because it repeated itself.",
};

// Return why an answer is not complete; undefined if it is.
export function whyCut(finishReason) {
  return CUT[finishReason];
}

// Return a conversation as the lines of an import, up to an exchange.
export function linesUpTo(exported, lastId, newId) {
  const lines = parse(exported);
  const end = lines.findIndex((line) => line.request_id === lastId);
  const kept = lines.slice(0, end + 1);
  const replaced = new Set(kept.map((line) => line.retry_of).filter(Boolean));
  return kept
    .filter((line) => !replaced.has(line.request_id))
    .map((line) => copy(line, { request_id: newId() }))
    .join("\n");
}

// Return one exchange as a line of an import, with some fields changed.
export function copyOf(exported, id, changes) {
  return copy(parse(exported).find((line) => line.request_id === id), changes);
}

function parse(exported) {
  return exported.split("\n").filter(Boolean).map((line) => JSON.parse(line));
}

// Of the feedback only a correction is copied, which the model sees: a rating counts once.
function copy({ retry_of: _, turn: __, feedback, ...line }, changes) {
  const kept = feedback?.correction ? { feedback: { correction: feedback.correction } } : {};
  return JSON.stringify({ ...line, ...kept, ...changes });
}

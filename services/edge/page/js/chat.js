// What people do in a conversation: send, stop, retry, edit, continue, compare.

import { RunningAnswer, keptRecords, newRecord, online } from "./answer.js";
import { branch, describe, findSession, leaveNew, loadSessions, reloadMessages } from "./sessions.js";
import { announce, notify, state, update } from "./store.js";
import { load, save } from "./storage.js";

const RETRY_MILLISECONDS = 1000;

// --- model, reasoning and sampling of a session ---

const METADATA = "chat_page"; // the name under which the server keeps them with the session

// Return a session's settings. What the server does not have yet is in this browser.
export function settings(id) {
  return load(`settings.${id}`, null) ?? parse(findSession(id)?.metadata[METADATA]);
}

function parse(text) {
  try {
    return JSON.parse(text ?? "{}");
  } catch {
    return {}; // written by another program
  }
}

export async function saveSettings(id, values) {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== "");
  save(`settings.${id}`, Object.fromEntries(given));
  update();
  await moveSettings(id);
}

// Move settings to the server, once it has the session. If that fails, the next answer moves them.
async function moveSettings(id) {
  const session = findSession(id);
  const values = load(`settings.${id}`, null);
  if (!session || !values) return;
  const metadata = { ...session.metadata, [METADATA]: JSON.stringify(values) };
  const isMoved = await describe(id, { metadata }).then(() => true, () => false);
  if (isMoved) save(`settings.${id}`, null);
  update();
}

// --- asking ---

// Ask in the open session. `compare` is a second model, which answers after the first one.
export function send(prompt, { compare = null } = {}) {
  const { model } = settings(state.chat.id);
  begin(newRecord(body({ prompt }), compare && compare !== model ? { compare } : {}));
}

// Replace the last exchange: by another answer, or by the answer to another prompt.
export function retry(message, { prompt = message.user_prompt, model } = {}) {
  const changes = { prompt, retry_of: message.id };
  if (model) changes.model = model;
  if (message.tool_results.length) changes.tool_results = message.tool_results;
  begin(newRecord(body(changes)));
}

// Let the model go on where its answer was cut.
export function continueAnswer(message) {
  const prefix = message.model_response;
  const changes = { prompt: message.user_prompt, retry_of: message.id, prefix };
  if (message.tool_results.length) changes.tool_results = message.tool_results;
  begin(newRecord(body(changes)));
}

// Send a changed prompt. Before other exchanges, this makes a branch.
export async function edit(turns, number, prompt) {
  const message = turns[number].versions.at(-1);
  if (number === turns.length - 1) {
    retry(message, { prompt });
    return;
  }
  const target = await branch(number ? turns[number - 1].versions.at(-1).id : null);
  if (state.chat.id === target) send(prompt);
  else save(`draft.${target}`, prompt); // people have gone elsewhere meanwhile
}

export function stop(id = state.chat.id) {
  state.running.get(id)?.stop();
}

// Ask again after a failure, with the same request.
export function again(answer) {
  state.running.delete(answer.session);
  const { body: asked, compare } = answer.record;
  begin(newRecord(asked, compare ? { compare } : {}));
}

// Take an answer away that has not come to anything; a new prompt goes back to its field, before
// what was written there meanwhile.
export function dismiss(answer) {
  const { session, record } = answer;
  state.running.delete(session);
  answer.forget();
  if (!record.body.retry_of) {
    const draft = [record.body.prompt, load(`draft.${session}`, "")];
    save(`draft.${session}`, draft.filter(Boolean).join("\n\n"));
  }
  update({ dismissed: answer });
}

// Follow the answers that ran when the page was closed, or that another tab has started.
export function resumeAll() {
  for (const record of keptRecords()) {
    const known = state.running.get(record.body.session_id);
    const isFollowed = known && (known.phase !== "failed" || known.record.key === record.key);
    if (!isFollowed) start(record);
  }
}

function body(changes) {
  const { thinking, ...sampling } = settings(state.chat.id);
  const asked = { session_id: state.chat.id, ...sampling, ...changes };
  if (thinking === "off") asked.enable_thinking = false;
  else if (thinking) asked.reasoning_effort = thinking;
  return asked;
}

// Ask for a new answer. It is kept first, so that a reload and other tabs follow it.
function begin(record) {
  save(`running.${record.body.session_id}`, record);
  start(record);
}

async function start(record) {
  const id = record.body.session_id;
  const answer = new RunningAnswer(record, update.bind(null, {}));
  state.running.set(id, answer);
  if (record.beside) state.sideBySide.add(record.beside);
  announce("Waiting for the answer.");
  leaveNew(id);
  update();
  await answer.run();
  if (answer.phase === "failed") await showFailure(answer);
  else if (answer.phase === "done") await finish(answer);
  else if (state.running.get(id) === answer) dismiss(answer); // it was stopped before it began
}

async function finish(answer) {
  const id = answer.session;
  const isStopped = answer.done.finish_reason === "cancelled";
  announce(isStopped ? "Stopped." : "The answer is complete.");
  if (isStopped && !answer.hasText) {
    dismiss(answer);
    return;
  }
  const isOpen = () => isOpened(answer);
  await loadStored(answer);
  if (answer.reasoningSeconds !== null) state.thought.set(answer.requestId, answer.reasoningSeconds);
  answer.forget();
  if (isOpen() && !isStored(answer)) {
    answer.phase = "failed";
    answer.error = { text: whyNotStored(answer), code: "", traceId: "" };
    update();
    return;
  }
  state.running.delete(id);
  update();
  if (wantsSecond(answer)) compare(answer);
  else resumeAll(); // another tab may have asked for the next one
}

// A part of an answer may be stored: then it can be continued, or replaced, like any other. For
// want of a key, the request is kept: it is sent again when the page has one.
async function showFailure(answer) {
  if (answer.error.code !== "unauthorized") answer.forget();
  if (!isOpened(answer)) announce(answer.error.text); // else it is an alert
  if (answer.hasText && isOpened(answer)) await reloadMessages();
  if (isOpened(answer) && isStored(answer)) {
    state.running.delete(answer.session);
    notify(answer.error.text, "error");
  }
  update();
}

function isOpened(answer) {
  return state.chat?.id === answer.session;
}

function wantsSecond({ record, done }) {
  return Boolean(record.compare) && done.finish_reason !== "cancelled";
}

// Load what the server has stored of an answer, however long that takes: until then it is shown as
// it was received.
async function loadStored(answer) {
  const isOpen = () => isOpened(answer);
  for (;;) {
    try {
      await loadSessions();
      await moveSettings(answer.session);
      if (isOpen()) await reloadMessages();
      if (!isOpen() || !state.chat.error) return;
    } catch {
      // the next try may reach the server
    }
    await online(RETRY_MILLISECONDS);
  }
}

function compare({ record, requestId }) {
  const { compare: model, body: asked } = record;
  // a key that follows from the first one: another tab that also watches does not ask twice
  const key = `${record.key}-2`;
  begin({ ...newRecord({ ...asked, model, retry_of: requestId }, { beside: requestId }), key });
}

export function isStored(answer) {
  return state.chat.messages.some((message) => message.id === answer.requestId);
}

function whyNotStored(answer) {
  if (answer.done.stored === "none") return "The model had nothing to say. Try again, or ask otherwise.";
  return "The answer could not be stored, so it is only shown here. Copy it if you need it.";
}

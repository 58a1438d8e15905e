// The sessions on the server, and the one that is open.

import { request, requestJson, toSentence } from "./api.js";
import { fileName } from "./format.js";
import { announce, notify, state, update } from "./store.js";
import { load, newId, save } from "./storage.js";
import { copyOf, linesUpTo } from "./turns.js";

const SESSIONS_PAGE = 50;
const MESSAGES_PAGE = 40;
const ALL = 1000; // of a page, at most
const TITLE_LENGTH = 200;

const path = (session) => `sessions/${encodeURIComponent(session)}`;

// --- the list ---

export async function loadSessions() {
  const limit = Math.min(Math.max(state.sessions.length, SESSIONS_PAGE), ALL);
  const page = await requestJson(`sessions?limit=${limit}`);
  const older = state.sessions.slice(limit);
  update({ sessions: [...page.sessions, ...older], areSessionsLoaded: true });
  if (!older.length) update({ nextSessions: page.next, hasMoreSessions: page.next !== null });
}

export async function loadMoreSessions(limit = SESSIONS_PAGE) {
  if (!state.nextSessions) return;
  const page = await requestJson(`sessions?limit=${limit}&before=${state.nextSessions}`);
  const known = new Set(state.sessions.map((session) => session.id));
  const more = page.sessions.filter((session) => !known.has(session.id));
  update({
    sessions: [...state.sessions, ...more],
    nextSessions: page.next,
    hasMoreSessions: page.next !== null,
  });
}

// Return a session as the list has it, however old it is; undefined if the server has not got it.
export async function listed(id) {
  if (!findSession(id)) await loadSessions();
  while (!findSession(id) && state.nextSessions) await loadMoreSessions(ALL);
  return findSession(id);
}

// Search needs all titles: the server has no search.
export async function search(text) {
  update({ search: text });
  while (text && state.search === text && state.nextSessions) await loadMoreSessions(ALL);
}

export function foundSessions() {
  const wanted = state.search.trim().toLowerCase();
  if (!wanted) return [...begunSessions(), ...state.sessions];
  return state.sessions.filter((session) => session.title.toLowerCase().includes(wanted));
}

export function findSession(id) {
  return state.sessions.find((session) => session.id === id);
}

// Return the sessions whose first answer runs: the server lists them when it has ended.
function begunSessions() {
  return [...state.running.values()]
    .filter((answer) => !findSession(answer.session))
    .map((answer) => ({
      id: answer.session,
      last_activity: answer.record.at,
      isBegun: true,
    }));
}

// Return the title; of a session without exchanges, the prompt that is being answered, if one is.
export function titleOf(id) {
  const running = state.running.get(id)?.record.body.prompt.slice(0, TITLE_LENGTH);
  return findSession(id)?.title || running || "New chat";
}

// --- the address ---

export function sessionHash(id) {
  return `#/s/${encodeURIComponent(id)}`;
}

// Show what the address names: `#/`, `#/s/<session>`, `#/status`.
export async function openAddress() {
  const [, view, id] = location.hash.split("/");
  const session = view === "s" && id ? decodeURIComponent(id) : null;
  update({ route: { view: view === "status" ? "status" : "chat", session }, isSidebarOpen: false });
  const isOpen = session === null ? state.chat?.isNew : state.chat?.id === session;
  if (view !== "status" && !isOpen) await openSession(session);
}

export async function go(hash) {
  history.pushState(null, "", hash);
  await openAddress();
}

// --- the open session ---

// Show a session, or (null) a new one, which the server knows once something is asked in it.
async function openSession(id) {
  const isNew = id === null;
  const chat = { id: id ?? newId(), isNew, messages: [], next: null, isLoading: !isNew, error: null };
  update({ chat });
  if (!isNew) await Promise.all([reloadMessages(), listed(id)]);
}

// Load the end of the open session again, and keep what was loaded of its beginning.
export async function reloadMessages() {
  const { chat } = state;
  const number = (chat.asked = (chat.asked ?? 0) + 1);
  try {
    const page = await requestJson(`${path(chat.id)}/messages?limit=${MESSAGES_PAGE}`);
    if (number < chat.shown) return; // a later request was faster
    chat.shown = number;
    const end = page.messages.reverse();
    const known = new Set(end.map((message) => message.id));
    const earlier = chat.messages.filter((message) => !known.has(message.id));
    // without an overlap, something in between would be missing
    const isEarlierKept = earlier.length > 0 && earlier.length < chat.messages.length && page.next;
    chat.messages = isEarlierKept ? [...earlier, ...end] : end;
    if (!isEarlierKept) chat.next = page.next;
    chat.isComplete = page.is_complete;
    chat.error = null;
  } catch (error) {
    chat.error = toSentence(error);
  }
  chat.isLoading = false;
  update();
}

export async function loadEarlier() {
  const { chat } = state;
  const { next } = chat;
  const page = await requestJson(`${path(chat.id)}/messages?limit=${MESSAGES_PAGE}&before=${next}`);
  if (chat.next !== next) return; // they were loaded meanwhile
  chat.messages = [...page.messages.reverse(), ...chat.messages];
  chat.next = page.next;
  update();
}

// Look for what other devices did.
export async function refresh() {
  const { chat } = state;
  const before = chat && findSession(chat.id);
  await loadSessions();
  const now = chat && findSession(chat.id);
  // a session that is not listed is an old one, or was deleted
  const isStale = !chat.isNew && (!now || now.last_activity !== before?.last_activity);
  if (!isStale || state.running.has(chat.id)) return;
  const wasShown = chat.messages.length > 0;
  await reloadMessages();
  const isDeleted = !now && wasShown && !chat.messages.length && !chat.error;
  if (isDeleted) notify("This conversation was deleted elsewhere.");
}

// --- changes ---

export async function describe(id, description) {
  await requestJson(path(id), { method: "PATCH", json: description });
  await loadSessions();
  leaveNew(id);
}

// Note that the open session, if it is this one, is on the server now, or about to be.
export function leaveNew(id) {
  const { chat } = state;
  if (chat?.id !== id || !chat.isNew) return;
  chat.isNew = false;
  history.replaceState(null, "", sessionHash(id));
  update({ route: { view: "chat", session: id } });
}

export async function removeSession(id) {
  await request(path(id), { method: "DELETE" });
  state.running.get(id)?.leave();
  state.running.delete(id);
  for (const kind of ["settings", "draft", "running"]) save(`${kind}.${id}`, null);
  update({ sessions: state.sessions.filter((session) => session.id !== id) });
  if (state.chat?.id === id) await go("#/");
  announce("The conversation is deleted.");
}

export async function exportSession(id) {
  const response = await request(`${path(id)}/export`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = `${fileName(findSession(id)?.title ?? "chat")}.jsonl`;
  link.click();
  URL.revokeObjectURL(link.href);
}

export async function importSession(file) {
  const id = newId();
  const { imported } = await importLines(id, file);
  const title = file.name.replace(/\.jsonl?$/i, "").slice(0, TITLE_LENGTH);
  if (title) await describe(id, { title });
  await go(sessionHash(id));
  notify(`Imported ${imported} ${imported === 1 ? "exchange" : "exchanges"}.`);
}

// Copy the open session up to an exchange into a new one, and open that. The server keeps a session
// as a line without branches, so a branch is a session of its own. Return its id.
export async function branch(lastId) {
  const { id } = state.chat;
  const target = newId();
  const exported = await (await request(`${path(id)}/export`)).text();
  const lines = lastId === null ? "" : linesUpTo(exported, lastId, newId);
  if (lines) await importLines(target, lines);
  const from = await listed(id);
  const title = `${from?.title ?? "Chat"} (branch)`.slice(0, TITLE_LENGTH);
  const { system_prompt = null, metadata = {} } = from ?? {};
  await describe(target, { title, system_prompt, metadata });
  save(`settings.${target}`, load(`settings.${id}`, null));
  await go(sessionHash(target));
  return target;
}

// Make an earlier version of the last answer the one that the conversation goes on from, by a copy
// of it that replaces the current one.
export async function chooseVersion(version, current) {
  const { id } = state.chat;
  const exported = await (await request(`${path(id)}/export`)).text();
  await importLines(id, copyOf(exported, version.id, { request_id: newId(), retry_of: current.id }));
  await reloadMessages();
}

async function importLines(id, lines) {
  return requestJson(`${path(id)}/messages`, { method: "POST", body: lines });
}

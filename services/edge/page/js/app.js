// The whole page.

import { html, useEffect, useMemo, useState } from "../vendor/preact.js";
import { attempt } from "./attempt.js";
import { ChatView } from "./chat-view.js";
import { Dialogs } from "./dialogs.js";
import { IconButton } from "./icons.js";
import { Sidebar } from "./sidebar.js";
import { state, update } from "./store.js";

const NOTICE_MILLISECONDS = 6000;

export function App() {
  return html`${useSidebar()}
    <div class="backdrop" onClick=${() => update({ isSidebarOpen: false })}></div>
    <main>${state.route.view === "status" ? html`<${Fleet} />` : html`<${ChatView} />`}</main>
    <${Notice} />
    <${Dialogs} />
    <div class="for-readers" role="status" aria-live="polite">${state.announcement}</div>`;
}

// A list of a thousand sessions need not render again for each token of an answer.
function useSidebar() {
  const { sessions, search, areSessionsLoaded, hasMoreSessions, route, chat, isSidebarOpen } = state;
  const running = [...state.running.values()].map((each) => `${each.session} ${each.isEnded}`).join();
  const shown = [sessions, search, areSessionsLoaded, hasMoreSessions, route, chat?.id, isSidebarOpen];
  return useMemo(() => html`<${Sidebar} />`, [...shown, running]);
}

// The state of the server, which is loaded when somebody looks at it.
function Fleet() {
  const [View, setView] = useState(null);
  useEffect(() => {
    attempt(async () => {
      const { FleetView } = await import("./fleet/view.js");
      setView(() => FleetView);
    });
  }, []);
  return View ? html`<${View} />` : html`<p class="hint">Loading…</p>`;
}

function Notice() {
  const { notice } = state;
  useEffect(() => {
    if (!notice || notice.kind === "error") return;
    const timer = setTimeout(() => update({ notice: null }), NOTICE_MILLISECONDS);
    return () => clearTimeout(timer);
  }, [notice]);
  if (!notice) return null;
  const role = notice.kind === "error" ? "alert" : "status";
  return html`<div class="notice" data-kind=${notice.kind} role=${role}>
    <span>${notice.text}</span>
    <${IconButton} name="close" label="Close" onClick=${() => update({ notice: null })} />
  </div>`;
}

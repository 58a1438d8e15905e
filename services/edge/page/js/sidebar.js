// The list of sessions.

import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { count, period } from "./format.js";
import { Icon, IconButton } from "./icons.js";
import {
  exportSession,
  foundSessions,
  go,
  importSession,
  loadMoreSessions,
  search,
  sessionHash,
  titleOf,
} from "./sessions.js";
import { isAnswering, state, update } from "./store.js";
import { attempt } from "./attempt.js";

const MOST_FOUND = 200;

export function Sidebar() {
  return html`<nav class="sidebar" data-open=${state.isSidebarOpen} aria-label="Conversations">
    <div class="sidebar-head">
      <a class="brand" href="#/">FineTuneLLM</a>
      <${IconButton} name="close" label="Close the sidebar" class="icon-button only-phone"
        onClick=${() => update({ isSidebarOpen: false })} />
    </div>
    <button type="button" class="new" onClick=${() => go("#/")}>
      <${Icon} name="plus" /> New chat
    </button>
    <${Search} />
    <${List} />
    <${Foot} />
  </nav>`;
}

const isNarrow = matchMedia("(max-width: 48rem)");

export function SidebarToggle() {
  const isShown = isNarrow.matches ? state.isSidebarOpen : !state.isSidebarHidden;
  return html`<${IconButton} name="menu" label="Show or hide conversations" aria-expanded=${isShown}
    onClick=${toggleSidebar} />`;
}

export function toggleSidebar() {
  if (isNarrow.matches) update({ isSidebarOpen: !state.isSidebarOpen });
  else hideSidebar(!state.isSidebarHidden);
}

export function showSidebar() {
  if (isNarrow.matches) update({ isSidebarOpen: true });
  else hideSidebar(false);
}

function hideSidebar(isHidden) {
  const hadFocus = document.activeElement.closest(".sidebar");
  document.documentElement.dataset.sidebar = isHidden ? "hidden" : "shown"; // for the styles
  update({ isSidebarHidden: isHidden });
  if (isHidden && hadFocus) document.querySelector("#prompt")?.focus();
}

function Search() {
  return html`<label class="search">
    <${Icon} name="search" />
    <span class="for-readers">Search conversations</span>
    <input type="search" id="search" placeholder="Search" value=${state.search} autocomplete="off"
      onInput=${(event) => attempt(() => search(event.target.value))} />
  </label>`;
}

function List() {
  const found = foundSessions();
  const sessions = state.search ? found.slice(0, MOST_FOUND) : found;
  if (!state.areSessionsLoaded) return html`<div class="sessions" aria-busy="true"></div>`;
  if (!sessions.length) {
    const text = state.search ? "No title contains this." : "Your conversations will be here.";
    return html`<div class="sessions"><p class="hint">${text}</p></div>`;
  }
  return html`<div class="sessions">
    ${groups(sessions).map(
      ([name, group]) => html`<section key=${name} aria-label=${name}>
        <h2>${name}</h2>
        <ul>
          ${group.map((session) => html`<${Item} key=${session.id} session=${session} />`)}
        </ul>
      </section>`,
    )}
    ${sessions.length < found.length &&
    html`<p class="hint">And ${count(found.length - sessions.length)} more: search for more words.</p>`}
    ${state.hasMoreSessions &&
    !state.search &&
    html`<button type="button" class="quiet wide" onClick=${() => attempt(loadMoreSessions)}>
      Show older
    </button>`}
  </div>`;
}

function Item({ session }) {
  const title = titleOf(session.id);
  const isOpen = state.route.view === "chat" && state.chat?.id === session.id;
  return html`<li class="session" data-open=${isOpen}>
    <a href=${sessionHash(session.id)} aria-current=${isOpen ? "page" : null} title=${title}
      onClick=${() => update({ isSidebarOpen: false })} dir="auto">${title}</a>
    ${isAnswering(session.id) && html`<span class="dot" title="Answering"></span>`}
    ${!session.isBegun &&
    html`<${Menu} label=${`More for ${title}`} items=${[
      ["Rename", "edit", () => update({ dialog: { name: "rename", session } })],
      ["Export", "download", () => attempt(() => exportSession(session.id))],
      ["Delete", "trash", () => update({ dialog: { name: "delete", session } })],
    ]} />`}
  </li>`;
}

// A button with a list of actions: [label, icon, action].
export function Menu({ label, items, icon = "more" }) {
  const [isOpen, setOpen] = useState(false);
  const frame = useRef(null);
  useEffect(() => {
    if (!isOpen) return;
    frame.current.querySelector("[role=menuitem]").focus();
    const close = (event) => frame.current?.contains(event.target) || setOpen(false);
    addEventListener("pointerdown", close);
    return () => removeEventListener("pointerdown", close);
  }, [isOpen]);
  const leave = () => {
    setOpen(false);
    frame.current.querySelector("button").focus();
  };
  const move = (event) => {
    if (event.key === "Escape" && isOpen) {
      event.stopPropagation();
      leave();
    }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !isOpen) return;
    event.preventDefault();
    const all = [...frame.current.querySelectorAll("[role=menuitem]")];
    const next = all.indexOf(document.activeElement) + step;
    all.at(next % all.length).focus();
  };
  return html`<div class="menu" ref=${frame} onKeyDown=${move}>
    <${IconButton} name=${icon} label=${label} aria-haspopup="menu" aria-expanded=${isOpen}
      onClick=${() => setOpen(!isOpen)} />
    ${isOpen &&
    html`<ul role="menu" aria-label=${label}>
      ${items.map(
        ([text, name, action]) => html`<li role="none" key=${text}>
          <button type="button" role="menuitem" onClick=${() => (leave(), action())}>
            <${Icon} name=${name} /> ${text}
          </button>
        </li>`,
      )}
    </ul>`}
  </div>`;
}

function Foot() {
  const picker = useRef(null);
  const take = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) await attempt(() => importSession(file));
  };
  return html`<div class="sidebar-foot">
    <input type="file" accept=".jsonl,.json,.txt" hidden ref=${picker} onChange=${take} id="import"
      aria-label="File to import" />
    <${IconButton} name="upload" label="Import a conversation" onClick=${() => picker.current.click()} />
    <a class="icon-button" href="#/status" aria-label="State of the server" title="State of the server"
      aria-current=${state.route.view === "status" ? "page" : null}>
      <${Icon} name="status" />
    </a>
    <${IconButton} name="theme" label="Appearance and key"
      onClick=${() => update({ dialog: { name: "preferences" } })} />
    <${IconButton} name="help" label="Keyboard shortcuts"
      onClick=${() => update({ dialog: { name: "help" } })} />
  </div>`;
}

function groups(sessions) {
  const found = new Map();
  for (const session of sessions) {
    const name = period(session.last_activity);
    found.set(name, [...(found.get(name) ?? []), session]);
  }
  return [...found];
}

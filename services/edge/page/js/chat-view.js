// The open conversation.

import { html, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact.js";
import { attempt } from "./attempt.js";
import { isStored, send } from "./chat.js";
import { Composer } from "./composer.js";
import { Icon } from "./icons.js";
import { Live } from "./live.js";
import { exportSession, findSession, loadEarlier, reloadMessages, titleOf } from "./sessions.js";
import { Menu, SidebarToggle } from "./sidebar.js";
import { state, update } from "./store.js";
import { Prompt, Turn } from "./turn.js";
import { groupTurns } from "./turns.js";

const NEAR_END = 80; // pixels, within which the page follows a growing answer
const EXAMPLES = [
  "Explain what you were trained for",
  "Write a short poem about autumn",
  "Make a table of three planets",
];

export function ChatView() {
  const { chat } = state;
  if (!chat) return null;
  return html`<${Head} /><${Messages} key=${chat.id} /><${Composer} key=${chat.id} />`;
}

function Head() {
  const session = findSession(state.chat.id);
  const items = session && [
    ["Rename", "edit", () => update({ dialog: { name: "rename", session } })],
    ["Export", "download", () => attempt(() => exportSession(session.id))],
    ["Delete", "trash", () => update({ dialog: { name: "delete", session } })],
  ];
  return html`<header class="head">
    <${SidebarToggle} />
    <h1 dir="auto">${titleOf(state.chat.id)}</h1>
    ${session?.system_prompt && html`<span class="tag">own system prompt</span>`}
    ${items && html`<${Menu} label="More for this conversation" items=${items} />`}
  </header>`;
}

function Messages() {
  const { chat } = state;
  const frame = useRef(null);
  const [isAtEnd, setAtEnd] = useState(true);
  const found = state.running.get(chat.id);
  const running = found && isStored(found) ? null : found; // which another tab, or a reload, repeats
  const turns = groupTurns(chat.messages);
  const replaces = running?.record.body.retry_of;
  const isReplacing = turns.length > 0 && replaces === turns.at(-1).versions.at(-1).id;
  const toEnd = () => (frame.current.scrollTop = frame.current.scrollHeight);
  useLayoutEffect(() => {
    if (isAtEnd) toEnd();
  });
  useEffect(() => {
    if (running) setAtEnd(true);
  }, [running]);
  // also when an image, a formula or a font makes the text longer
  useEffect(() => watchSize(frame.current, toEnd), []);
  return html`<div class="messages" ref=${frame} data-at-end=${isAtEnd} tabindex="0" role="region"
    aria-label="Conversation" onScroll=${() => setAtEnd(isNearEnd(frame.current))}>
    <div class="column-of-text">
      ${chat.isLoading && html`<p class="hint">Loading…</p>`}
      ${chat.error && html`<${Broken} text=${chat.error} />`}
      ${chat.next &&
      html`<button type="button" class="quiet wide" onClick=${() => attempt(loadEarlier)}>
        Show earlier messages
      </button>`}
      ${chat.isComplete === false &&
      !chat.next &&
      html`<p class="hint">Earlier messages are no longer stored.</p>`}
      ${isEmpty(running, turns) && html`<${Welcome} />`}
      ${turns.map(
        (turn, number) => html`<${Turn} key=${turn.id} turns=${turns} number=${number}
          live=${isReplacing && number === turns.length - 1 ? running : null} />`,
      )}
      ${running &&
      !isReplacing &&
      html`<article class="turn" key=${running.record.key} aria-label="New exchange">
        <${Prompt} text=${running.record.body.prompt} />
        <${Live} answer=${running} />
      </article>`}
    </div>
    ${!isAtEnd &&
    html`<button type="button" class="to-end" aria-label="Go to the end" title="Go to the end" onClick=${toEnd}>
      <${Icon} name="send" />
    </button>`}
  </div>`;
}

function isEmpty(running, turns) {
  const { chat } = state;
  return !running && !turns.length && !chat.isLoading && !chat.error;
}

function isNearEnd({ scrollHeight, scrollTop, clientHeight }) {
  return scrollHeight - scrollTop - clientHeight < NEAR_END;
}

function watchSize(frame, toEnd) {
  const observer = new ResizeObserver(() => frame.dataset.atEnd === "true" && toEnd());
  observer.observe(frame.firstElementChild);
  observer.observe(frame);
  return () => observer.disconnect();
}

function Broken({ text }) {
  return html`<div class="failure" role="alert">
    <p>${text}</p>
    <div class="buttons">
      <button type="button" class="primary" onClick=${reloadMessages}>Try again</button>
    </div>
  </div>`;
}

function Welcome() {
  return html`<div class="welcome">
    <h2>What would you like to know?</h2>
    <div class="examples">
      ${EXAMPLES.map(
        (text) => html`<button type="button" key=${text} onClick=${() => send(text)}>${text}</button>`,
      )}
    </div>
  </div>`;
}

// Keyboard shortcuts of the whole page; those of a text field are where the field is.

import { attempt } from "./attempt.js";
import { stop } from "./chat.js";
import { go } from "./sessions.js";
import { showSidebar, toggleSidebar } from "./sidebar.js";
import { isAnswering, state, update } from "./store.js";

const CONTROL = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";

export const SHORTCUTS = [
  { keys: ["Enter"], text: "Send the message" },
  { keys: ["Shift", "Enter"], text: "New line" },
  { keys: ["↑"], text: "Edit the last prompt, from an empty field" },
  { keys: ["Esc"], text: "Stop the answer" },
  { keys: [CONTROL, "Shift", "O"], text: "New chat" },
  { keys: [CONTROL, "K"], text: "Search conversations" },
  { keys: [CONTROL, "B"], text: "Show or hide conversations" },
  { keys: ["/"], text: "Go to the message" },
  { keys: ["?"], text: "This help" },
];

export function onKeyDown(event) {
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
  const action = findAction(event);
  if (!action) return;
  event.preventDefault();
  action();
}

function findAction(event) {
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (control && event.shiftKey && key === "o") return () => attempt(() => go("#/"));
  if (control && key === "k") return focusSearch;
  if (control && key === "b") return toggleSidebar;
  if (key === "escape") return escapeAction();
  if (control || event.altKey || isText(event.target)) return null;
  if (key === "/") return () => document.querySelector("#prompt")?.focus();
  if (key === "?") return () => update({ dialog: { name: "help" } });
  return null;
}

function escapeAction() {
  if (state.isSidebarOpen) return () => update({ isSidebarOpen: false });
  return isAnswering(state.chat?.id) ? () => stop() : null;
}

function focusSearch() {
  showSidebar();
  requestAnimationFrame(() => document.querySelector("#search").focus());
}

function isText(element) {
  return element.matches("input, textarea, select");
}

// What people think of an answer: the server makes training data of it. A server without the route
// has no `feedback` in its messages, and the page then shows none of this.

import { html, useState } from "../vendor/preact.js";
import { request } from "./api.js";
import { attempt } from "./attempt.js";
import { Icon, IconButton } from "./icons.js";
import { chooseVersion, reloadMessages } from "./sessions.js";
import { announce, isAnswering, state, update } from "./store.js";
import { Markdown } from "./text.js";

const GIVEN = ["rating", "reason", "correction", "preferred_to"]; // the rest is the server's

export function canRate(message) {
  return "feedback" in message;
}

// Change a part of the feedback on an answer; null removes it.
export async function give(message, changes) {
  const before = message.feedback ?? {};
  const all = { ...Object.fromEntries(GIVEN.map((name) => [name, before[name] ?? null])), ...changes };
  const given = Object.fromEntries(Object.entries(all).filter(([, value]) => value));
  const [session, id] = [state.chat.id, message.id].map(encodeURIComponent);
  const path = `sessions/${session}/messages/${id}/feedback`;
  if (Object.keys(given).length) await request(path, { method: "PUT", json: given });
  else await request(path, { method: "DELETE" });
  await reloadMessages();
  announce("Thank you, that is noted.");
}

export function Rating({ message }) {
  if (!canRate(message)) return null;
  const rating = message.feedback?.rating;
  const rate = async (value) => {
    const isNoted = await attempt(() => give(message, { rating: rating === value ? null : value }));
    if (isNoted && value === "down" && rating !== "down") explain();
  };
  const explain = () => update({ dialog: { name: "feedback", message } });
  return html`<${IconButton} name="up" label="Good answer" aria-pressed=${rating === "up"}
      onClick=${() => rate("up")} />
    <${IconButton} name="down" label="Bad answer" aria-pressed=${rating === "down"}
      onClick=${() => rate("down")} />
    ${!message.tool_calls.length &&
    html`<${IconButton} name="edit" label="Correct the answer" onClick=${explain} />`}`;
}

// Of two versions: the one that is better, and with which the conversation goes on.
export function Choice({ version, other, current, isLast }) {
  if (isAnswering(state.chat.id)) return null;
  const isChosen = version.feedback?.preferred_to === other.id;
  const choose = async () => {
    if (canRate(version)) await give(version, { preferred_to: other.id });
    if (isLast && version !== current) await chooseVersion(version, current);
  };
  return html`<button type="button" class="quiet small" aria-pressed=${isChosen}
    onClick=${() => attempt(choose)}>
    <${Icon} name="check" /> ${isChosen ? "Chosen" : "This one is better"}
  </button>`;
}

// Return what the answer says: a correction stands in its place.
export function textOf(message) {
  return message.feedback?.correction ?? message.model_response;
}

// The text of an answer: a correction stands in its place, as the model sees it, too.
export function AnswerText({ message }) {
  const correction = message.feedback?.correction;
  if (!correction) return html`<${Markdown} text=${message.model_response} />`;
  return html`<${Markdown} text=${correction} />
    <details class="original">
      <summary>Corrected. The model’s own answer</summary>
      <${Markdown} text=${message.model_response} />
    </details>`;
}

export function FeedbackFields({ message }) {
  const { correction, reason } = message.feedback ?? {};
  const [isCorrected, setCorrected] = useState(Boolean(correction));
  return html`<label class="field">
      <span class="label">What is wrong with it?</span>
      <textarea name="reason" rows="2" maxlength="4096" dir="auto" autofocus
        defaultValue=${reason ?? ""} placeholder="Optional"></textarea>
    </label>
    ${!message.tool_calls.length &&
    html`<label class="check">
      <input type="checkbox" checked=${isCorrected}
        onChange=${(event) => setCorrected(event.target.checked)} />
      Write what it should have said
    </label>`}
    ${isCorrected &&
    html`<textarea name="correction" rows="8" maxlength="65536" dir="auto" aria-label="Corrected answer"
      defaultValue=${correction ?? message.model_response}></textarea>
      <p class="hint">The model sees the corrected answer from now on.</p>`}`;
}

// Send what the fields contain.
export function giveFields(message, form) {
  const corrected = form.get("correction")?.trim() ?? "";
  const correction = corrected === message.model_response.trim() ? null : corrected || null;
  return give(message, { reason: form.get("reason").trim() || null, correction });
}

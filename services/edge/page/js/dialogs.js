// The dialogs. A <dialog> keeps the focus inside and closes with Escape by itself.

import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { forgetKey, hasKey, useKey } from "./api.js";
import { attempt } from "./attempt.js";
import { saveSettings, settings } from "./chat.js";
import { FeedbackFields, giveFields } from "./feedback.js";
import { IconButton } from "./icons.js";
import { describe, findSession, removeSession, titleOf } from "./sessions.js";
import { SHORTCUTS } from "./shortcuts.js";
import { state, update } from "./store.js";
import { load, save } from "./storage.js";

const close = () => update({ dialog: null });

export function Dialogs() {
  switch (state.dialog?.name) {
    case "help":
      return html`<${Help} />`;
    case "preferences":
      return html`<${Preferences} />`;
    case "key":
      return html`<${Key} text=${state.dialog.text} />`;
    case "rename":
      return html`<${Rename} session=${state.dialog.session} />`;
    case "delete":
      return html`<${Delete} session=${state.dialog.session} />`;
    case "settings":
      return html`<${Settings} id=${state.dialog.id} />`;
    case "feedback":
      return html`<${Feedback} message=${findMessage(state.dialog.message)} />`;
    default:
      return null;
  }
}

function Dialog({ title, children, onSubmit, submit = "Save", danger = false }) {
  const element = useRef(null);
  useEffect(() => {
    element.current.showModal();
    element.current.querySelector("[autofocus]")?.focus();
  }, []);
  const send = async (event) => {
    event.preventDefault();
    if (!onSubmit || (await attempt(() => onSubmit(new FormData(event.target))))) close();
  };
  return html`<dialog ref=${element} aria-label=${title} onClose=${close}
    onPointerDown=${(event) => event.target === element.current && element.current.close()}>
    <form onSubmit=${send}>
      <div class="dialog-head">
        <h2>${title}</h2>
        <${IconButton} name="close" label="Close" onClick=${() => element.current.close()} />
      </div>
      <div class="dialog-body">${children}</div>
      ${onSubmit &&
      html`<div class="buttons">
        <button type="button" class="quiet" onClick=${() => element.current.close()}>Cancel</button>
        <button type="submit" class=${danger ? "danger" : "primary"}>${submit}</button>
      </div>`}
    </form>
  </dialog>`;
}

function Help() {
  return html`<${Dialog} title="Keyboard shortcuts">
    <table class="shortcuts">
      ${SHORTCUTS.map(
        ({ keys, text }) => html`<tr key=${text}>
          <th scope="row">${text}</th>
          <td>${keys.map((name) => html`<kbd>${name}</kbd>`)}</td>
        </tr>`,
      )}
    </table>
    <p class="hint">
      Everything is kept on the server: you can go on with a conversation on another device. If the
      connection breaks in the middle of an answer, or you reload the page, the answer goes on.
    </p>
  <//>`;
}

function Preferences() {
  const [theme, setTheme] = useState(load("theme", "auto"));
  const choose = (value) => {
    setTheme(value);
    save("theme", value === "auto" ? null : value);
    showTheme();
  };
  return html`<${Dialog} title="Appearance and key">
    <fieldset class="choices">
      <legend>Appearance</legend>
      ${["auto", "light", "dark"].map(
        (value) => html`<label key=${value}>
          <input type="radio" name="theme" value=${value} checked=${theme === value}
            onChange=${() => choose(value)} />
          ${{ auto: "As the system", light: "Light", dark: "Dark" }[value]}
        </label>`,
      )}
    </fieldset>
    <div class="field">
      <span class="label">API key</span>
      <div class="buttons">
        <button type="button" class="quiet" onClick=${() => update({ dialog: { name: "key", text: "" } })}>
          ${hasKey() ? "Change the key" : "Enter a key"}
        </button>
        ${hasKey() &&
        html`<button type="button" class="quiet" onClick=${() => (forgetKey(), location.reload())}>
          Forget the key
        </button>`}
      </div>
    </div>
    <p class="hint">Programs use the same server: <a href="schema" target="_blank">all routes</a>.</p>
  <//>`;
}

// Use the appearance that this browser chose.
export function showTheme() {
  document.documentElement.dataset.theme = load("theme", "auto");
}

function Key({ text }) {
  const submit = (form) => {
    useKey(form.get("key").trim(), form.has("remember"));
    location.reload();
  };
  return html`<${Dialog} title="API key" onSubmit=${submit} submit="Use this key">
    ${text &&
    html`<p>
      ${hasKey() ? "The server does not know the key." : "This server needs a key."} Whoever runs it
      makes one with <code>keys add NAME</code>.
    </p>`}
    <label class="field">
      <span class="label">Key</span>
      <input name="key" type="password" required autofocus autocomplete="off" spellcheck="false"
        pattern="[ -~]+" title="A key has only ASCII characters." />
    </label>
    <label class="check">
      <input name="remember" type="checkbox" /> Keep it in this browser
    </label>
    <p class="hint">Otherwise it is forgotten when you close this tab.</p>
  <//>`;
}

function Rename({ session }) {
  const submit = (form) => describe(session.id, { title: form.get("title").trim() || null });
  return html`<${Dialog} title="Rename" onSubmit=${submit}>
    <label class="field">
      <span class="label">Title</span>
      <input name="title" maxlength="200" defaultValue=${session.title} autofocus dir="auto" />
    </label>
    <p class="hint">Without a title, the first prompt is the title.</p>
  <//>`;
}

function Delete({ session }) {
  return html`<${Dialog} title="Delete this conversation?" danger=${true} submit="Delete"
    onSubmit=${() => removeSession(session.id)}>
    <p>“<span dir="auto">${titleOf(session.id)}</span>” is erased on the server, for all devices. This can’t be
      undone; export it first if you may need it.</p>
  <//>`;
}

function Feedback({ message }) {
  return html`<${Dialog} title="This answer" onSubmit=${(form) => giveFields(message, form)}>
    <${FeedbackFields} message=${message} />
  <//>`;
}

// Return the message as it is now: a rating may have been stored since the dialog was opened.
function findMessage(message) {
  return state.chat.messages.find((each) => each.id === message.id) ?? message;
}

// Fields of sampling: name, label, bounds and step, and what it does.
const NUMBERS = [
  ["temperature", "Temperature", 0, 5, 0.05, "higher: more varied; 0: always the likeliest"],
  ["top_p", "Top p", 0.01, 1, 0.01, "share of the likeliest tokens to draw from"],
  ["top_k", "Top k", 0, 1000, 1, "number of the likeliest tokens to draw from; 0: all"],
  ["min_p", "Min p", 0, 1, 0.01, "drops tokens less likely than this share of the likeliest"],
  ["repeat_penalty", "Repeat penalty", 0.05, 10, 0.05, "above 1: repeats itself less"],
  ["max_tokens", "Longest answer", 1, 1000000, 1, "in tokens"],
  ["seed", "Seed", 0, 4294967294, 1, "the same seed gives the same answer"],
];

function Settings({ id }) {
  const values = settings(id);
  const prompt = findSession(id)?.system_prompt;
  const submit = async (form) => {
    const { model = null } = values;
    const numbers = NUMBERS.map(([name]) => [name, form.get(name) === "" ? null : Number(form.get(name))]);
    const given = form.get("own") === "on" ? form.get("system_prompt") : null;
    if (given !== (prompt ?? null)) await describe(id, { system_prompt: given });
    await saveSettings(id, { ...Object.fromEntries(numbers), thinking: form.get("thinking"), model });
  };
  return html`<${Dialog} title="This conversation" onSubmit=${submit}>
    <${SystemPrompt} prompt=${prompt} />
    <label class="field">
      <span class="label">Reasoning</span>
      <select name="thinking" value=${values.thinking ?? ""}>
        <option value="">As the model does</option>
        <option value="off">Off</option>
        <option value="low">Low</option>
        <option value="medium">Medium</option>
        <option value="high">High</option>
      </select>
    </label>
    <div class="grid">
      ${NUMBERS.map(
        ([name, label, min, max, step, hint]) => html`<label class="field" key=${name}>
          <span class="label">${label}</span>
          <input type="number" name=${name} min=${min} max=${max} step=${step === 1 ? 1 : "any"}
            defaultValue=${values[name] ?? ""} placeholder="server’s default" />
          <span class="hint">${hint}</span>
        </label>`,
      )}
    </div>
  <//>`;
}

function SystemPrompt({ prompt }) {
  const [isOwn, setOwn] = useState(prompt != null);
  return html`<label class="check">
      <input type="checkbox" name="own" checked=${isOwn} onChange=${(event) => setOwn(event.target.checked)} />
      A system prompt of its own
    </label>
    ${isOwn &&
    html`<textarea name="system_prompt" rows="4" maxlength="16384" dir="auto" aria-label="System prompt"
      defaultValue=${prompt ?? ""} placeholder="Empty: no system prompt at all"></textarea>`}`;
}

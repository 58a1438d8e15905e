// Where people write, and choose the model.

import { html, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact.js";
import { saveSettings, send, settings, stop } from "./chat.js";
import { count } from "./format.js";
import { Icon, IconButton } from "./icons.js";
import { isAnswering, state, update } from "./store.js";
import { load, save } from "./storage.js";

const isTouch = matchMedia("(pointer: coarse)");

export function Composer() {
  const { id } = state.chat;
  const [text, setText] = useState("");
  const [rival, setRival] = useState(null);
  const area = useRef(null);
  const isRunning = isAnswering(id);
  const draft = `draft.${state.chat.isNew ? "new" : id}`;
  useEffect(() => setText(load(draft, "")), [draft, state.dismissed]);
  useEffect(() => {
    if (!isTouch.matches) area.current.focus();
  }, []);
  // the button that had the focus is gone; what else has it may be in use
  useEffect(() => {
    if (!isTouch.matches && document.activeElement === document.body) area.current.focus();
  }, [isRunning]);
  useLayoutEffect(() => fit(area.current), [text]);
  const write = (value) => {
    setText(value);
    save(draft, value || null);
  };
  const submit = () => {
    const prompt = text.trim();
    if (!prompt || isRunning) return;
    write("");
    send(prompt, { compare: rival });
  };
  return html`<form class="composer" onSubmit=${(event) => (event.preventDefault(), submit())}>
    <textarea id="prompt" ref=${area} rows="1" dir="auto" value=${text} placeholder="Write a message"
      aria-label="Message" enterkeyhint=${isTouch.matches ? "enter" : "send"}
      onInput=${(event) => write(event.target.value)} onKeyDown=${(event) => onKey(event, text, submit)} />
    <div class="composer-row">
      <${ModelChoice} id=${id} />
      <${RivalChoice} rival=${rival} setRival=${setRival} />
      <span class="space"></span>
      <${ContextUse} />
      <${IconButton} name="sliders" label="System prompt and sampling"
        onClick=${() => update({ dialog: { name: "settings", id } })} />
      ${isRunning
        ? html`<button type="button" class="send" aria-label="Stop" title="Stop (Esc)" onClick=${() => stop()}>
            <${Icon} name="stop" />
          </button>`
        : html`<button type="submit" class="send" aria-label="Send" title="Send (Enter)" disabled=${!text.trim()}>
            <${Icon} name="send" />
          </button>`}
    </div>
  </form>`;
}

function onKey(event, text, submit) {
  if (event.key === "ArrowUp" && !text) {
    [...document.querySelectorAll(".prompt .edit")].at(-1)?.click();
    event.preventDefault();
  }
  if (!sends(event)) return;
  event.preventDefault();
  submit();
}

// Whether a key sends what is written; on a touch screen Enter begins a new line.
export function sends({ key, shiftKey, isComposing }) {
  return key === "Enter" && !shiftKey && !isComposing && !isTouch.matches;
}

// Grow with the text, as far as the style allows.
function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

function ModelChoice({ id }) {
  const chosen = settings(id).model ?? "";
  if (state.models.length < 2 && !chosen) {
    const name = state.models[0]?.id ?? whyNoModel();
    return html`<span class="model" title=${name}>${name}</span>`;
  }
  return html`<select class="model" aria-label="Model" value=${chosen}
    onChange=${(event) => saveSettings(id, { ...settings(id), model: event.target.value })}>
    <option value="">Default model</option>
    <${ModelOptions} chosen=${chosen} />
  </select>`;
}

function whyNoModel() {
  const [model] = state.otherModels;
  if (model?.status.value === "loading")
    return `Loading ${model.id}: ${Math.round(model.status.progress * 100)} %`;
  return model?.status.failed ? `${model.id} can’t be loaded: ${model.status.error}` : "No model is ready";
}

function ModelOptions({ chosen }) {
  const isKnown = !chosen || state.models.some((model) => model.id === chosen);
  return html`${state.models.map(
    (model) => html`<option key=${model.id} value=${model.id}>${model.id}</option>`,
  )}${!isKnown && html`<option value=${chosen}>${chosen} (not there)</option>`}`;
}

// A second model, whose answer is shown beside the first one.
function RivalChoice({ rival, setRival }) {
  if (state.models.length < 2) return null;
  if (rival === null) {
    return html`<${IconButton} name="compare" label="Compare two models"
      onClick=${() => setRival(state.models.at(-1).id)} />`;
  }
  return html`<span class="rival">
    and
    <select class="model" aria-label="Second model" value=${rival}
      onChange=${(event) => setRival(event.target.value)}>
      <${ModelOptions} chosen=${rival} />
    </select>
    <${IconButton} name="close" label="Don’t compare" onClick=${() => setRival(null)} />
  </span>`;
}

// How much of the context window the conversation fills.
function ContextUse() {
  const last = state.chat.messages.at(-1);
  const model = state.models.find((each) => each.id === last?.model) ?? state.models[0];
  if (!last || !model?.max_model_len) return null;
  const used = last.usage.prompt_tokens + last.usage.completion_tokens;
  if (!used) return null; // imported without it
  const share = Math.min(used / model.max_model_len, 1);
  const text = `${count(used)} of ${count(model.max_model_len)} tokens of the context are used`;
  return html`<span class="context" title=${text} role="img" aria-label=${text}>
    <svg viewBox="0 0 20 20" aria-hidden="true">
      <circle cx="10" cy="10" r="8" />
      <circle cx="10" cy="10" r="8" pathLength="100" stroke-dasharray=${`${share * 100} 100`} />
    </svg>
    ${Math.round(share * 100)}%
  </span>`;
}

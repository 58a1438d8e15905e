// Components that show Markdown, reasoning and tool calls.

import { html, useEffect, useLayoutEffect, useRef } from "../vendor/preact.js";
import { seconds } from "./format.js";
import { Icon } from "./icons.js";
import { MarkdownView } from "./markdown.js";
import { state } from "./store.js";

const PAUSE = 4; // times as long as rendering took, which so takes at most a fifth of the time

export function Markdown({ text, isComplete = true }) {
  const element = useRef(null);
  const render = useRef(null);
  useLayoutEffect(() => {
    render.current ??= paced(new MarkdownView(element.current));
    render.current(text, isComplete);
  }, [text, isComplete]);
  return html`<div class="markdown" ref=${element}></div>`;
}

// A table or a list of a thousand lines is one block, which takes longer than a frame. While it
// grows, the page must still scroll.
function paced(view) {
  let next = 0;
  let timer = null;
  return function render(text, isComplete) {
    clearTimeout(timer);
    const started = performance.now();
    if (!isComplete && started < next) {
      timer = setTimeout(render, next - started, text, isComplete);
      return;
    }
    view.update(text, isComplete);
    const ended = performance.now();
    next = ended + PAUSE * (ended - started);
  };
}

// Reasoning is folded: people came for the answer. `id` is the answer's; `time` is in seconds; null:
// not known.
export function Reasoning({ id, text, time, isRunning = false }) {
  if (!text) return null;
  const took = time === null ? "Reasoning" : `Reasoned for ${seconds(time)}`;
  const onToggle = (event) => state.unfolded[event.target.open ? "add" : "delete"](id);
  return html`<details class="reasoning" data-running=${isRunning} open=${state.unfolded.has(id)}
    onToggle=${onToggle}>
    <summary>${isRunning ? "Reasoning…" : took}</summary>
    <${Follow} isRunning=${isRunning}><${Markdown} text=${text} isComplete=${!isRunning} /><//>
  </details>`;
}

// Keeps the end of a growing text in view.
function Follow({ isRunning, children }) {
  const frame = useRef(null);
  useEffect(() => {
    if (isRunning) frame.current.scrollTop = frame.current.scrollHeight;
  });
  return html`<div class="reasoning-text" tabindex="0" role="region" aria-label="Reasoning" ref=${frame}>
    ${children}
  </div>`;
}

export function ToolCalls({ calls }) {
  return calls.map(
    (call, number) => html`<details class="tool" key=${call.id || number}>
      <summary><${Icon} name="tool" /> Calls <code>${call.function.name}</code></summary>
      <pre tabindex="0"><code>${pretty(call.function.arguments)}</code></pre>
    </details>`,
  );
}

export function ToolResults({ results }) {
  return results.map(
    (result) => html`<details class="tool" key=${result.tool_call_id}>
      <summary><${Icon} name="tool" /> Result of a tool</summary>
      <pre tabindex="0"><code>${pretty(result.content)}</code></pre>
    </details>`,
  );
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not JSON, or not all of it yet
  }
}

// One turn: a prompt, and its answer in one version or several.

import { html, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact.js";
import { attempt } from "./attempt.js";
import { continueAnswer, edit, retry } from "./chat.js";
import { copy } from "./code.js";
import { sends } from "./composer.js";
import { count, speed, when } from "./format.js";
import { AnswerText, Choice, Rating, textOf } from "./feedback.js";
import { Icon, IconButton } from "./icons.js";
import { Live } from "./live.js";
import { branch, chooseVersion } from "./sessions.js";
import { announce, isAnswering, state, update } from "./store.js";
import { Reasoning, ToolCalls, ToolResults } from "./text.js";
import { whyCut } from "./turns.js";

// `live` is the answer that is about to replace the turn's last version, if one is.
export function Turn({ turns, number, live }) {
  const turn = turns[number];
  const { versions } = turn;
  const [chosen, choose] = useState(null);
  useEffect(() => choose(null), [versions.length]);
  const at = Math.min(chosen ?? versions.length - 1, versions.length - 1);
  const isLast = number === turns.length - 1;
  const isMany = versions.length + (live ? 1 : 0) > 1;
  const shown = live ? asMessage(live) : versions[at];
  const onEdit = (text) => attempt(() => edit(turns, number, text));
  let answer = html`<${Version} turn=${turn} at=${at} choose=${choose} isLast=${isLast} />`;
  if (live) answer = html`<${Live} answer=${live} />`;
  if (isMany && isSideBySide(turn)) answer = html`<${Columns} turn=${turn} live=${live} isLast=${isLast} />`;
  return html`<article class="turn" aria-label=${`Exchange ${number + 1}`}>
    <${ToolResults} results=${shown.tool_results} />
    <${Prompt} text=${shown.user_prompt} time=${versions[at].timestamp}
      onEdit=${!isAnswering(state.chat.id) && onEdit} />
    ${answer}
  </article>`;
}

// What is asked in a request that runs, in the fields of a message.
function asMessage({ record: { body } }) {
  return { user_prompt: body.prompt, tool_results: body.tool_results ?? [] };
}

function isSideBySide({ versions }) {
  return versions.some((version) => state.sideBySide.has(version.id));
}

function showSideBySide({ versions }, isShown) {
  if (isShown) state.sideBySide.add(versions[0].id);
  else versions.forEach((version) => state.sideBySide.delete(version.id));
  update();
}

// One version, with what leads to the others.
function Version({ turn, at, choose, isLast }) {
  const { versions } = turn;
  const current = versions.at(-1);
  return html`<${Answer} message=${versions[at]} current=${current} isLast=${isLast}>
    ${versions.length > 1 &&
    html`<${Pager} at=${at} count=${versions.length} choose=${choose} />
      <${IconButton} name="compare" label="Show versions side by side"
        onClick=${() => showSideBySide(turn, true)} />`}
  <//>`;
}

// The last two versions, or the last one and the one that is being generated.
function Columns({ turn, live, isLast }) {
  const { versions } = turn;
  const current = versions.at(-1);
  const shown = live ? [current] : versions.slice(-2);
  return html`<div class="beside">
      ${shown.map(
        (version) => html`<section class="column" key=${version.id} aria-label=${version.model}>
          <h3>${version.model || "imported"}</h3>
          <${Answer} message=${version} current=${current} isLast=${isLast && !live} isBeside=${true} />
          ${shown.length === 2 &&
          html`<${Choice} version=${version} other=${shown.find((each) => each !== version)}
            current=${current} isLast=${isLast} />`}
        </section>`,
      )}
      ${live &&
      html`<section class="column" aria-label="Second answer">
        <h3>${live.record.body.model ?? "default model"}</h3>
        <${Live} answer=${live} />
      </section>`}
    </div>
    ${!live &&
    html`<button type="button" class="quiet small one-answer"
      onClick=${() => showSideBySide(turn, false)}>Show one answer</button>`}`;
}

function Pager({ at, count: all, choose }) {
  return html`<span class="pager">
    <${IconButton} name="left" label="Earlier version" disabled=${at === 0} onClick=${() => choose(at - 1)} />
    <span aria-label=${`Version ${at + 1} of ${all}`}>${at + 1}/${all}</span>
    <${IconButton} name="right" label="Later version" disabled=${at === all - 1}
      onClick=${() => choose(at + 1)} />
  </span>`;
}

// A prompt; without `onEdit` it can't be changed now.
export function Prompt({ text, time, onEdit }) {
  const [isEdited, setEdited] = useState(false);
  if (!text && !isEdited) return null;
  if (isEdited) {
    const finish = (changed) => {
      setEdited(false);
      if (changed && changed !== text) onEdit(changed);
    };
    return html`<${PromptEditor} text=${text} finish=${finish} />`;
  }
  return html`<div class="prompt">
    <div class="bubble" dir="auto">${text}</div>
    <div class="actions" title=${time && when(time)}>
      <${IconButton} name="copy" label="Copy prompt" onClick=${() => copy(text)} />
      ${onEdit &&
      html`<${IconButton} name="edit" label="Edit prompt" class="icon-button edit"
        onClick=${() => setEdited(true)} />`}
    </div>
  </div>`;
}

function PromptEditor({ text, finish }) {
  const area = useRef(null);
  useLayoutEffect(() => {
    area.current.focus();
    area.current.setSelectionRange(text.length, text.length);
  }, []);
  const onKeyDown = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      finish(null);
    }
    if (sends(event)) {
      event.preventDefault();
      finish(area.current.value.trim());
    }
  };
  return html`<div class="editor">
    <textarea ref=${area} aria-label="Prompt" dir="auto" defaultValue=${text} onKeyDown=${onKeyDown} />
    <div class="buttons">
      <button type="button" class="quiet" onClick=${() => finish(null)}>Cancel</button>
      <button type="button" class="primary" onClick=${() => finish(area.current.value.trim())}>Send</button>
    </div>
  </div>`;
}

function Answer({ message, current, isLast, isBeside = false, children }) {
  const isCurrent = message === current;
  const canReplace = isLast && isCurrent && !isAnswering(state.chat.id);
  const canChoose = isLast && !isCurrent && !isBeside && !isAnswering(state.chat.id);
  return html`<div class="answer">
    <${Reasoning} id=${message.id} text=${message.reasoning} time=${state.thought.get(message.id) ?? null} />
    <${AnswerText} message=${message} />
    <${ToolCalls} calls=${message.tool_calls} />
    <${End} message=${message} isLast=${isLast} canContinue=${canReplace} />
    <div class="actions">
      ${children}
      <${IconButton} name="copy" label="Copy answer" onClick=${() => copy(textOf(message))} />
      ${canReplace &&
      html`<${IconButton} name="retry" label="Try again" onClick=${() => retry(message)} />`}
      ${!isBeside &&
      html`<${IconButton} name="branch" label="Branch from here"
        onClick=${() => attempt(() => startBranch(message))} />`}
      <${Rating} message=${message} />
      ${canChoose &&
      html`<button type="button" class="quiet small"
        onClick=${() => attempt(() => chooseVersion(message, current))}>
        <${Icon} name="check" /> Go on with this one
      </button>`}
      <${Facts} message=${message} hasModel=${!isBeside} />
    </div>
  </div>`;
}

// Why the answer ends where it does, unless it is complete.
function End({ message, isLast, canContinue }) {
  if (message.finish_reason === "tool_calls") {
    return (
      isLast &&
      html`<p class="hint">The answer waits for the results of its tools, which a program sends.</p>`
    );
  }
  const cut = whyCut(message.finish_reason);
  if (!cut || message.feedback?.correction) return null;
  return html`<p class="cut">${cut}
    ${canContinue &&
    message.model_response &&
    html` <button type="button" class="link" onClick=${() => continueAnswer(message)}>Continue</button>`}
  </p>`;
}

async function startBranch(message) {
  await branch(message.id);
  announce("This is a copy of the conversation up to here.");
}

function Facts({ message, hasModel }) {
  const rate = speed(message);
  const tokens = message.usage.completion_tokens; // 0: imported without them
  const facts = [hasModel && message.model, tokens > 0 && `${count(tokens)} tokens`];
  if (rate) facts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  return html`<span class="facts">${facts.filter(Boolean).join(" · ")}</span>`;
}

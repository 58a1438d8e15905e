// The answer that is being generated, and why it waits or has failed.

import { html } from "../vendor/preact.js";
import { again, dismiss } from "./chat.js";
import { count } from "./format.js";
import { Markdown, Reasoning, ToolCalls } from "./text.js";

export function Live({ answer }) {
  const isReasoning = answer.reasoning !== "" && answer.reasoningSeconds === null && !answer.isEnded;
  return html`<div class="answer live" aria-busy=${!answer.isEnded}>
    <${Reasoning} id=${answer.requestId} text=${answer.reasoning} time=${answer.reasoningSeconds}
      isRunning=${isReasoning} />
    <${Markdown} text=${answer.content} isComplete=${answer.isEnded} />
    <${ToolCalls} calls=${answer.calls.filter(Boolean)} />
    ${answer.error ? html`<${Failure} answer=${answer} />` : html`<${Waiting} answer=${answer} />`}
  </div>`;
}

function Waiting({ answer }) {
  if (answer.phase === "answering" || answer.phase === "done") return null;
  const share = prefilled(answer);
  return html`<div class="waiting">
    <span class="pulse" aria-hidden="true"></span>
    <span>${describe(answer)}</span>
    ${share !== null && html`<progress max="1" value=${share} aria-label="Prompt read"></progress>`}
  </div>`;
}

function describe({ phase, progress, started }) {
  switch (phase) {
    case "waiting":
      return progress.queue_position === 1
        ? "Next in the queue"
        : `Number ${progress.queue_position} in the queue`;
    case "prefill":
      if (progress?.prompt_tokens && progress.prefilled_tokens === progress.prompt_tokens)
        return "About to answer";
      if (progress?.prompt_tokens)
        return `Reading the prompt: ${count(progress.prefilled_tokens)} of ${count(progress.prompt_tokens)} tokens`;
      return started ? "Reading the prompt" : "Preparing";
    case "reconnecting":
      return "The connection was lost. Reconnecting; nothing gets lost.";
    case "stopping":
      return "Stopping";
    default:
      return "Sending";
  }
}

function prefilled({ phase, progress }) {
  if (phase !== "prefill" || !progress?.prompt_tokens) return null;
  const share = progress.prefilled_tokens / progress.prompt_tokens;
  return share < 1 ? share : null;
}

function Failure({ answer }) {
  const { text, traceId } = answer.error;
  return html`<div class="failure" role="alert">
    <p>${text}</p>
    ${traceId && html`<p class="hint">Trace ${traceId}</p>`}
    <div class="buttons">
      <button type="button" class="quiet" onClick=${() => dismiss(answer)}>Back to the prompt</button>
      <button type="button" class="primary" onClick=${() => again(answer)}>Try again</button>
    </div>
  </div>`;
}

// Code blocks: their language, a copy button, and colours, which are loaded when code is shown.

import DOMPurify from "../vendor/purify.js";
import { announce } from "./store.js";

const MOST_COLOURED = 30_000; // characters; colouring more takes longer than a frame

let highlighter = null;

// Add the head and the colours of a block; while more of it may come, it has no colours.
export function decorateCode(pre, isComplete) {
  const code = pre.querySelector("code");
  if (!code) return;
  const language = code.dataset.language ?? "";
  const frame = document.createElement("div");
  frame.className = "code";
  frame.dir = "ltr"; // in whatever language the text around it is
  pre.replaceWith(frame);
  pre.tabIndex = 0; // so that the keyboard can scroll it
  frame.append(head(language, code), pre);
  if (isComplete && language && code.textContent.length < MOST_COLOURED) colour(code, language);
}

export async function copy(text) {
  await writeClipboard(text);
  announce("Copied.");
}

function head(language, code) {
  const element = document.createElement("div");
  element.className = "code-head";
  const name = document.createElement("span");
  name.textContent = language;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet small";
  button.textContent = "Copy";
  button.setAttribute("aria-label", language ? `Copy ${language} code` : "Copy code");
  button.addEventListener("click", async () => {
    await copy(code.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  element.append(name, button);
  return element;
}

async function colour(code, language) {
  highlighter ??= import("../vendor/highlight.js");
  const { default: highlight } = await highlighter;
  if (!highlight.getLanguage(language)) return;
  const { value } = highlight.highlight(code.textContent, { language, ignoreIllegals: true });
  code.replaceChildren(
    DOMPurify.sanitize(value, {
      ALLOWED_TAGS: ["span"],
      ALLOWED_ATTR: ["class"],
      RETURN_DOM_FRAGMENT: true,
    }),
  );
}

// navigator.clipboard needs HTTPS or localhost.
async function writeClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "hidden-text";
  // within an open dialog, as elements outside of it can't be focused
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

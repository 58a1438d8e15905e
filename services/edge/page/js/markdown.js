// Markdown of answers as safe elements. Answers are written by a model, so nothing in them may run
// or load: HTML is shown as text, DOMPurify checks the rest, and the page's policy is behind it.

import { Marked } from "../vendor/marked.js";
import DOMPurify from "../vendor/purify.js";
import { decorateCode } from "./code.js";
import { mathExtensions, showMath } from "./math.js";

const HARMLESS_HTML = /^<\/?(?:b|br|i|kbd|mark|s|sub|sup|u)\s*\/?>$/i;
const TAGS =
  "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i img input kbd li mark ol p pre s span strong" +
  " sub sup table tbody td th thead tr u ul";
const PLAIN_ATTRIBUTES = "align alt checked class data-display data-language disabled start title type";
const PURIFY = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", "src", ...PLAIN_ATTRIBUTES.split(" ")],
  ADD_URI_SAFE_ATTR: PLAIN_ATTRIBUTES.split(" "),
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|tel:|#)/i,
  ADD_DATA_URI_TAGS: ["img"],
  RETURN_DOM_FRAGMENT: true,
};

const marked = new Marked({
  gfm: true,
  extensions: mathExtensions,
  renderer: {
    html({ text }) {
      return HARMLESS_HTML.test(text.trim()) ? text : escape(text);
    },
    image({ href, text }) {
      if (href.startsWith("data:image/")) return `<img src="${escape(href)}" alt="${escape(text)}">`;
      return `<a href="${escape(href)}">Image: ${escape(text || href)}</a>`;
    },
    code({ text, lang }) {
      const language = (lang ?? "").trim().split(/\s/)[0];
      return `<pre><code data-language="${escape(language)}">${escape(text)}</code></pre>`;
    },
  },
});

// Shows a text that grows. Only its last block is rendered again: those before it can't change.
export class MarkdownView {
  #element;
  #text = "";
  #stable = 0; // characters in blocks that are rendered for good
  #open = []; // elements of the blocks after them

  constructor(element) {
    this.#element = element;
  }

  update(text, isComplete) {
    if (!text.startsWith(this.#text)) this.#reset();
    this.#text = text;
    this.#open.forEach((element) => element.remove());
    this.#open = [];
    const tokens = lex(text.slice(this.#stable));
    const last = isComplete ? tokens.length : lastBlock(tokens);
    tokens.forEach((token, number) => {
      const isOpen = number >= last;
      const block = renderBlock(token, tokens.links, !isOpen);
      if (!isOpen) this.#stable += token.raw.length;
      if (!block) return;
      this.#element.append(block);
      if (isOpen) this.#open.push(block);
    });
  }

  #reset() {
    this.#element.replaceChildren();
    this.#stable = 0;
    this.#open = [];
  }
}

// Return the number of the last block that is not blank: the text to come can still change it.
function lastBlock(tokens) {
  const found = tokens.findLastIndex((token) => token.type !== "space");
  return found < 0 ? tokens.length : found;
}

// Text that is nested so deeply that the parser gives up is shown as it is.
function lex(text) {
  try {
    return marked.lexer(text);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return Object.assign([{ type: "plain", raw: text }], { links: {} });
  }
}

function toHtml(token, links) {
  try {
    return marked.parser(Object.assign([token], { links }));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return null;
  }
}

function renderBlock(token, links, isComplete) {
  if (token.type === "space" || token.type === "def") return null;
  const html = token.type === "plain" ? null : toHtml(token, links);
  const block = document.createElement("div");
  block.className = "block";
  block.dir = "auto"; // by its first letters
  if (html === null) block.textContent = token.raw;
  else fill(block, html, isComplete);
  return block;
}

function fill(block, html, isComplete) {
  block.append(DOMPurify.sanitize(html, PURIFY));
  block.querySelectorAll("a").forEach(guardLink);
  block.querySelectorAll("table").forEach(makeScrollable);
  block.querySelectorAll("input").forEach(disable);
  block.querySelectorAll("pre").forEach((pre) => decorateCode(pre, isComplete));
  showMath(block);
}

function guardLink(link) {
  link.target = "_blank";
  link.rel = "noopener noreferrer";
}

function makeScrollable(table) {
  const frame = document.createElement("div");
  frame.className = "table";
  frame.tabIndex = 0;
  frame.setAttribute("role", "region");
  frame.setAttribute("aria-label", "Table");
  table.replaceWith(frame);
  frame.append(table);
}

// The boxes of task lists are the only inputs of Markdown.
function disable(input) {
  input.type = "checkbox";
  input.disabled = true;
  input.setAttribute("aria-label", input.checked ? "done" : "to do");
}

function escape(text) {
  const entities = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (character) => entities[character]);
}

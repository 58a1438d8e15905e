// LaTeX in Markdown: $…$, $$…$$, \(…\) and \[…\]. KaTeX is loaded when there is some.

import DOMPurify from "../vendor/purify.js";
import { addStyle } from "./style.js";

const BLOCK = /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])(?:\s*(?:\n|$))/;
const INLINE_DISPLAY = /^(?:\$\$([^$]+?)\$\$|\\\[([\s\S]+?)\\\])/;
// no space inside of the dollars, and no digit after them: "$5 and $6" are prices
const INLINE = /^(?:\$(?![\s$])((?:\\.|[^\\$\n])+?)(?<![\s\\])\$(?![\d\w])|\\\(([\s\S]+?)\\\))/;

let katex = null;

function extension(name, level, start, rules) {
  return {
    name,
    level,
    start: (text) => text.match(start)?.index,
    tokenizer(text) {
      for (const { rule, isDisplay } of rules) {
        const found = rule.exec(text);
        if (found) return { type: name, raw: found[0], tex: found[1] ?? found[2], isDisplay };
      }
    },
    renderer({ tex, isDisplay }) {
      const span = `<span class="math" data-display="${isDisplay}">${escape(tex)}</span>`;
      return level === "block" ? `<p>${span}</p>` : span;
    },
  };
}

export const mathExtensions = [
  extension("mathBlock", "block", /\$\$|\\\[/, [{ rule: BLOCK, isDisplay: true }]),
  extension("mathInline", "inline", /\$|\\[([]/, [
    { rule: INLINE_DISPLAY, isDisplay: true },
    { rule: INLINE, isDisplay: false },
  ]),
];

// Replace the LaTeX in an element by formulas; until KaTeX is loaded it shows the LaTeX.
export function showMath(element) {
  const formulas = element.querySelectorAll(".math");
  if (!formulas.length) return;
  if (katex?.render) {
    formulas.forEach(render);
    return;
  }
  katex ??= load();
  katex.then?.(() => formulas.forEach(render));
}

async function load() {
  const { default: module } = await import("../vendor/katex/katex.js");
  await addStyle("../vendor/katex/katex.css");
  katex = module;
}

function render(formula) {
  const html = katex.renderToString(formula.textContent, {
    displayMode: formula.dataset.display === "true",
    throwOnError: false,
    strict: false,
    trust: false,
    maxExpand: 200,
    maxSize: 20,
  });
  // KaTeX places parts by style attributes, which the page's policy forbids in HTML, but not here.
  // In its output every quote within text is escaped.
  const inert = html.replaceAll(' style="', ' data-style="');
  const fragment = DOMPurify.sanitize(inert, {
    ADD_TAGS: ["semantics", "annotation"],
    ADD_ATTR: ["encoding"],
    RETURN_DOM_FRAGMENT: true,
  });
  fragment.querySelectorAll("[data-style]").forEach((element) => {
    element.style.cssText = element.dataset.style;
    delete element.dataset.style;
  });
  formula.replaceChildren(fragment);
}

function escape(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

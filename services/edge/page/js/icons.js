// Icons, drawn for this page as strokes on a grid of 24.

import { html } from "../vendor/preact.js";

const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  search: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM20 20l-4-4",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  retry: "M19 12a7 7 0 1 1-2-5M19 4v4h-4",
  edit: "M5 19h4L19 9l-4-4L5 15z",
  branch: "M7 4v12M7 20a2 2 0 1 0 0-4 2 2 0 0 0 0 4zM17 8a2 2 0 1 0 0-4 2 2 0 0 0 0 4zM17 8c0 5-10 3-10 8",
  more: "M5 12a1 1 0 1 0 2 0 1 1 0 1 0-2 0M11 12a1 1 0 1 0 2 0 1 1 0 1 0-2 0M17 12a1 1 0 1 0 2 0 1 1 0 1 0-2 0",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4",
  help: "M9.5 9a2.5 2.5 0 1 1 3.5 2.3c-.7.3-1 .9-1 1.7M12 17h.01M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18z",
  theme: "M12 3a9 9 0 1 0 0 18zM12 21a9 9 0 0 0 0-18",
  status: "M4 19h16M6 16v-4M11 16V6M16 16V9",
  close: "M6 6l12 12M18 6L6 18",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  compare: "M4 5h6v14H4zM14 5h6v14h-6z",
  upload: "M12 16V5M7 10l5-5 5 5M5 19h14",
  download: "M12 5v11M7 11l5 5 5-5M5 20h14",
  trash: "M5 7h14M9 7V5h6v2M7 7l1 12h8l1-12",
  continue: "M5 6l7 6-7 6zM13 6l7 6-7 6z",
  check: "M5 12l5 5 9-10",
  tool: "M14 6a4 4 0 0 0 5 5l-8 8-4-4 8-8z",
  up: "M7 11v8H4v-8zM7 11l4-7c2 0 2 1 2 2v3h6l-2 9c0 1-1 1-2 1H7",
  down: "M17 13V5h3v8zM17 13l-4 7c-2 0-2-1-2-2v-3H5l2-9c0-1 1-1 2-1h8",
  key: "M15 13a4 4 0 1 0-3.5-2L5 17.500V20h2.500M8 17l2 2",
};

export function Icon({ name }) {
  return html`<svg class="icon" data-name=${name} viewBox="0 0 24 24" aria-hidden="true" focusable="false">
    <path d=${PATHS[name]} />
  </svg>`;
}

// A button that is only an icon; its label is for screen readers and as a tooltip.
export function IconButton({ name, label, ...more }) {
  return html`<button type="button" class="icon-button" aria-label=${label} title=${label} ...${more}>
    <${Icon} name=${name} />
  </button>`;
}

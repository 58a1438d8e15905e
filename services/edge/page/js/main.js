// Starts the page: what it shows first, and what it looks at again.

import { html, render } from "../vendor/preact.js";
import { onKeyNeeded, requestJson } from "./api.js";
import { App } from "./app.js";
import { attempt } from "./attempt.js";
import { resumeAll } from "./chat.js";
import { showTheme } from "./dialogs.js";
import { loadSessions, openAddress, refresh, titleOf } from "./sessions.js";
import { onKeyDown } from "./shortcuts.js";
import { onChange, state, update } from "./store.js";

const REFRESH_MILLISECONDS = 10_000;

function show() {
  render(html`<${App} />`, document.querySelector("#app"));
  const title = state.route.session !== null && state.chat && titleOf(state.chat.id);
  document.title = title ? `${title} · FineTuneLLM` : "FineTuneLLM";
}

async function loadModels() {
  const { data } = await requestJson("v1/models");
  const chat = data.filter((model) => model.type === "chat");
  update({
    models: chat.filter((model) => model.status.value === "loaded"),
    otherModels: chat.filter((model) => model.status.value !== "loaded"),
  });
}

// Other devices change sessions, too, and models come and go.
function keepFresh() {
  const look = async () => {
    if (document.hidden || state.dialog) return;
    await Promise.all([refresh(), loadModels()]).catch(() => {}); // the next look may succeed
  };
  setInterval(look, REFRESH_MILLISECONDS);
  document.addEventListener("visibilitychange", look);
}

showTheme();
document.querySelector("#app").replaceChildren();
onChange(show);
onKeyNeeded((text) => update({ dialog: { name: "key", text } }));
addEventListener("hashchange", () => attempt(openAddress));
addEventListener("keydown", onKeyDown);
addEventListener("storage", resumeAll);
await Promise.all([attempt(openAddress), attempt(loadSessions), attempt(loadModels)]);
resumeAll();
keepFresh();

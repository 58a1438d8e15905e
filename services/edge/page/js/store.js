// The state of the page: one object, and one listener that renders it.

export const state = {
  route: { view: "chat", session: null },
  sessions: [],
  hasMoreSessions: false,
  areSessionsLoaded: false,
  search: "",
  models: [], // that are ready
  otherModels: [],
  chat: null, // the open session: see sessions.js
  running: new Map(), // RunningAnswer by session id
  dialog: null, // {name, …}
  dismissed: null, // the last answer that was taken away: its prompt is a draft again
  notice: null, // {text, kind}
  announcement: "", // for screen readers
  isSidebarOpen: false, // on a phone
  isSidebarHidden: false, // elsewhere
  // of answers that this page has watched, by request id
  thought: new Map(), // seconds of reasoning
  unfolded: new Set(), // whose reasoning is shown
  sideBySide: new Set(), // turns, by the id of their first version
};

// Return whether a session's answer is being generated.
export function isAnswering(id) {
  return state.running.get(id)?.isEnded === false;
}

let render = () => {};
let isScheduled = false;

export function onChange(listener) {
  render = listener;
}

// Change the state, and render it with the next frame.
export function update(change = {}) {
  Object.assign(state, change);
  if (isScheduled) return;
  isScheduled = true;
  // a hidden tab has no frames, but its title and its announcements matter
  const schedule = document.hidden ? (run) => setTimeout(run, 50) : requestAnimationFrame;
  schedule(() => {
    isScheduled = false;
    render();
  });
}

export function announce(text) {
  update({ announcement: text });
}

export function notify(text, kind = "info") {
  update({ notice: { text, kind } });
}

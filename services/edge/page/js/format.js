// Numbers, times and names for people.

export function count(number) {
  return number.toLocaleString("en");
}

export function seconds(value) {
  if (value < 1) return "less than a second";
  if (value < 10) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

// Return the tokens per second of an answer; null if there is nothing to measure.
export function speed({ usage, timings }) {
  if (timings.decode <= 0 || usage.completion_tokens < 2) return null;
  return (usage.completion_tokens - 1) / timings.decode;
}

const DAY = 24 * 3600 * 1000;

// Return the heading under which the sidebar lists a session.
export function period(iso) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const at = new Date(iso).getTime();
  if (at >= midnight) return "Today";
  if (at >= midnight - DAY) return "Yesterday";
  if (at >= midnight - 6 * DAY) return "This week";
  return new Date(iso).toLocaleDateString("en", { month: "long", year: "numeric" });
}

export function when(iso) {
  return new Date(iso).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
}

// Return a name that file systems accept.
export function fileName(title) {
  return title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "chat";
}

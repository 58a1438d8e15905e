// Figures of the fleet for people.

import { count } from "../format.js";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(value) {
  const power = Math.min(Math.floor(Math.log2(Math.max(value, 1)) / 10), UNITS.length - 1);
  const scaled = value / 2 ** (10 * power);
  return `${scaled.toFixed(scaled < 10 && power ? 1 : 0)} ${UNITS[power]}`;
}

// Return a duration from milliseconds to minutes; a dash if it is not known.
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  return `${Math.round(seconds / 60)} min`;
}

export function rate(value) {
  if (value === null || value === undefined) return "–";
  return value < 10 && value > 0 ? value.toFixed(1) : count(Math.round(value));
}

export function whole(value) {
  return value === null || value === undefined ? "–" : count(value);
}

export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

export function clock(milliseconds) {
  return new Date(milliseconds).toLocaleTimeString("en-GB");
}

// Return how long ago something was, in steps that don't flicker.
export function ago(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  return `${Math.floor(seconds / 3600)} h ago`;
}

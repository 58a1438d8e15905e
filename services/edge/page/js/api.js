// Requests to the server: the key, errors as sentences, and paths below the page's own address.

import { load, save, tab } from "./storage.js";

let key = tab.load("key", null) ?? load("key", "");
let askForKey = () => {};

// An error that the server described. `code` is empty if something else answered, like a proxy.
export class ApiError extends Error {
  constructor(status, { message, code = "", trace_id: traceId = "" }, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.traceId = traceId;
    this.retryAfter = retryAfter;
  }
}

// Call `listener` with a sentence when a request was rejected for want of a key.
export function onKeyNeeded(listener) {
  askForKey = listener;
}

export function hasKey() {
  return key !== "";
}

// Use a key; without `remember` only until the tab is closed.
export function useKey(value, remember) {
  forgetKey();
  key = value;
  if (remember) save("key", value);
  else tab.save("key", value);
}

export function forgetKey() {
  key = "";
  tab.save("key", null);
  save("key", null);
}

// Return the response. Throws ApiError, or TypeError if the server can't be reached.
export async function request(path, { headers = {}, json, ...options } = {}) {
  const all = new Headers(headers);
  if (key) all.set("Authorization", `Bearer ${key}`);
  if (json !== undefined) {
    all.set("Content-Type", "application/json");
    options.body = JSON.stringify(json);
  }
  const response = await fetch(path, { ...options, headers: all, cache: "no-store" });
  if (response.ok) return response;
  const error = await describe(response);
  if (response.status === 401) askForKey(error.message);
  throw error;
}

export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

async function describe(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  const body = await response.json().catch(() => null);
  const error = body?.error?.message ? body.error : { message: unknownError(response.status) };
  return new ApiError(response.status, error, retryAfter);
}

function unknownError(status) {
  return `The server answered with status ${status} and no explanation. Try again in a moment.`;
}

// Return a sentence for people, whatever was thrown.
export function toSentence(error) {
  if (error instanceof ApiError) return error.message;
  if (error instanceof TypeError) return "The server can’t be reached. Check that it is running.";
  return String(error?.message ?? error);
}

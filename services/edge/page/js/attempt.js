// What people started, and what went wrong with it.

import { toSentence } from "./api.js";
import { notify } from "./store.js";

// Run an action; show the sentence of its error. Return whether it succeeded.
export async function attempt(action) {
  try {
    await action();
    return true;
  } catch (error) {
    if (error.status !== 401) notify(toSentence(error), "error"); // for a key, a dialog asks
    return false;
  }
}

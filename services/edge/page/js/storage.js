// What this browser keeps: the key, preferences, drafts, and answers that run.

const PREFIX = "finetunellm.";

// A store of names and JSON values. What the browser does not keep, because it is full or because
// people forbid it, holds until the page is closed.
class Store {
  #open;
  #unkept = new Map();

  // `open` returns a Storage, or throws if people forbid it.
  constructor(open) {
    this.#open = open;
  }

  load(name, fallback) {
    if (this.#unkept.has(name)) return this.#unkept.get(name) ?? fallback;
    try {
      return JSON.parse(this.#open().getItem(PREFIX + name)) ?? fallback;
    } catch {
      return fallback; // written by another program
    }
  }

  // Keep a value; null removes it.
  save(name, value) {
    this.#unkept.delete(name);
    try {
      if (value === null) this.#open().removeItem(PREFIX + name);
      else this.#open().setItem(PREFIX + name, JSON.stringify(value));
    } catch {
      this.#unkept.set(name, value);
    }
  }

  // Return the parts of names after `kind.`.
  names(kind) {
    const start = `${PREFIX}${kind}.`;
    return this.#keys()
      .filter((name) => name.startsWith(start))
      .map((name) => name.slice(start.length));
  }

  #keys() {
    try {
      return Object.keys(this.#open());
    } catch {
      return [];
    }
  }
}

const browser = new Store(() => localStorage);
export const tab = new Store(() => sessionStorage);

export const load = browser.load.bind(browser);
export const save = browser.save.bind(browser);
export const names = browser.names.bind(browser);

// crypto.randomUUID needs HTTPS, which a server at home rarely has.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

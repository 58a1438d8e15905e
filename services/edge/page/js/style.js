// Style sheets of what is loaded on demand.

// Add a style sheet, and wait until it holds. `path` is relative to this folder.
export function addStyle(path) {
  return new Promise((resolve) => {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL(path, import.meta.url).href;
    link.onload = link.onerror = resolve;
    document.head.append(link);
  });
}

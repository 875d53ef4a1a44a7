// Addresses: /, /searches, /c/<category>, /c/<category>/<tab>, below the prefix at which the fleet is offered.

import { html, useEffect, useState } from "./html.js";

/** Where the fleet begins, with a slash at the end: `/` or `/prefix/`. */
export const ROOT = new URL("..", import.meta.url).pathname;

/** The address of a page; `parts` are encoded here. */
export function address(...parts) {
  return ROOT + parts.map(encodeURIComponent).join("/");
}

export function categoryAddress(category, tab) {
  return tab && tab !== "inspect" ? address("c", category, tab) : address("c", category);
}

/** {page: "fleet" | "searches" | "category" | "unknown", category, tab} of the present address. */
export function whereIs(pathname) {
  const inside = pathname.startsWith(ROOT) ? pathname.slice(ROOT.length) : "";
  const parts = inside.split("/").filter(Boolean).map(decoded);
  if (parts.length === 0) return { page: "fleet" };
  if (parts.length === 1 && parts[0] === "searches") return { page: "searches" };
  if (parts[0] === "c" && (parts.length === 2 || parts.length === 3)) {
    return { page: "category", category: parts[1], tab: parts[2] ?? "inspect" };
  }
  return { page: "unknown" };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export function navigate(to, { replace = false } = {}) {
  history[replace ? "replaceState" : "pushState"](null, "", to);
  dispatchEvent(new PopStateEvent("popstate"));
}

/** The present address; renders again when it changes. */
export function useAddress() {
  const [href, setHref] = useState(location.href);
  useEffect(() => {
    const follow = () => setHref(location.href);
    addEventListener("popstate", follow);
    return () => removeEventListener("popstate", follow);
  }, []);
  return new URL(href);
}

/** A link inside of the console; with Ctrl or the middle button it opens as any other. */
export function Link({ to, children, ...rest }) {
  const follow = (event) => {
    if (event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    navigate(to);
  };
  return html`<a href=${to} onClick=${follow} ...${rest}>${children}</a>`;
}

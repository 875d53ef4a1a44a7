// What stands where there is nothing to show, or not yet.

import { html } from "../html.js";
import { Icon } from "./icons.js";

/** Text of the API as a sentence, with what stands between backticks as code. */
export function prose(text) {
  const whole = String(text).trim();
  const sentence = whole.charAt(0).toUpperCase() + whole.slice(1) + (/[.!?…]$/.test(whole) ? "" : ".");
  return sentence.split("`").map((part, index) => (index % 2 ? html`<code key=${index}>${part}</code>` : part));
}

/** A problem as the fleet tells it: what happened, and what to do. */
export function ProblemMessage({ problem, onRetry, quiet = false }) {
  if (!problem) return null;
  return html`<div class="message ${quiet ? "quiet" : ""}" role="alert">
    <${Icon} name="warn" size=${20} />
    <div>
      <strong>${problem.title ?? "Something went wrong"}</strong>
      <p>${prose(problem.detail ?? problem.message ?? problem)}</p>
      ${problem.remedy && html`<p class="remedy">${prose(problem.remedy)}</p>`}
    </div>
    ${onRetry && html`<button type="button" onClick=${onRetry}>Try again</button>`}
  </div>`;
}

/** To whoever lacks the scope `operate`; `what` they may not do. */
export function OperatorsOnly({ session, what }) {
  return html`<${ProblemMessage} problem=${{
    title: "Not for this token",
    detail: `The token of ${session.name} may inspect, but not ${what}.`,
    remedy: "Sign in with a token that has the scope operate.",
  }} />`;
}

export function Empty({ title, children, icon = "image" }) {
  return html`<div class="empty">
    <${Icon} name=${icon} size=${32} />
    <p class="empty-title">${title}</p>
    <div>${children}</div>
  </div>`;
}

/** Grey blocks of the size of what comes. */
export function Skeleton({ rows = 3, height = 20 }) {
  return html`<div class="skeleton" role="status" aria-label="Loading">
    ${Array.from({ length: rows }, (_, row) => html`<div key=${row} style=${{ height: `${height}px` }} />`)}
  </div>`;
}

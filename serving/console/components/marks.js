// Verdicts and states: each by colour, by shape and by word.

import { html } from "../html.js";
import { Icon } from "./icons.js";

/** The verdict on one part. */
export function Verdict({ bad, large = false }) {
  return html`<span class="verdict ${bad ? "bad" : "good"} ${large ? "large" : ""}">
    <${Icon} name=${bad ? "bad" : "good"} size=${large ? 28 : 16} />${bad ? "Defective" : "Good"}
  </span>`;
}

const STATES = {
  READY: { icon: "ready", word: "Ready", tone: "good" },
  LOADING: { icon: "loading", word: "Loading", tone: "warn" },
  IDLE: { icon: "idle", word: "Idle", tone: "quiet" },
  FAILED: { icon: "warn", word: "Failed", tone: "bad" },
};

const SEARCH_STATES = {
  pending: { icon: "idle", word: "Waiting", tone: "quiet" },
  running: { icon: "loading", word: "Running", tone: "warn" },
  stopped: { icon: "idle", word: "Stopped", tone: "quiet" },
  done: { icon: "ready", word: "Done", tone: "good" },
  failed: { icon: "warn", word: "Failed", tone: "bad" },
};

const marked = (states) => ({ state }) => {
  const { icon, word, tone } = states[state] ?? { icon: "idle", word: state, tone: "quiet" };
  return html`<span class="state ${tone}"><${Icon} name=${icon} />${word}</span>`;
};

/** What a category does. */
export const StateMark = marked(STATES);

/** What a search does. */
export const SearchMark = marked(SEARCH_STATES);

/** A candidate waits to be promoted. */
export function CandidateMark({ version }) {
  return html`<span class="tag accent"><${Icon} name="star" size=${12} />v${version} waits</span>`;
}

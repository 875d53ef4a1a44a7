// Which version serves, and moving that with a reason: promote, discard, roll back.

import { move, operation } from "../api.js";
import { html, useEffect, useState } from "../html.js";
import { Icon } from "./icons.js";
import { ReasonDialog } from "./dialog.js";
import { ProblemMessage, prose } from "./messages.js";

const ASK_MS = 1000;

const MOVES = {
  promote: {
    label: "Promote", title: (name, version) => `Promote version ${version} of ${name}`,
    text: "Candidate and champion are compared on normal images that neither was fitted to. The better one serves; the other stays in the registry.",
    first: "There is no champion to compare it with: it becomes the first.",
    force: "Promote it whatever the comparison says",
    running: "Comparing candidate and champion",
  },
  discard: {
    label: "Discard", title: (name, version) => `Discard the candidate, version ${version} of ${name}`,
    text: "It waits no more. The version itself stays in the registry.",
    running: "Discarding the candidate",
  },
  "roll-back": {
    label: "Roll back", title: (name) => `Roll ${name} back`,
    text: "The version that served before serves again.",
    running: "Rolling back",
  },
  "accept-feedback": {
    label: "Accept", title: (name) => `Accept false alarms of ${name}`,
    text: "False alarms that nobody disputes join the memory, eight at most. The new version waits as candidate.",
    force: "Even if a confirmed defect would pass",
    running: "Scoring false alarms and defects",
  },
};

const DONE = {
  promote: ({ version, moved, why }) => (moved ? `Version ${version} serves: ${why}` : `The champion stays: ${why}`),
  discard: ({ version }) => `Version ${version} waits no more`,
  "roll-back": ({ version }) => `Version ${version} serves again`,
  "accept-feedback": ({ version, why }) => `Version ${version} waits: ${why}`,
};

/** {candidate, champion} of a list of versions; the candidate only if it waits. */
export function aliased(versions) {
  const champion = versions.find(({ aliases }) => aliases.includes("champion"));
  const candidate = versions.find(({ aliases }) => aliases.includes("candidate"));
  return { champion, candidate: candidate === champion ? undefined : candidate };
}

/** The buttons, what stands beside them, and what comes of a move; `onMoved()` once one has ended. */
export function Moves({ category, versions, alarms = 0, onMoved, children }) {
  const [dialog, setDialog] = useState(null);
  const [running, setRunning] = useState(null);

  useEffect(() => {
    if (!running || running.state !== "running") return undefined;
    const timer = setTimeout(async () => {
      const now = await operation(running.id).catch((problem) => ({ state: "failed", error: problem }));
      if (now.error?.status === 0) return setRunning((before) => ({ ...before, turn: before.turn + 1 }));
      setRunning((before) => ({ ...before, ...now, turn: before.turn + 1 }));
      if (now.state !== "running") onMoved();
      return undefined;
    }, ASK_MS);
    return () => clearTimeout(timer);
  }, [running]);

  const { candidate, champion } = aliased(versions);
  const start = async (how, given) => {
    const begun = await move(category, how, given);
    setRunning({ turn: 0, state: "running", ...begun, how });
  };
  const isRunning = running?.state === "running";
  const isFirst = dialog === "promote" && !champion;
  return html`
    <div class="toolbar">
      <button type="button" class=${candidate ? "primary" : ""} disabled=${!candidate || isRunning} onClick=${() => setDialog("promote")}>Promote ${candidate ? `v${candidate.version} …` : "…"}</button>
      <button type="button" disabled=${!candidate || isRunning} onClick=${() => setDialog("discard")}>Discard …</button>
      <button type="button" disabled=${!champion || versions.length < 2 || isRunning} onClick=${() => setDialog("roll-back")}>Roll back …</button>
      ${alarms > 0 && html`<button type="button" disabled=${!champion || isRunning} onClick=${() => setDialog("accept-feedback")}>Accept false alarms …</button>`}
      ${children}
    </div>
    ${running && html`<${Operation} running=${running} onClose=${() => setRunning(null)} />`}
    ${dialog && html`<${ReasonDialog} title=${MOVES[dialog].title(category, candidate?.version)} label=${MOVES[dialog].label} force=${isFirst ? undefined : MOVES[dialog].force}
      tone=${["promote", "accept-feedback"].includes(dialog) ? "primary" : "danger"} act=${(given) => start(dialog, given)} onClose=${() => setDialog(null)}>
      <p>${isFirst ? MOVES.promote.first : MOVES[dialog].text}</p><//>`}`;
}

function Operation({ running, onClose }) {
  const { state, how, result, error } = running;
  if (state === "failed") {
    const problem = error?.title ? error : { title: `${MOVES[how].label}: it failed`, detail: error ?? "no reason was given" };
    return html`<div class="operation"><${ProblemMessage} problem=${problem} /><button type="button" onClick=${onClose}>Close</button></div>`;
  }
  return html`<div class="operation ${state}" role="status">
    <${Icon} name=${state === "done" ? "good" : "loading"} size=${20} class=${state === "done" ? "" : "turning"} />
    <p><strong>${state === "done" ? "Done" : MOVES[how].running}</strong><span>${state === "done" ? prose(DONE[how](result)) : ["promote", "accept-feedback"].includes(how) ? "This takes up to some minutes." : ""}</span></p>
    ${state === "done" && html`<button type="button" onClick=${onClose}>Close</button>`}
  </div>`;
}

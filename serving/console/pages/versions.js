// Versions: which serves, which waits, and moving the champion with a reason.

import { move, operation, versions } from "../api.js";
import { html, useEffect, useState } from "../html.js";
import { NONE, score, when } from "../format.js";
import { may, useLoaded } from "../hooks.js";
import { Icon } from "../components/icons.js";
import { ReasonDialog } from "../components/dialog.js";
import { Empty, ProblemMessage, prose, Skeleton } from "../components/messages.js";

const ASK_MS = 1000;

const MOVES = {
  promote: {
    label: "Promote", title: (name, version) => `Promote version ${version} of ${name}`,
    text: "Candidate and champion are compared on normal images that neither was fitted to. The better one serves; the other stays in the registry.",
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
};

export function VersionsTab({ session, category, reload }) {
  const operates = may(session, "operate");
  const found = useLoaded((signal) => (operates ? versions(category, signal) : Promise.resolve(null)), [category, operates]);
  const [dialog, setDialog] = useState(null);
  const [running, setRunning] = useState(null);

  useEffect(() => {
    if (!running || running.state !== "running") return undefined;
    const timer = setTimeout(async () => {
      const now = await operation(running.id).catch((problem) => ({ state: "failed", error: problem }));
      if (now.error?.status === 0) return setRunning((before) => ({ ...before, turn: before.turn + 1 }));
      setRunning((before) => ({ ...before, ...now, turn: before.turn + 1 }));
      if (now.state !== "running") {
        found.reload();
        reload();
      }
      return undefined;
    }, ASK_MS);
    return () => clearTimeout(timer);
  }, [running]);

  if (!operates) {
    return html`<${ProblemMessage} problem=${{
      title: "Not for this token",
      detail: `The token of ${session.name} may inspect, but not see or move versions.`,
      remedy: "Sign in with a token that has the scope operate.",
    }} />`;
  }
  const list = found.data?.versions ?? [];
  const candidate = list.find(({ aliases }) => aliases.includes("candidate"));
  const champion = list.find(({ aliases }) => aliases.includes("champion"));
  const waits = candidate && candidate !== champion;
  const start = async (how, given) => {
    const begun = await move(category, how, given);
    setRunning({ turn: 0, state: "running", ...begun, how });
  };
  const isRunning = running?.state === "running";
  return html`<section class="panel versions" aria-label="Versions">
    <div class="toolbar">
      <button type="button" class=${waits ? "primary" : ""} disabled=${!waits || isRunning} onClick=${() => setDialog("promote")}>Promote ${waits ? `v${candidate.version} …` : "…"}</button>
      <button type="button" disabled=${!waits || isRunning} onClick=${() => setDialog("discard")}>Discard …</button>
      <button type="button" disabled=${!champion || list.length < 2 || isRunning} onClick=${() => setDialog("roll-back")}>Roll back …</button>
      <p class="hint grow">Every version stays in the registry; the champion is the one that serves.</p>
    </div>
    ${running && html`<${Operation} running=${running} onClose=${() => setRunning(null)} />`}
    <${ProblemMessage} problem=${found.problem} onRetry=${found.reload} />
    ${found.isLoading && !found.data && !found.problem && html`<${Skeleton} rows=${4} height=${48} />`}
    ${found.data && list.length === 0 && html`<${Empty} title="No version yet"><p>A search registers the first one.</p><//>`}
    ${list.length > 0 && html`<div class="scroller" tabindex="0" role="region" aria-label="List of versions"><table class="list">
      <thead><tr><th scope="col">Version</th><th scope="col">Registered</th><th scope="col" class="num">Validation</th>
        <th scope="col">Verdict</th><th scope="col">Served, and why</th><th scope="col">Settings</th><th scope="col"><span class="visually-hidden">Elsewhere</span></th></tr></thead>
      <tbody>${list.map((each) => html`<${Version} key=${each.version} version=${each} />`)}</tbody>
    </table></div>`}
    ${dialog && html`<${ReasonDialog} title=${MOVES[dialog].title(category, candidate?.version)} label=${MOVES[dialog].label} force=${MOVES[dialog].force}
      tone=${dialog === "promote" ? "primary" : "danger"} act=${(given) => start(dialog, given)} onClose=${() => setDialog(null)}><p>${MOVES[dialog].text}</p><//>`}
  </section>`;
}

function Version({ version }) {
  const { aliases, settings = {} } = version;
  return html`<tr class=${aliases.includes("champion") ? "champion" : ""}>
    <th scope="row"><span class="version">v${version.version}</span>
      ${aliases.map((alias) => html`<span key=${alias} class="tag ${{ champion: "good", candidate: "accent" }[alias] ?? ""}">${alias}</span>`)}</th>
    <td class="nowrap">${when(version.created)}</td>
    <td class="num">${score(version.validation)}</td>
    <td>${version.verdict ? html`${version.verdict}<span class="hint">${[version.difference, version.judged_on].filter(Boolean).join(", on ")}</span>` : NONE}</td>
    <td class="reason">${version.served_since && html`<span>Champion since ${when(version.served_since)}</span>`}
      ${version.reason && html`<span>${version.reason}</span>`}${version.by && html`<span class="hint">${version.by}</span>`}
      ${version.discarded && html`<span>Discarded: ${version.discarded}</span>`}
      ${!version.served_since && !version.reason && !version.discarded && NONE}</td>
    <td class="settings">${version.shots != null && html`<span><span class="hint">shots</span> ${version.shots}</span>`}
      ${Object.entries(settings).map(([name, value]) => html`<span key=${name}><span class="hint">${name.replaceAll("_", " ")}</span> ${value}</span>`)}</td>
    <td>${version.link && html`<a href=${version.link} target="_blank" rel="noopener noreferrer" class="nowrap">MLflow<${Icon} name="link" size=${12} /></a>`}</td>
  </tr>`;
}

function Operation({ running, onClose }) {
  const { state, how, result, error } = running;
  if (state === "failed") {
    const problem = error?.title ? error : { title: `${MOVES[how].label}: it failed`, detail: error ?? "no reason was given" };
    return html`<div class="operation"><${ProblemMessage} problem=${problem} /><button type="button" onClick=${onClose}>Close</button></div>`;
  }
  return html`<div class="operation ${state}" role="status">
    <${Icon} name=${state === "done" ? "good" : "loading"} size=${20} class=${state === "done" ? "" : "turning"} />
    <p><strong>${state === "done" ? "Done" : MOVES[how].running}</strong><span>${state === "done" ? prose(DONE[how](result)) : how === "promote" ? "This takes up to some minutes." : ""}</span></p>
    ${state === "done" && html`<button type="button" onClick=${onClose}>Close</button>`}
  </div>`;
}

const DONE = {
  promote: ({ version, moved, why }) => (moved ? `Version ${version} serves: ${why}` : `The champion stays: ${why}`),
  discard: ({ version }) => `Version ${version} waits no more`,
  "roll-back": ({ version }) => `Version ${version} serves again`,
};

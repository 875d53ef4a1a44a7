// Versions: which serves, which waits, and moving the champion with a reason.

import { feedback, versions } from "../api.js";
import { html, useState } from "../html.js";
import { count, NONE, percent, score, when } from "../format.js";
import { may, useLoaded } from "../hooks.js";
import { categoryAddress, Link } from "../router.js";
import { FeedbackList } from "../components/feedback.js";
import { Icon, LinkOut } from "../components/icons.js";
import { Dialog } from "../components/dialog.js";
import { Empty, OperatorsOnly, ProblemMessage, Skeleton } from "../components/messages.js";
import { Moves } from "../components/moves.js";
import { VersionPictures } from "../components/pictures.js";

export function VersionsTab({ session, category, status, reload }) {
  const operates = may(session, "operate");
  const found = useLoaded((signal) => (operates ? versions(category, signal) : Promise.resolve(null)), [category, operates]);
  const list = found.data?.versions ?? [];
  const serves = list.some(({ aliases }) => aliases.includes("champion"));
  const said = useLoaded((signal) => (serves ? feedback(category, signal).catch(() => []) : Promise.resolve([])), [category, serves]);
  const alarms = (said.data ?? []).filter((each) => each.label === "false_alarm" && !each.is_disputed && !each.is_used).length;
  const [shown, setShown] = useState(null);
  if (!operates) return html`<${OperatorsOnly} session=${session} what="see or move versions" />`;
  const isNone = found.problem?.status === 404 || (found.data && list.length === 0);
  const moved = () => {
    found.reload();
    said.reload();
    reload();
  };
  return html`<section class="panel versions" aria-label="Versions">
    <${Moves} category=${category} versions=${list} alarms=${alarms} onMoved=${moved}>
      <p class="hint grow">Every version stays in the registry; the champion is the one that serves.</p><//>
    ${status?.shadow && html`<${Shadow} category=${category} shadow=${status.shadow} />`}
    ${!isNone && html`<${ProblemMessage} problem=${found.problem} onRetry=${found.reload} />`}
    ${found.isLoading && !found.data && !found.problem && html`<${Skeleton} rows=${4} height=${48} />`}
    ${isNone && html`<${Empty} title="No version yet"><p>A search registers the first one.</p><//>`}
    ${list.length > 0 && html`<div class="scroller" tabindex="0" role="region" aria-label="List of versions"><table class="list">
      <thead><tr><th scope="col">Version</th><th scope="col">Registered</th><th scope="col" class="num">Validation</th>
        <th scope="col">Verdict</th><th scope="col">Served, and why</th><th scope="col">Settings</th><th scope="col">More</th></tr></thead>
      <tbody>${list.map((each) => html`<${Version} key=${each.version} version=${each} onShow=${() => setShown(each.version)} />`)}</tbody>
    </table></div>`}
    ${said.data?.length > 0 && html`<h2>What people said</h2><${FeedbackList} category=${category} feedback=${said.data} />`}
    ${shown != null && html`<${Dialog} title="Version ${shown} of ${category}" onClose=${() => setShown(null)} wide>
      <${VersionPictures} category=${category} version=${shown} /><//>`}
  </section>`;
}

const signed = (value) => (value < 0 ? "" : "+") + score(value);

/** What the candidate makes of the images that the champion answers for. */
function Shadow({ category, shadow }) {
  const { champion, candidate, images, since, problem } = shadow;
  const differ = shadow.candidate_rejects + shadow.champion_rejects;
  return html`<section class="shadow" aria-label="The candidate beside the champion">
    <p><strong>Version ${candidate} is tried behind the answers of version ${champion}, on ${percent(shadow.share, 0)} of the images.</strong>
      ${" "}${problem ? `It cannot be: ${problem}.` : !images ? "It has seen none yet." : `Both agree on ${percent(shadow.agreement)} of ${count(images)} since ${when(since)}; it rejects ${count(shadow.candidate_rejects)} that pass, and lets ${count(shadow.champion_rejects)} pass that are rejected.`}</p>
    ${images > 0 && html`<p class="hint">Its scores are higher by ${signed(shadow.shift_mean)} in the mean; 90 % by ${signed(shadow.shift_p05)} to ${signed(shadow.shift_p95)}.
      ${shadow.dropped > 0 && ` There was no time for ${count(shadow.dropped)} more.`}
      ${differ > 0 && html`${" "}<${Link} to="${categoryAddress(category, "history")}?only=disagreeing">Look where they disagree<//>`}</p>`}
  </section>`;
}

function Version({ version, onShow }) {
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
    <td class="elsewhere"><button type="button" class="bare" aria-label="Pictures of version ${version.version}" onClick=${onShow}><${Icon} name="image" />Pictures</button>
      ${version.link && html`<${LinkOut} to=${version.link}>MLflow<//>`}</td>
  </tr>`;
}

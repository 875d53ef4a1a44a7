// One search: what it does now, how it ended, and why it failed.

import { search as askFor, stopSearch } from "../api.js";
import { html, useState } from "../html.js";
import { clock, duration, NONE, plural, score, when } from "../format.js";
import { useLoaded } from "../hooks.js";
import { Dialog } from "./dialog.js";
import { Icon, LinkOut } from "./icons.js";
import { SearchMark } from "./marks.js";
import { Empty, ProblemMessage, prose } from "./messages.js";

/** Whether it has not ended. */
export const isLive = ({ state }) => state === "pending" || state === "running";

const spread = ({ best, best_sd: sd }) => (best == null ? NONE : sd ? `${score(best)} ± ${score(sd)}` : score(best));

/** How far it is, in a few words. */
export function inShort({ dry_run: isEstimate, estimate, progress, state, problem }) {
  if (state === "failed") return problem ?? "no reason was given";
  if (isEstimate) return estimate ? `${range(estimate)} by the clock` : "";
  if (!progress) return state === "running" ? "encoding the images" : "";
  const trials = `${progress.ended} of ${progress.trials} trials`;
  const best = progress.best == null ? "" : `, best ${score(progress.best)}`;
  return `${trials}${best}${state === "running" && progress.left_s != null ? `, ${duration(progress.left_s)} left` : ""}`;
}

const range = ({ least_s: least, most_s: most }) =>
  duration(least) === duration(most) ? duration(most) : `${duration(least)} to ${duration(most)}`;

export function JobLink({ search }) {
  return search.link && html`<${LinkOut} to=${search.link}>Ray job<//>`;
}

/** Where the fleet file has no folder for searches. */
export function NoSearches() {
  return html`<section class="panel"><${Empty} title="This fleet takes no searches" icon="warn"><p>${prose("Give `searches` a folder in the fleet file and deploy it")}</p><//></section>`;
}

/** A search with its progress; `onChanged()` after it was stopped. */
export function SearchView({ search, onChanged }) {
  const [isAsked, setAsked] = useState(false);
  const { progress, state } = search;
  const live = isLive(search);
  return html`<section class="search-view" aria-label="Last search">
    <div class="search-head"><h2>Last search</h2><${SearchMark} state=${state} /></div>
    <div class="progress standing"><progress max=${progress?.trials ?? search.trials ?? 1} value=${progress?.ended ?? 0} aria-label="Trials that have ended" /></div>
    <dl class="facts">
      <div><dt>Trials</dt><dd>${progress ? `${progress.ended} of ${progress.trials}` : search.trials ?? NONE}</dd></div>
      <div><dt>Best so far</dt><dd>${progress ? spread(progress) : NONE}</dd></div>
      <div><dt>${live ? "Time left" : "Took"}</dt><dd>${live ? duration(progress?.left_s) : duration(search.ended_at && search.started_at ? search.ended_at - search.started_at : null)}</dd></div>
    </dl>
    <p class="hint" role="status">${telling(search)}</p>
    ${state === "failed" && html`<${ProblemMessage} problem=${{ title: "The search failed", detail: search.problem ?? "no reason was given", remedy: "Mend that and search again; the log says more." }} />`}
    <div class="row">
      ${live && html`<button type="button" onClick=${() => setAsked(true)}>Stop …</button>`}
      <${JobLink} search=${search} />
    </div>
    <${Log} search=${search} />
    ${isAsked && html`<${Stopping} search=${search} onChanged=${onChanged} onClose=${() => setAsked(false)} />`}
  </section>`;
}

function telling({ progress, state, by, started_at: at }) {
  const who = `${by ? `Started by ${by},` : "Started"} ${at ? when(at) : "a moment ago"}. `;
  if (state === "pending") return `${who}It waits for its turn on the cluster.`;
  if (state === "running") return who + (progress ? (progress.live ? `${plural(progress.live, "trial")} at work.` : "The winner is being fitted.") : "The images are being encoded.");
  if (state === "stopped") return `${who}It was stopped; the best so far is registered, if there was one.`;
  return who + (state === "done" ? "Its winner is registered." : "");
}

/** The end of the log, for whom the reason is not enough. */
function Log({ search }) {
  const [isOpen, setOpen] = useState(false);
  const found = useLoaded(async (signal) => (isOpen ? askFor(search.id, signal) : null), [search.id, search.state, isOpen]);
  return html`<details class="log" onToggle=${(event) => setOpen(event.target.open)}>
    <summary>Log</summary>
    ${found.problem ? html`<${ProblemMessage} problem=${found.problem} quiet onRetry=${found.reload} />`
      : html`<pre tabindex="0" role="region" aria-label="End of the log">${found.data?.log || "Nothing yet."}</pre>`}
  </details>`;
}

function Stopping({ search, onChanged, onClose }) {
  const [state, setState] = useState({ isBusy: false, problem: null });
  const stop = async () => {
    setState({ isBusy: true, problem: null });
    try {
      await stopSearch(search.id);
      onChanged();
      onClose();
    } catch (problem) {
      setState({ isBusy: false, problem });
    }
  };
  return html`<${Dialog} title="Stop the search of ${search.category}" onClose=${onClose}>
    <div class="dialog-body"><p>The best so far becomes the candidate, if a trial has come far enough.</p>
      <${ProblemMessage} problem=${state.problem} /></div>
    <footer><button type="button" onClick=${onClose}>Let it go on</button>
      <button type="button" class="danger" disabled=${state.isBusy} onClick=${stop}>Stop it</button></footer><//>`;
}

/** What a search will take, as it was timed; or that this is being found out. */
export function Estimate({ search, onChanged }) {
  const [problem, setProblem] = useState(null);
  const { estimate, state, shots, trials } = search;
  const of = shots && trials ? `${shots} shots, ${trials} trials` : "";
  if (state === "failed") return html`<${ProblemMessage} quiet problem=${{ title: "No estimate", detail: search.problem ?? "no reason was given" }} />`;
  if (!estimate) {
    return html`<p class="estimate" role="status"><span class="state warn">${isLive(search) && html`<${Icon} name="loading" class="turning" />`}
      ${isLive(search) ? "Timing the parts of a search" : "The estimate was stopped"}</span><span class="hint">${of}</span></p>
      ${isLive(search) && html`<button type="button" onClick=${() => stopSearch(search.id).then(onChanged, setProblem)}>Stop the estimate</button>`}
      <${ProblemMessage} problem=${problem} quiet />`;
  }
  const compute = estimate.gpu_s ? `${duration(estimate.gpu_s)} of a GPU, ${duration(estimate.cpu_s)} of a CPU` : `${duration(estimate.cpu_s)} of a CPU`;
  const has = [estimate.gpus && plural(estimate.gpus, "GPU"), plural(estimate.cpus, "CPU")].filter(Boolean).join(", ");
  return html`<p class="estimate" role="status"><b>${range(estimate)}</b><span>At most ${compute}; the cluster has ${has}.</span>
    <span class="hint">${[of, search.ended_at && `timed at ${clock(new Date(1000 * search.ended_at))}`].filter(Boolean).join("; ")}</span></p>`;
}

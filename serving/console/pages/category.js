// A category: its head, and the tabs Inspect, History and Versions.

import { categoryStatus, describe } from "../api.js";
import { html, useEffect, useRef } from "../html.js";
import { score, when } from "../format.js";
import { may, useLoaded } from "../hooks.js";
import { categoryAddress, Link, ROOT } from "../router.js";
import { Drift } from "../components/drift.js";
import { Icon } from "../components/icons.js";
import { CandidateMark, StateMark } from "../components/marks.js";
import { Empty, ProblemMessage } from "../components/messages.js";
import { HistoryTab } from "./history.js";
import { InspectTab } from "./inspect.js";
import { VersionsTab } from "./versions.js";

const FOLLOWED_MS = [0, 2000, 5000, 12000];

const TABS = [
  { key: "inspect", label: "Inspect", view: InspectTab },
  { key: "history", label: "History", view: HistoryTab },
  { key: "versions", label: "Versions", view: VersionsTab },
];

export function CategoryPage({ session, category, tab }) {
  const sees = may(session, "operate");
  const about = useLoaded((signal) => describe(category, signal), [category]);
  const status = useLoaded(async (signal) => (sees ? categoryStatus(category, signal) : null), [category, sees]);
  const current = TABS.find(({ key }) => key === tab);
  useEffect(() => {
    document.title = `${category} · ${current?.label ?? "Not found"} · apt-ray`;
  }, [category, current]);
  const timers = useRef([]);
  // Replicas follow within seconds of a change, each at its own time.
  const reload = () => {
    timers.current.forEach(clearTimeout);
    timers.current = FOLLOWED_MS.map((after) => setTimeout(() => {
      about.reload();
      status.reload();
    }, after));
  };
  useEffect(() => () => timers.current.forEach(clearTimeout), []);
  const isUnknown = about.problem?.status === 404;
  return html`<div class="page category">
    <div class="page-head">
      <div class="titles">
        <${Link} to=${ROOT} class="crumb"><${Icon} name="back" size=${12} />Fleet<//>
        <h1 tabindex="-1">${category}</h1>
      </div>
      ${!isUnknown && html`<${Head} about=${about.data} status=${status.data} sees=${sees} />`}
    </div>
    ${isUnknown
      ? html`<${ProblemMessage} problem=${about.problem} />`
      : html`
        <nav class="tabs" aria-label="Of ${category}">
          ${TABS.map(({ key, label }) => html`<${Link} key=${key} to=${categoryAddress(category, key)}
            aria-current=${key === tab ? "page" : undefined}>${label}<//>`)}
        </nav>
        ${status.data?.problem && html`<${ProblemMessage} quiet problem=${{ title: "It does not do as ordered", detail: status.data.problem }} />`}
        <${Drift} category=${category} drift=${status.data?.drift} reload=${reload} />
        ${current
          ? html`<${current.view} key=${`${category} ${tab}`} session=${session} category=${category} about=${about} status=${status.data} reload=${reload} />`
          : html`<div class="panel"><${Empty} title="There is no such page"><${Link} to=${categoryAddress(category)}>Inspect ${category}<//><//></div>`}`}
  </div>`;
}

const RULES = { "prompt set": "from the prompt set", "fleet file": "from the fleet file", operator: "set by an operator" };

/** Ghosts keep the room of what is not known yet; what may be absent comes first, and moves nothing. */
function Head({ about, status, sees }) {
  return html`<dl class="facts">
    ${status?.candidate != null && html`<div class="facts-candidate"><dt>Candidate</dt><dd><${CandidateMark} version=${status.candidate} /></dd></div>`}
    ${sees && html`<div class="facts-state"><dt>State</dt><dd>${status ? html`<${StateMark} state=${status.state} />` : html`<span class="ghost">Loading</span>`}</dd></div>`}
    <div><dt>Champion</dt><dd>${about ? html`v${about.version}` : html`<span class="ghost">v00</span>`}</dd></div>
    <div><dt>Threshold</dt><dd>${about ? score(about.threshold) : html`<span class="ghost">0.000</span>`}
      ${about?.threshold_source && about.threshold_source !== "prompt set" && html`<span class="hint">${RULES[about.threshold_source]}</span>`}</dd></div>
    <div class="wide-only"><dt>Tuned</dt><dd>${about ? html`${when(about.trained_at)} <span class="hint">on ${about.shots} images</span>` : html`<span class="ghost">00 Month 0000</span>`}</dd></div>
  </dl>`;
}

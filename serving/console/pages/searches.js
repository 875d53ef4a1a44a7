// All searches of the fleet: who started which, how far it is, and why one failed.

import { searches } from "../api.js";
import { html, useEffect } from "../html.js";
import { duration, when } from "../format.js";
import { may, usePolled } from "../hooks.js";
import { categoryAddress, Link } from "../router.js";
import { SearchMark } from "../components/marks.js";
import { Empty, OperatorsOnly, ProblemMessage, Skeleton } from "../components/messages.js";
import { inShort, isLive, JobLink, NoSearches } from "../components/search-view.js";

export function SearchesPage({ session }) {
  useEffect(() => {
    document.title = "Searches · apt-ray";
  }, []);
  return html`<div class="page">
    <div class="page-head"><h1 tabindex="-1">Searches</h1></div>
    ${may(session, "operate") ? html`<${List} />` : html`<${OperatorsOnly} session=${session} what="see searches" />`}
  </div>`;
}

function List() {
  const { data: list, problem, ask } = usePolled(() => (signal) => searches(null, signal), []);
  if (problem?.type?.endsWith(":not-found")) {
    return html`<${NoSearches} />`;
  }
  return html`
    ${problem && html`<${ProblemMessage} problem=${problem} onRetry=${ask} quiet=${Boolean(list)} />`}
    <section class="panel searches" aria-label="Searches">
      ${!list && !problem && html`<${Skeleton} rows=${5} height=${48} />`}
      ${list?.length === 0 && html`<${Empty} title="No search yet" icon="search"><p>Start one on the tab Tune of a category, or with New product on the page of the fleet. Ray forgets the list when its head is started anew.</p><//>`}
      ${list?.length > 0 && html`<div class="scroller" tabindex="0" role="region" aria-label="List of searches"><table class="list">
        <thead><tr><th scope="col">Category</th><th scope="col">State</th><th scope="col">How far</th><th scope="col">Started</th><th scope="col" class="num">Took</th><th scope="col">By</th><th scope="col">More</th></tr></thead>
        <tbody>${list.map((search) => html`<${Row} key=${search.id} search=${search} />`)}</tbody>
      </table></div>`}
    </section>`;
}

function Row({ search }) {
  const { category, state, by, started_at: from, ended_at: to } = search;
  return html`<tr>
    <th scope="row"><${Link} to=${categoryAddress(category, "tune")}>${category}<//>${search.dry_run && html` <span class="tag">estimate</span>`}</th>
    <td><${SearchMark} state=${state} /></td>
    <td class="reason ${state === "failed" ? "why" : ""}">${inShort(search)}</td>
    <td class="nowrap">${when(from)}</td>
    <td class="num nowrap">${isLive(search) ? "" : duration(from && to ? to - from : null)}</td>
    <td>${by}</td>
    <td><${JobLink} search=${search} /></td>
  </tr>`;
}

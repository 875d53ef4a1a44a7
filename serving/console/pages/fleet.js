// The fleet: every category at a glance, live.

import { pollList, pollStatus } from "../api.js";
import { html, useEffect, useMemo, useRef, useState } from "../html.js";
import { clock, count, milliseconds, NONE, percent, plural } from "../format.js";
import { may, usePolled } from "../hooks.js";
import { categoryAddress, Link, navigate } from "../router.js";
import { drifted } from "../components/drift.js";
import { CandidateMark, StateMark } from "../components/marks.js";
import { Empty, ProblemMessage, Skeleton } from "../components/messages.js";
import { Icon } from "../components/icons.js";
import { NewProduct } from "../components/new-product.js";
import { Spark } from "../components/spark.js";
import { WindowedTable } from "../components/window.js";

const COLLATOR = new Intl.Collator("en", { numeric: true });
const STATE_ORDER = { FAILED: 0, LOADING: 1, READY: 2, IDLE: 3 };

const FILTERS = [
  { key: "all", label: "All", keep: () => true },
  { key: "attention", label: "Attention", keep: (row) => row.state === "FAILED" || row.state === "LOADING" || Boolean(row.problem) },
  { key: "rejecting", label: "Rejecting", keep: (row) => row.rejected > 0 },
  { key: "drift", label: "Drift", keep: (row) => row.drift?.length > 0 },
  { key: "candidate", label: "Candidate", keep: (row) => row.candidate != null },
];

const COLUMNS = [
  { key: "name", label: "Category", class: "c-name" },
  { key: "state", label: "State", class: "c-state" },
  { key: "verdicts", label: "Verdicts / h", class: "c-verdicts num", first: true },
  { key: "rejected", label: "Rejected", class: "c-rejected num", first: true },
  { key: "scores", label: "Scores, last hour", class: "c-scores", first: true },
  { key: "p50", label: "Median", class: "c-p50 num", first: true },
  { key: "version", label: "Champion", class: "c-version", first: true },
  { key: "replicas", label: "Replicas", class: "c-replicas num", first: true },
];
const SIMPLE = ["name", "state"];

const VALUES = {
  name: (row) => row.name,
  state: (row) => STATE_ORDER[row.state] ?? 9,
  verdicts: (row) => row.hour?.inspected ?? -1,
  rejected: (row) => row.rejected ?? -1,
  scores: (row) => meanOf(row.hour?.scores),
  p50: (row) => row.hour?.latency_ms_p50 ?? -1,
  version: (row) => (row.candidate == null ? 0 : 1e6) + (row.version ?? 0),
  replicas: (row) => row.replicas ?? -1,
};

export function FleetPage({ session, url }) {
  const sees = may(session, "operate");
  const { data, problem, since, ask } = usePolled(sees ? pollStatus : pollList, [sees]);
  const rows = useMemo(() => (data ? (sees ? rowsOfStatus(data) : rowsOfList(data)) : null), [data, sees]);

  const query = url.searchParams.get("q") ?? "";
  const show = url.searchParams.get("show") ?? "all";
  const sort = url.searchParams.get("sort") ?? "name";
  const set = (name, value, standard) => {
    const next = new URL(location.href);
    if (value === standard) next.searchParams.delete(name);
    else next.searchParams.set(name, value);
    navigate(next.pathname + next.search, { replace: true });
  };

  const [isNaming, setNaming] = useState(false);
  const search = useRef(null);
  useEffect(() => {
    document.title = "Fleet · apt-ray";
    const focus = (event) => {
      if (event.key !== "/" || /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName)) return;
      event.preventDefault();
      search.current?.focus();
    };
    addEventListener("keydown", focus);
    return () => removeEventListener("keydown", focus);
  }, []);

  const counts = useMemo(() => Object.fromEntries(FILTERS.map(({ key, keep }) => [key, rows?.filter(keep).length ?? 0])), [rows]);
  const shown = useMemo(() => (rows ? sorted(filtered(rows, query, show), sort) : []), [rows, query, show, sort]);
  const columns = sees ? COLUMNS : COLUMNS.filter(({ key }) => SIMPLE.includes(key));

  return html`<div class="page fleet">
    <div class="page-head">
      <h1 tabindex="-1">Fleet</h1>
      <div class="page-actions"><${Live} problem=${problem} since=${since} data=${data} />
        ${sees && html`<button type="button" disabled=${!rows} onClick=${() => setNaming(true)}>New product …</button>`}</div>
    </div>
    ${problem && html`<${ProblemMessage} problem=${problem} onRetry=${ask} quiet=${Boolean(data)} />`}
    ${sees && !(problem && !data) && html`<${Summary} rows=${rows} />`}
    ${rows && rows.length === 0 && html`<div class="panel"><${Empty} title="No category yet">
      <p>Tune one, here or with <code>python tuning/search.py</code>, or name one in the fleet file and deploy it.</p>
      <p><code>python -m serving.fleet deploy fleet.yaml</code></p><//></div>`}
    ${!(rows && rows.length === 0) && html`<section class="panel table-panel">
      <div class="toolbar">
        <div class="search">
          <${Icon} name="search" />
          <input ref=${search} type="search" placeholder="Search categories" aria-label="Search categories" aria-keyshortcuts="/"
            value=${query} onInput=${(event) => set("q", event.target.value, "")} />
        </div>
        ${sees && html`<div class="segments" role="group" aria-label="Which categories">
          ${FILTERS.map(({ key, label }) => html`<button key=${key} type="button" aria-pressed=${show === key}
            onClick=${() => set("show", key, "all")}>${label}<span class="badge">${rows ? count(counts[key]) : ""}</span></button>`)}
        </div>`}
        <p class="found" role="status">${rows ? plural(shown.length, "category", "categories") : ""}</p>
      </div>
      ${rows
        ? html`<div class=${sees ? "" : "simple"}><${WindowedTable} label="Categories" columns=${columns} items=${shown} keyOf=${(row) => row.name}
            sort=${sort} onSort=${(key) => set("sort", key, "name")} row=${(row) => html`<${Row} key=${row.name} row=${row} sees=${sees} />`} /></div>
          ${shown.length === 0 && html`<${Empty} title="Nothing matches" icon="search">
            <button type="button" onClick=${() => navigate(location.pathname, { replace: true })}>Show all categories</button><//>`}`
        : !problem && html`<${Skeleton} rows=${8} height=${40} />`}
    </section>`}
    ${isNaming && html`<${NewProduct} names=${rows.map(({ name }) => name)} onClose=${() => setNaming(false)} />`}
  </div>`;
}

function Live({ problem, since, data }) {
  if (!since) return html`<p class="live" aria-hidden="true"> </p>`;
  const registry = data?.registry;
  return html`<p class="live ${problem ? "stale" : ""}">
    <span class="pulse" aria-hidden="true"></span>
    ${problem ? `As of ${clock(since)}` : "Live"}
    ${registry && registry !== "ok" && html`<span class="tag warn" title=${registry}><${Icon} name="warn" size=${12} />Registry away</span>`}
  </p>`;
}

/** The figures of all; without rows, their room. */
function Summary({ rows }) {
  if (!rows) {
    return html`<dl class="tiles" aria-hidden="true">${["Answering", "Verdicts, last hour", "Rejected", "Attention", "Candidates"].map((label) => html`
      <${Tile} key=${label} label=${label} value=${html`<span class="ghost">000</span>`} note=${"\u00a0"} />`)}</dl>`;
  }
  const answering = rows.filter(({ state }) => state === "READY" || state === "IDLE").length;
  const verdicts = rows.reduce((sum, { hour }) => sum + (hour?.inspected ?? 0), 0);
  const rejected = rows.reduce((sum, { hour }) => sum + (hour?.rejected ?? 0), 0);
  const failing = rows.filter(({ state, problem }) => state === "FAILED" || problem).length;
  const waiting = rows.filter(({ candidate }) => candidate != null).length;
  return html`<dl class="tiles">
    <${Tile} label="Answering" value=${count(answering)} note=${`of ${plural(rows.length, "category", "categories")}`} />
    <${Tile} label="Verdicts, last hour" value=${count(verdicts)} note=${verdicts ? `${count(rejected)} rejected` : "none yet"} />
    <${Tile} label="Rejected" value=${verdicts ? percent(rejected / verdicts) : NONE} note="of the last hour's parts" />
    <${Tile} label="Attention" value=${count(failing)} note=${failing ? "cannot do as ordered" : "all as ordered"} tone=${failing ? "bad" : ""} />
    <${Tile} label="Candidates" value=${count(waiting)} note=${waiting ? "wait to be promoted" : "none waits"} tone=${waiting ? "accent" : ""} />
  </dl>`;
}

function Tile({ label, value, note, tone = "" }) {
  return html`<div class="tile ${tone}"><dt>${label}</dt><dd><b>${value}</b><span>${note}</span></dd></div>`;
}

function Row({ row, sees }) {
  const { hour } = row;
  return html`
    <div role="cell" class="td c-name"><${Link} to=${categoryAddress(row.name)} class="row-link">${row.name}<//>
      ${row.problem && html`<span class="row-problem" title=${row.problem}>${row.problem}</span>`}
      ${!row.problem && row.drift?.length > 0 && html`<span class="row-problem drift">${drifted(row.drift[0])}</span>`}</div>
    <div role="cell" class="td c-state"><${StateMark} state=${row.state} /></div>
    ${sees && html`
      <div role="cell" class="td c-verdicts num">${hour ? count(hour.inspected) : html`<span class="none">${NONE}</span>`}</div>
      <div role="cell" class="td c-rejected num">${row.rejected == null ? html`<span class="none">${NONE}</span>`
        : html`<span class=${row.rejected > 0 ? "some" : ""}>${percent(row.rejected)}</span>`}</div>
      <div role="cell" class="td c-scores"><${Spark} bins=${hour?.scores} threshold=${row.threshold} /></div>
      <div role="cell" class="td c-p50 num">${hour?.latency_ms_p50 == null ? html`<span class="none">${NONE}</span>` : milliseconds(hour.latency_ms_p50)}</div>
      <div role="cell" class="td c-version">${row.version == null ? html`<span class="none">${NONE}</span>` : html`<span class="version">v${row.version}</span>`}
        ${row.candidate != null && html`<${CandidateMark} version=${row.candidate} />`}</div>
      <div role="cell" class="td c-replicas num">${count(row.replicas)}</div>`}`;
}

const rowsOfList = ({ categories }) =>
  categories.map(({ category, status }) => ({ name: category, state: status, lower: category.toLowerCase() }));

const rowsOfStatus = ({ categories }) =>
  Object.entries(categories).map(([name, said]) => {
    const hour = said.last_hour ?? null;
    return {
      name,
      lower: name.toLowerCase(),
      state: said.state,
      problem: said.problem,
      drift: said.drift?.alarms ?? [],
      version: said.serving.length ? said.serving[said.serving.length - 1] : said.wanted,
      candidate: said.candidate ?? null,
      threshold: said.threshold ?? null,
      replicas: said.replicas,
      hour,
      rejected: hour?.inspected ? hour.rejected / hour.inspected : null,
    };
  });

function filtered(rows, query, show) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const keep = FILTERS.find(({ key }) => key === show)?.keep ?? (() => true);
  return rows.filter((row) => keep(row) && words.every((word) => row.lower.includes(word)));
}

function sorted(rows, sort) {
  const [key, sign] = sort.startsWith("-") ? [sort.slice(1), -1] : [sort, 1];
  const value = VALUES[key] ?? VALUES.name;
  const keyed = rows.map((row) => [value(row), row]);
  keyed.sort(([a, one], [b, other]) =>
    sign * (typeof a === "string" ? COLLATOR.compare(a, b) : a - b) || COLLATOR.compare(one.name, other.name));
  return keyed.map(([, row]) => row);
}

function meanOf(bins) {
  let [sum, total] = [0, 0];
  bins?.forEach((each, index) => { sum += each * index; total += each; });
  return total ? sum / total : -1;
}

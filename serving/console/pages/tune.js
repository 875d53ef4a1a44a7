// Tune: good images, a search of the best settings, and whether its winner shall serve.

import { searches, startSearch, trainingImages, versions } from "../api.js";
import { html, useEffect, useId, useRef, useState } from "../html.js";
import { plural, score, when } from "../format.js";
import { may, useLoaded, usePolled } from "../hooks.js";
import { categoryAddress, Link } from "../router.js";
import { Icon, LinkOut } from "../components/icons.js";
import { Empty, OperatorsOnly, ProblemMessage, prose, Skeleton } from "../components/messages.js";
import { aliased, Moves } from "../components/moves.js";
import { VersionPictures } from "../components/pictures.js";
import { Estimate, isLive, NoSearches, SearchView } from "../components/search-view.js";
import { TrainingImages } from "../components/training-images.js";

const LOOK_MS = 15_000;
const STANDARD = { shots: "4", trials: "8" };

/** `about`: what serves; `newcomers`: what the fleet does of a category that it does not serve. */
export function TuneTab({ session, category, about, newcomers, reload }) {
  if (!may(session, "operate")) return html`<${OperatorsOnly} session=${session} what="tune" />`;
  if (!about.data && !about.problem) return html`<${Loading} />`;
  return html`<${Tune} category=${category} isServed=${about.problem?.status !== 404} newcomers=${newcomers} reload=${reload} />`;
}

const Loading = () => html`<section class="panel"><${Skeleton} rows=${4} height=${72} /></section>`;

function Tune({ category, isServed, newcomers, reload }) {
  const jobs = usePolled(() => (signal) => searches(category, signal), [category]);
  const found = useLoaded((signal) => versions(category, signal), [category]);
  const images = useImages(category);
  const list = jobs.data ?? [];
  const last = list.find(({ dry_run: isEstimate }) => !isEstimate);
  const estimate = list.find(({ dry_run: isEstimate }) => isEstimate);

  const moved = () => {
    found.reload();
    reload();
  };
  // What a search has registered is there once it has ended.
  const live = useRef("");
  useEffect(() => {
    if (last && isLive(last)) live.current = last.id;
    else if (last && live.current === last.id) moved();
  }, [last?.id, last?.state]);

  if (jobs.problem?.type?.endsWith(":not-found")) {
    return html`<${NoSearches} />`;
  }
  // The form begins with what was asked for last, wherever the page was loaded.
  if (!jobs.since && !jobs.problem) return html`<${Loading} />`;
  const known = found.data?.versions ?? [];
  return html`<div class="tune">
    ${!isServed && html`<${NotServed} category=${category} newcomers=${newcomers} champion=${aliased(known).champion} reload=${reload} />`}
    ${jobs.problem && html`<${ProblemMessage} quiet problem=${jobs.problem} onRetry=${jobs.ask} />`}
    <${Wanted} category=${category} images=${images} last=${last} estimate=${estimate} onStarted=${jobs.ask} />
    <${Outcome} category=${category} found=${found} last=${last} isServed=${isServed} onMoved=${moved} />
  </div>`;
}

/** The images as the fleet has them; `set` takes a newer answer than the one that was loaded. */
function useImages(category) {
  const loaded = useLoaded((signal) => trainingImages(category, signal), [category]);
  const [newer, setNewer] = useState(null);
  return { data: newer ?? loaded.data, problem: loaded.problem, reload: loaded.reload, set: setNewer };
}

/** What becomes of a category that the fleet does not serve. */
function NotServed({ category, newcomers, champion, reload }) {
  const comes = champion && newcomers === "served";
  useEffect(() => {
    if (!comes) return undefined;
    const timer = setInterval(reload, LOOK_MS);
    return () => clearInterval(timer);
  }, [comes]);
  const version = champion ? `Version ${champion.version} is the champion. ` : "";
  const text = {
    served: champion ? "The fleet is taking it in." : "The fleet serves it as soon as a version is promoted.",
    deploy: `${champion ? "" : "Once a version is promoted, "}deploy the fleet file again, which names all categories: \`python -m serving.fleet deploy FILE\``,
    name: `${champion ? "" : "Once a version is promoted, "}add \`${category}: {}\` to \`categories\` in the fleet file, and deploy it: \`python -m serving.fleet deploy FILE\``,
  }[newcomers];
  return html`<div class="notice" role="status"><${Icon} name=${comes ? "loading" : "idle"} size=${20} class=${comes ? "turning" : ""} />
    <p><strong>Not served yet</strong><span>${version}${text ? prose(text) : ""}</span></p></div>`;
}

const SOURCES = [
  { key: "sent", label: "Sent here" },
  { key: "named", label: "In a folder" },
];

/** The images, and the form that starts a search of them. */
function Wanted({ category, images, last, estimate, onStarted }) {
  const before = last ?? estimate;
  const [source, setSource] = useState(before?.data ? "named" : "sent");
  const [folder, setFolder] = useState(before?.data ?? "");
  const [shots, setShots] = useState(String(before?.shots ?? STANDARD.shots));
  const [trials, setTrials] = useState(String(before?.trials ?? STANDARD.trials));
  const [state, setState] = useState({ busy: "", problem: null });
  const id = useId();

  const sent = images.data?.images.length ?? 0;
  const [k, n] = [Number(shots), Number(trials)];
  const busy = [last, estimate].find((each) => each && isLive(each));
  const why = busy ? (busy.dry_run ? "One moment: the estimate is being made." : "One search of a category at a time.")
    : !(Number.isInteger(k) && k >= 1 && k <= 1024) ? "Shots are a whole number from 1."
    : !(Number.isInteger(n) && n >= 1 && n <= 100_000) ? "Trials are a whole number from 1."
    : source === "named" ? (folder.trim() ? "" : "Name a folder.")
    : sent === 0 ? "Send good images first." : sent < k ? `${plural(sent, "image")} for ${plural(k, "shot")}: send more, or lower the shots.` : "";
  const start = async (isEstimate) => {
    setState({ busy: isEstimate ? "estimate" : "search", problem: null });
    try {
      await startSearch({ category, data: source === "named" ? folder.trim() : null, shots: k, trials: n, dry_run: isEstimate });
      await onStarted();
      setState({ busy: "", problem: null });
    } catch (problem) {
      setState({ busy: "", problem });
    }
  };
  const submit = (event) => {
    event.preventDefault();
    if (!why && !state.busy) start(false);
  };
  const number = (name, value, set, most, hint) => html`<div class="field">
    <label for="${id}-${name}">${name}</label>
    <input id="${id}-${name}" type="number" min="1" max=${most} step="1" inputmode="numeric" value=${value} aria-describedby="${id}-${name}-hint" onInput=${(event) => set(event.target.value)} />
    <p class="hint" id="${id}-${name}-hint">${hint}</p></div>`;
  const rest = source === "sent" && k >= 1 && sent > k ? ` The other ${sent - k} set the threshold.` : "";

  return html`<div class="inspect">
    <section class="panel good-images" aria-label="Good images">
      <div class="toolbar">
        <h2 class="grow">Good images</h2>
        <div class="segments" role="group" aria-label="Where the images are">
          ${SOURCES.map(({ key, label }) => html`<button key=${key} type="button" aria-pressed=${source === key} onClick=${() => setSource(key)}>${label}</button>`)}
        </div>
      </div>
      ${source === "sent" ? html`<${TrainingImages} category=${category} loaded=${images} onChanged=${images.set} />`
        : html`<div class="dialog-body"><div class="field">
          <label for="${id}-folder">Folder on the cluster, or in S3</label>
          <input id="${id}-folder" value=${folder} maxlength="1024" placeholder="/data/products or s3://bucket/products" spellcheck="false" autocomplete="off" aria-describedby="${id}-folder-hint" onInput=${(event) => setFolder(event.target.value)} />
          <p class="hint" id="${id}-folder-hint">The folder <code>${category}</code> itself, with good images in <code>good/</code> or <code>train/good/</code>, or the one above it; every node must reach it. The search reads what lies there: nothing of it is shown or struck out here.</p>
        </div></div>`}
    </section>
    <aside class="panel side">
      <section><form class="search-form" onSubmit=${submit}>
        <h2>Search</h2>
        <div class="pair">
          ${number("Shots", shots, setShots, 1024, "Images to learn from.")}
          ${number("Trials", trials, setTrials, 100_000, "Settings to try.")}
        </div>
        <p class="hint" role="status">${why || `Learns from ${plural(k, "image")}.${rest}`}</p>
        <div class="row">
          <button type="button" disabled=${Boolean(why || state.busy)} onClick=${() => start(true)}>${state.busy === "estimate" ? "One moment …" : "Estimate"}</button>
          <button type="submit" class="primary" disabled=${Boolean(why || state.busy)}>${state.busy === "search" ? "One moment …" : "Search"}</button>
        </div>
        <${ProblemMessage} problem=${state.problem} />
        ${estimate ? html`<${Estimate} search=${estimate} onChanged=${onStarted} />` : html`<p class="estimate hint">An estimate times the parts of a search on the cluster, which takes a minute or more.</p>`}
      </form></section>
      ${last && html`<${SearchView} search=${last} onChanged=${onStarted} />`}
    </aside>
  </div>`;
}

/** The candidate that waits, or what serves: its pictures, and the moves. */
function Outcome({ category, found, last, isServed, onMoved }) {
  const known = found.data?.versions ?? [];
  const { candidate, champion } = aliased(known);
  const shown = candidate ?? champion;
  const isUnknown = found.problem?.status === 404;
  if (found.problem && !isUnknown) return html`<section class="panel"><${ProblemMessage} problem=${found.problem} onRetry=${found.reload} /></section>`;
  if (!found.data && !isUnknown) return html`<section class="panel outcome"><${Skeleton} rows=${2} height=${120} /></section>`;
  if (known.length === 0) return html`<section class="panel outcome"><${Empty} title="No version yet"><p>The winner of a search stands here, with what it finds in made-up defects. You decide whether it serves.</p><//></section>`;
  const isNew = last && shown?.search === last.id;
  return html`<section class="panel outcome versions" aria-label="What came of it">
    <${Moves} category=${category} versions=${known} onMoved=${onMoved}>
      <p class="hint grow">${candidate ? "Look at it, then let it serve or not." : "No candidate waits."}</p>
      ${champion && isServed && html`<${Link} to=${categoryAddress(category)} class="button">Inspect images<//>`}<//>
    ${!shown && html`<${Empty} title="No version waits, and none serves"><p>Search again; <code>apt-ray registry promote</code> lets an older one serve.</p><//>`}
    ${shown && html`<div class="outcome-head">
      <h2>${candidate ? "Candidate" : "Champion"} <span class="version">v${shown.version}</span></h2>
      ${isNew && html`<span class="tag accent">of the last search</span>`}
      <dl class="facts">
        <div><dt>Validation</dt><dd>${score(shown.validation)}</dd></div>
        ${candidate && champion && html`<div><dt>Champion's <span class="version">v${champion.version}</span></dt><dd>${score(champion.validation)}</dd></div>`}
        <div><dt>Registered</dt><dd>${when(shown.created)}</dd></div>
        <div><dt>Shots</dt><dd>${shown.shots ?? "–"}</dd></div>
      </dl>
      ${shown.link && html`<${LinkOut} to=${shown.link}>MLflow<//>`}
    </div>
    <${VersionPictures} key=${shown.version} category=${category} version=${shown.version} />`}
  </section>`;
}

// History: the last inspections that the fleet kept, and what people say of them.

import { giveFeedback, history, historyImage, historyMap, mark, withdraw } from "../api.js";
import { html, useCallback, useEffect, useState } from "../html.js";
import { score, when } from "../format.js";
import { overlaid, readMap } from "../heat.js";
import { may, useObjectUrl, useWhenSeen } from "../hooks.js";
import { Explanation } from "../components/explanation.js";
import { labelOf } from "../components/feedback.js";
import { Icon } from "../components/icons.js";
import { Dialog } from "../components/dialog.js";
import { Verdict } from "../components/marks.js";
import { Empty, ProblemMessage, prose, Skeleton } from "../components/messages.js";
import { Regions } from "../components/regions.js";
import { Viewer } from "../components/viewer.js";

const PAGE = 48;
const CARD_SIDE = 360;
const FILTERS = [
  { key: "all", label: "All", none: "Nothing inspected yet" },
  { key: "rejected", label: "Rejected", none: "Nothing rejected" },
  { key: "marked", label: "Marked", none: "Nothing marked" },
  { key: "disagreeing", label: "Disagreeing", none: "No candidate disagreed" },
];

export function HistoryTab({ session, category }) {
  const [only, setOnly] = useState(() => {
    const asked = new URLSearchParams(location.search).get("only");
    return FILTERS.some(({ key }) => key === asked) ? asked : "all";
  });
  const [state, setState] = useState({ entries: null, node: "", problem: null, isLoading: false, isAll: false });
  const [openId, setOpenId] = useState(null);

  const load = useCallback(async (before, signal) => {
    setState((now) => ({ ...now, isLoading: true, problem: null, entries: before == null ? null : now.entries }));
    try {
      const { node, inspections: found } = await history(category, { before, only, limit: PAGE, signal });
      if (signal?.aborted) return; // another filter was chosen while the answer was read
      setState((now) => ({ entries: [...(now.entries ?? []), ...found], node, problem: null, isLoading: false, isAll: found.length < PAGE }));
    } catch (problem) {
      if (!signal?.aborted) setState((now) => ({ ...now, problem, isLoading: false }));
    }
  }, [category, only]);
  useEffect(() => {
    const controller = new AbortController();
    load(null, controller.signal);
    return () => controller.abort();
  }, [load]);

  const { entries, problem, isLoading, isAll } = state;
  const at = entries?.findIndex(({ id }) => id === openId) ?? -1;
  const renew = (changed) => setState((now) => ({ ...now, entries: now.entries.map((each) => (each.id === changed.id ? changed : each)) }));
  return html`<section class="panel history" aria-label="History">
    <div class="toolbar">
      <div class="segments" role="group" aria-label="Which inspections">
        ${FILTERS.map(({ key, label }) => html`<button key=${key} type="button" aria-pressed=${only === key} onClick=${() => setOnly(key)}>${label}</button>`)}
      </div>
      <p class="hint">${state.node ? `Newest first, as kept on ${state.node}.` : ""}</p>
      <button type="button" disabled=${isLoading} onClick=${() => load(null)}>Refresh</button>
    </div>
    ${problem && (problem.type.endsWith(":no-history")
      ? html`<${Empty} title="This fleet keeps no history"><p>${prose(problem.remedy ?? "Set history.images in the fleet file and deploy it")}</p><//>`
      : html`<${ProblemMessage} problem=${problem} onRetry=${() => load(null)} />`)}
    ${!entries && !problem && html`<${Skeleton} rows=${3} height=${180} />`}
    ${entries?.length === 0 && !problem && html`<${Empty} title=${FILTERS.find(({ key }) => key === only).none}>
      <p>${only === "all" ? "Images appear here once they have been inspected." : "Of the inspections that are kept, none is of this kind."}</p><//>`}
    ${entries?.length > 0 && html`<ol class="cards">
      ${entries.map((entry) => html`<li key=${entry.id}><${Card} category=${category} entry=${entry} onOpen=${() => setOpenId(entry.id)} /></li>`)}
    </ol>`}
    ${entries?.length > 0 && !isAll && html`<p class="more"><button type="button" disabled=${isLoading} onClick=${() => load(entries.at(-1).id)}>
      ${isLoading ? "Loading …" : "Show older"}</button></p>`}
    ${at >= 0 && html`<${Entry} key=${openId} category=${category} entry=${entries[at]} mayMark=${may(session, "inspect", category)}
      mayTell=${may(session, "feedback", category)}
      previous=${entries[at - 1]} next=${entries[at + 1]} onOpen=${setOpenId} onMarked=${renew} />`}
  </section>`;
}

const MARKS = { good: "Marked good", defective: "Marked defective" };

/** The image of an inspection, loaded once it is seen; with its map while looked at. */
function Card({ category, entry, onOpen }) {
  const [element, image] = useWhenSeen((signal) => historyImage(category, entry.id, signal), [category, entry.id]);
  const [overlay, setOverlay] = useState(null);
  const [isOn, setOn] = useState(false);
  const url = useObjectUrl(isOn && overlay ? overlay : image);

  const look = async () => {
    setOn(true);
    if (overlay || !image) return;
    try {
      const [map, bitmap] = await Promise.all([historyMap(category, entry.id).then(readMap), createImageBitmap(image)]);
      setOverlay(await overlaid(bitmap, map, entry.threshold, CARD_SIDE));
      bitmap.close();
    } catch {
      // It was pruned meanwhile: the image alone stays.
    }
  };
  return html`<button ref=${element} type="button" class="card ${entry.is_anomalous ? "bad" : ""}" onClick=${onOpen}
      onMouseEnter=${look} onMouseLeave=${() => setOn(false)} onFocus=${look} onBlur=${() => setOn(false)}>
    <span class="card-image">${url && html`<img src=${url} alt="" />`}</span>
    <span class="card-line"><${Verdict} bad=${entry.is_anomalous} /><span class="num">${score(entry.score)}</span></span>
    <span class="card-name">${when(entry.at)}</span>
    ${entry.mark && html`<span class="tag warn">${MARKS[entry.mark] ?? entry.mark}</span>`}
  </button>`;
}

/** What a mark says, as feedback; taken away, it is withdrawn. A fleet that takes none has the mark alone. */
async function tell(category, entry, verdict, note) {
  try {
    const given = await giveFeedback(category, {
      request_id: entry.request_id, inspection: entry.id, note, label: labelOf((verdict ?? entry.mark) === "good", entry.is_anomalous),
    });
    if (!verdict) await withdraw(category, given.id);
  } catch (problem) {
    if (!problem.type?.endsWith(":no-feedback")) throw problem;
  }
}

function Entry({ category, entry, mayMark, mayTell, previous, next, onOpen, onMarked }) {
  const [image, setImage] = useState(null);
  const [map, setMap] = useState(null);
  const [evidence, setEvidence] = useState(null);
  const [problem, setProblem] = useState(null);
  const [mode, setMode] = useState("overlay");
  const [selected, setSelected] = useState(null);
  const [note, setNote] = useState(entry.note ?? "");
  const [isBusy, setBusy] = useState(false);
  const url = useObjectUrl(image);
  useEffect(() => {
    const controller = new AbortController();
    historyImage(category, entry.id, controller.signal).then(setImage, setProblem);
    historyMap(category, entry.id, controller.signal).then(readMap).then(setMap, () => {});
    return () => controller.abort();
  }, []);
  const say = async (verdict) => {
    setBusy(true);
    try {
      onMarked(await mark(category, entry.id, verdict, note.trim()));
      if (mayTell) await tell(category, entry, verdict, note.trim());
      setProblem(null);
    } catch (found) {
      setProblem(found);
    }
    setBusy(false);
  };
  return html`<${Dialog} title=${when(entry.at)} onClose=${() => onOpen(null)} wide>
    <div class="dialog-body entry">
      <${Viewer} name="Inspected ${when(entry.at)}" src=${url} width=${entry.width} height=${entry.height} map=${evidence ?? map} threshold=${entry.threshold}
        regions=${entry.regions} selected=${selected} onSelect=${setSelected} mode=${mode} onMode=${setMode} busy=${!url} />
      <div class="side">
        <section class="finding ${entry.is_anomalous ? "bad" : "good"}">
          <${Verdict} bad=${entry.is_anomalous} large />
          <div class="figures">
            <div><span class="figure-label">Score</span><span class="figure">${score(entry.score)}</span></div>
            <div><span class="figure-label">Threshold</span><span class="figure quiet">${score(entry.threshold)}</span></div>
          </div>
          ${entry.candidate && html`<p class="hint">Candidate v${entry.candidate.version}: ${entry.candidate.is_anomalous ? "defective" : "good"}, ${score(entry.candidate.score)} against ${score(entry.candidate.threshold)}</p>`}
        </section>
        ${mayMark && html`<section><h2>Was it right?</h2>
          <div class="field"><label for="note">Note</label>
            <input id="note" value=${note} maxlength="500" placeholder="What was seen at the line" onInput=${(event) => setNote(event.target.value)} /></div>
          <div class="row marks" role="group" aria-label="What it was">
            ${[["good", "Was good"], ["defective", "Was defective"]].map(([verdict, label]) => html`<button key=${verdict} type="button"
              aria-pressed=${entry.mark === verdict} disabled=${isBusy} onClick=${() => say(entry.mark === verdict ? null : verdict)}>
              <${Icon} name=${verdict === "good" ? "good" : "bad"} />${label}</button>`)}
          </div>
          <p class="hint" role="status">${entry.mark ? `${MARKS[entry.mark]}${entry.marked_by ? ` by ${entry.marked_by}` : ""}. Kept for what the fleet learns next.` : "Not marked."}</p>
        </section>`}
        <${ProblemMessage} problem=${problem} />
        <section><h2>Unusual areas</h2>
          <${Regions} regions=${entry.regions ?? []} width=${entry.width} height=${entry.height} selected=${selected} onSelect=${setSelected} /></section>
        ${image && html`<${Explanation} category=${category} file=${() => image} version=${entry.version}
          selected=${selected} onSelect=${setSelected} onMap=${setEvidence} />`}
        <p class="fine">Version ${entry.version} · request ${entry.request_id}</p>
      </div>
    </div>
    <footer>
      <button type="button" disabled=${!previous} onClick=${() => onOpen(previous.id)}><${Icon} name="back" size=${12} />Newer</button>
      <button type="button" disabled=${!next} onClick=${() => onOpen(next.id)}>Older<${Icon} name="next" size=${12} /></button>
    </footer>
  <//>`;
}

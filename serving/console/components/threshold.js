// The threshold: tried on what was inspected, and changed by whoever may.

import { dropThreshold, history, setThreshold, threshold as whoSet } from "../api.js";
import { html, useId, useMemo, useState } from "../html.js";
import { percent, plural, score, when } from "../format.js";
import { useLoaded } from "../hooks.js";
import { ReasonDialog } from "./dialog.js";
import { ScoreChart, topOf } from "./scores.js";

const LAST = 200;

/** `tried` is the threshold that is tried, null for that which serves; `onTry` changes it. */
export function ThresholdPanel({ category, about, threshold, items, tried, onTry, mayChange, onChanged }) {
  const id = useId();
  const [dialog, setDialog] = useState(null);
  const [isOpen, setOpen] = useState(items.length === 0);
  // What was inspected before, where the fleet keeps it.
  const past = useLoaded(async (signal) => (isOpen && about ? (await history(category, { limit: LAST, signal }).catch(() => null))?.inspections ?? [] : []), [category, isOpen, Boolean(about)]);
  const isSet = about?.threshold_source === "operator";
  const why = useLoaded(async (signal) => (isSet && mayChange && isOpen ? whoSet(category, signal) : null), [category, isSet, mayChange, isOpen, threshold]);
  const seen = useMemo(() => {
    const here = items.filter(({ report }) => report).map(({ report }) => ({ score: report.anomaly_score, id: report.request_id }));
    const known = new Set(here.map((each) => each.id));
    const before = (past.data ?? []).filter((entry) => !known.has(entry.request_id)).map((entry) => ({ score: entry.score }));
    return [...here, ...before];
  }, [items, past.data, items.filter(({ report }) => report).length]);
  if (threshold == null) return null;
  const normal = about?.normal_scores ?? [];
  const limit = tried ?? threshold;
  const top = topOf(normal, seen.map((each) => each.score), threshold, limit);
  const above = (scores) => scores.filter((each) => each > limit).length;
  const rejected = above(seen.map((each) => each.score));
  const rejectedBefore = seen.filter((each) => each.score > threshold).length;
  const change = async ({ reason }) => {
    await setThreshold(category, Number(limit.toFixed(4)), reason);
    onTry(null);
    onChanged();
  };
  const drop = async ({ reason }) => {
    await dropThreshold(category, reason);
    onTry(null);
    onChanged();
  };
  return html`<details class="threshold" open=${isOpen} onToggle=${(event) => setOpen(event.target.open)}>
    <summary><h2>Threshold</h2><span class="num">${score(threshold)}</span></summary>
    <${ScoreChart} normal=${normal} others=${seen.map((each) => ({ ...each, bad: each.score > limit }))} threshold=${threshold} tried=${tried} top=${topOf(top)} />
    <div class="field">
      <label for=${id}>Try another: <output class="num">${score(limit)}</output></label>
      <input id=${id} type="range" min="0" max=${top} step="0.001" value=${limit} aria-describedby="${id}-effect"
        onInput=${(event) => onTry(Number(event.target.value))} />
    </div>
    <div id="${id}-effect" class="effect">
      <p>${seen.length ? html`<b>${rejected}</b> of ${plural(seen.length, "inspected image")} rejected${tried != null && rejected !== rejectedBefore ? ` instead of ${rejectedBefore}` : ""}.`
        : "Nothing inspected yet to try it on."}</p>
      ${normal.length > 0 && html`<p class="hint"><b>${above(normal)}</b> of ${normal.length} ${about.normal_scores_of ?? "calibration scores"} above (${percent(above(normal) / normal.length)}).</p>`}
    </div>
    ${why.data && html`<p class="set-by hint">Set by ${why.data.by || "an operator"}, ${when(why.data.at)}: ${why.data.reason}</p>`}
    <div class="row">
      <button type="button" disabled=${tried == null} onClick=${() => onTry(null)}>Back to ${score(threshold)}</button>
      ${mayChange && html`<button type="button" class="primary" disabled=${tried == null || tried === threshold} onClick=${() => setDialog("set")}>Set ${score(limit)} …</button>`}
      ${mayChange && isSet && html`<button type="button" onClick=${() => setDialog("drop")}>Undo the operator's …</button>`}
    </div>
    ${dialog === "set" && html`<${ReasonDialog} title="Set the threshold of ${category}" label="Set ${score(limit)}" act=${change} onClose=${() => setDialog(null)}>
      <p>From ${score(threshold)} to <b>${score(limit)}</b>, for every image from now on, on all nodes, until somebody changes it.</p>
      ${seen.length > 0 && html`<p class="hint">Of ${plural(seen.length, "inspected image")} it rejects ${rejected}, ${rejected === rejectedBefore ? "as many as now" : `instead of ${rejectedBefore}`}.</p>`}
    <//>`}
    ${dialog === "drop" && html`<${ReasonDialog} title="Undo the operator's threshold" label="Undo it" act=${drop} onClose=${() => setDialog(null)}>
      <p>${category} goes back to the threshold of its prompt set or of the fleet file.</p><//>`}
  </details>`;
}

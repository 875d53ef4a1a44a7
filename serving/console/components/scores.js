// Scores on one axis: the normal images of the calibration, the threshold, and what was inspected.

import { html, useMemo } from "../html.js";
import { score as written } from "../format.js";

const BINS = 36;
const HEIGHT = 96;

/**
 * `normal`: calibration scores; `score`: the one that is looked at; `others`: [{score, bad}] of other
 * images; `threshold`: which serves; `tried`: one that is tried, or null.
 */
export function ScoreChart({ normal = [], score = null, others = [], threshold, tried = null, top }) {
  const bars = useMemo(() => {
    const counts = new Array(BINS).fill(0);
    for (const each of normal) counts[Math.min(BINS - 1, Math.floor((each / top) * BINS))] += 1;
    const most = Math.max(...counts, 1);
    return counts.map((each, index) => ({ index, height: each && Math.max(2, (each / most) * (HEIGHT - 26)) }));
  }, [normal, top]);
  const x = (value) => `${(100 * Math.min(1, Math.max(0, value / top))).toFixed(2)}%`;
  const limit = tried ?? threshold;
  const label = [
    score != null && `Score ${written(score)}.`,
    `Threshold ${written(threshold)}${tried == null ? "" : `, tried ${written(tried)}`}.`,
    normal.length > 0 && `${normal.length} normal images of the calibration, from ${written(Math.min(...normal))} to ${written(Math.max(...normal))}.`,
  ].filter(Boolean).join(" ");
  return html`<figure class="scores">
    <svg class="scores-chart" height=${HEIGHT} role="img" aria-label=${label}>
      <rect class="scores-beyond" x=${x(limit)} y="0" width="${Math.max(0, 100 - 100 * limit / top)}%" height=${HEIGHT - 14} />
      ${bars.map(({ index, height }) => height > 0 && html`<rect key=${index} class="scores-bar"
        x="${(100 * (index + 0.08)) / BINS}%" width="${84 / BINS}%" y=${HEIGHT - 14 - height} height=${height} rx="1" />`)}
      <line class="scores-floor" x1="0" x2="100%" y1=${HEIGHT - 14} y2=${HEIGHT - 14} />
      ${others.map(({ score: each, bad }, index) => html`<circle key=${index} class="scores-dot ${bad ? "bad" : "good"}"
        cx=${x(each)} cy=${HEIGHT - 7} r="3.5" />`)}
      <line class="scores-limit ${tried == null ? "" : "before"}" x1=${x(threshold)} x2=${x(threshold)} y1="0" y2=${HEIGHT - 14} />
      ${tried != null && html`<line class="scores-limit" x1=${x(tried)} x2=${x(tried)} y1="0" y2=${HEIGHT - 14} />`}
      ${score != null && html`
        <line class="scores-here ${score > limit ? "bad" : "good"}" x1=${x(score)} x2=${x(score)} y1="14" y2=${HEIGHT - 14} />
        <circle class="scores-here ${score > limit ? "bad" : "good"}" cx=${x(score)} cy="14" r="5" />`}
    </svg>
    <div class="scores-axis" aria-hidden="true"><span>0</span><span>${written(top)}</span></div>
  </figure>`;
}

/** The end of the axis: room for all that is shown, in round figures. */
export function topOf(...values) {
  const most = Math.max(0.05, ...values.flat().filter((value) => value != null));
  return Math.min(1, Math.ceil(most * 1.08 * 20) / 20);
}

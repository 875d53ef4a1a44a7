// The scores of the last hour in the room of a table's cell.

import { html } from "../html.js";
import { count } from "../format.js";

const WIDTH = 120;
const HEIGHT = 28;

/** Equal bins of 0..1 as bars; those above the threshold, where it is known, in the colour of a defect. */
export function Spark({ bins, threshold }) {
  const total = bins?.reduce((sum, each) => sum + each, 0) ?? 0;
  if (!total) return html`<span class="spark none" aria-hidden="true"></span>`;
  const most = Math.max(...bins);
  const step = WIDTH / bins.length;
  const bars = { normal: "", above: "" };
  bins.forEach((each, index) => {
    if (!each) return;
    // Roots, so that one defect beside a thousand good parts is still seen.
    const height = Math.max(2, (HEIGHT - 2) * Math.sqrt(each / most));
    const middle = (index + 0.5) / bins.length;
    const bar = `M${(index * step + 0.5).toFixed(1)} ${HEIGHT}v${-height.toFixed(1)}h${(step - 1).toFixed(1)}v${height.toFixed(1)}z`;
    bars[threshold != null && middle > threshold ? "above" : "normal"] += bar;
  });
  const label = `${count(total)} scores${threshold == null ? "" : `, threshold ${threshold.toFixed(3)}`}`;
  return html`<svg class="spark" width=${WIDTH} height=${HEIGHT} viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label=${label}>
    <path class="spark-floor" d="M0 ${HEIGHT - 0.5}h${WIDTH}" />
    <path class="spark-bars" d=${bars.normal} />
    <path class="spark-bars above" d=${bars.above} />
    ${threshold != null && html`<path class="spark-limit" d="M${(threshold * WIDTH).toFixed(1)} 0v${HEIGHT}" />`}
  </svg>`;
}

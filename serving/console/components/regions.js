// The areas of an image that look unlike the good parts.

import { html } from "../html.js";
import { count, place, score } from "../format.js";

export function Regions({ regions, width, height, selected, onSelect }) {
  if (regions.length === 0) return html`<p class="hint">None above the threshold.</p>`;
  return html`<ol class="regions">
    ${regions.map((region, index) => html`<li key=${index}>
      <button type="button" aria-pressed=${selected === index} onClick=${() => onSelect(selected === index ? null : index)}
          onMouseEnter=${() => onSelect(index)} onMouseLeave=${() => onSelect(null)} onFocus=${() => onSelect(index)} onBlur=${() => onSelect(null)}>
        <span class="region-number" aria-hidden="true">${index + 1}</span>
        <span class="region-place">${place(region, width, height)}</span>
        <span class="num">peak ${score(region.peak)}</span>
        <span class="num hint">${count(region.area)} px</span>
      </button>
    </li>`)}
  </ol>`;
}

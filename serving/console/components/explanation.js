// Why a part was rejected: each area beside what it should have looked like, and either evidence alone.

import { html, useEffect, useState } from "../html.js";
import { explain } from "../api.js";
import { pngOf, readMap } from "../heat.js";
import { Icon } from "./icons.js";
import { ProblemMessage, prose } from "./messages.js";

const EVIDENCE = [
  { key: "both", label: "Both", about: "The map that the verdict rests on." },
  { key: "prompts", label: "Prompts", about: "What the learned prompts find unusual." },
  { key: "memory", label: "Memory", about: "What no support image explains." },
];
const CLEAR = 0.05;

/**
 * `file()` gives the image as a blob; `onMap(map)` shows the map of one kind of evidence, null the usual one;
 * without it there is none to show. `selected`, `onSelect`: the area that is looked at.
 */
export function Explanation({ category, file, version, selected, onSelect, onMap }) {
  const [state, setState] = useState({ name: "closed" });
  const [evidence, setEvidence] = useState("both");
  useEffect(() => () => state.asking?.abort(), []);

  const show = async (key) => {
    setEvidence(key);
    onMap?.(key === "both" ? null : state.maps[key]);
  };
  const toggle = async () => {
    if (state.name === "shown") {
      show("both");
      return setState({ name: "closed" });
    }
    const asking = new AbortController();
    setState({ name: "asked", asking });
    try {
      const found = await explain(category, await file(), asking.signal);
      const [prompts, memory] = await Promise.all([found.prompts_map_png, found.memory_map_png].map((png) => readMap(pngOf(png))));
      setState({ name: "shown", found, maps: { prompts, memory } });
    } catch (problem) {
      if (!asking.signal.aborted) setState({ name: "failed", problem });
    }
    return undefined;
  };
  const { found } = state;
  return html`<section class="explanation">
    <button type="button" class="whole" aria-expanded=${state.name === "shown"} disabled=${state.name === "asked"} onClick=${toggle}>
      <${Icon} name="search" />${state.name === "asked" ? "Looking at the support images …" : "Why?"}
    </button>
    ${state.name === "failed" && html`<${ProblemMessage} problem=${state.problem} quiet />`}
    ${state.name === "shown" && html`
      ${onMap && html`<div class="segments" role="group" aria-label="Which evidence the map shows">
        ${EVIDENCE.map(({ key, label }) => html`<button key=${key} type="button" aria-pressed=${evidence === key} onClick=${() => show(key)}>${label}</button>`)}
      </div>
      <p class="hint" role="status">${EVIDENCE.find(({ key }) => key === evidence).about}</p>`}
      ${found.version !== version && html`<p class="tag warn">As version ${found.version} sees it</p>`}
      ${found.note && html`<p class="hint">${prose(found.note)}</p>`}
      ${found.regions.length === 0
        ? html`<p class="hint">No area is above the threshold.</p>`
        : html`<ol class="explained">${found.regions.map((region, index) => html`<li key=${index} class=${selected === index ? "on" : ""}
            onMouseEnter=${() => onSelect(index)} onMouseLeave=${() => onSelect(null)}><${Area} number=${index + 1} region=${region} /></li>`)}</ol>`}`}
  </section>`;
}

function Area({ number, region }) {
  const { nearest, resembles } = region;
  return html`
    <div class="pair">
      <figure><img src=${jpeg(region.picture_jpeg)} alt="Area ${number}, as it is" /><figcaption><span class="region-number" aria-hidden="true">${number}</span>As it is</figcaption></figure>
      ${nearest && html`<figure><img src=${jpeg(nearest.picture_jpeg)} alt="The most similar place of the good part ${nearest.image}" />
        <figcaption title=${nearest.image}>Most alike, ${nearest.image}</figcaption></figure>`}
    </div>
    ${nearest && html`<p>${howFar(nearest.distance)}</p>`}
    ${resembles.length > 0 && html`<p class="hint">${likeness(resembles)}</p>`}`;
}

function howFar(distance) {
  if (distance < 2) return "Good parts differ as much: the prompts, or the image as a whole, tell it apart.";
  return `Differs ${distance < 5 ? "more" : "far more"} than good parts do, by ${distance.toFixed(distance < 10 ? 1 : 0)} standard deviations.`;
}

/** The kinds that are about as similar as the first. */
function likeness(resembles) {
  const alike = resembles.filter(({ similarity }) => similarity > resembles[0].similarity - CLEAR);
  return `Perhaps ${alike.map(({ about }) => about).join(", or ")}.`;
}

const jpeg = (base64) => `data:image/jpeg;base64,${base64}`;

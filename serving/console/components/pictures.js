// What was drawn of a version: what it finds in good and in spoiled images, and the plots of its search.

import { picture, pictures } from "../api.js";
import { html, useState } from "../html.js";
import { useLoaded, useObjectUrl, useWhenSeen } from "../hooks.js";
import { Dialog } from "./dialog.js";
import { ProblemMessage, Skeleton } from "./messages.js";

// In this order; those of a later version of apt-ray come behind under their own names.
const CAPTIONS = {
  perturbations: "Made-up defects, and what it finds in them",
  support_images: "The images it was learned from, and what it finds in them",
  test_scores: "Labelled parts: good against defective",
  test_pictures: "The labelled parts that are hardest and easiest",
  trials: "Every trial, step by step",
  value_over_time: "The best value over time",
  slices: "Each setting against the value",
  importances: "Which settings mattered",
  parallel_coordinates: "All settings of all trials",
};
const ORDER = Object.keys(CAPTIONS);

const captionOf = (name) => CAPTIONS[name] ?? name.replaceAll("_", " ");
const rank = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);

export function VersionPictures({ category, version }) {
  const found = useLoaded((signal) => pictures(category, version, signal), [category, version]);
  const [open, setOpen] = useState(null);
  if (found.problem) return html`<${ProblemMessage} problem=${found.problem} onRetry=${found.reload} quiet />`;
  if (!found.data) return html`<${Skeleton} rows=${1} height=${180} />`;
  if (found.data.length === 0) return html`<p class="hint">Nothing was drawn of version ${version}.</p>`;
  const names = [...found.data].sort((a, b) => rank(a) - rank(b));
  return html`<ul class="cards pictures">
      ${names.map((name) => html`<li key=${`${version} ${name}`}><${Small} category=${category} version=${version} name=${name} onOpen=${(url) => setOpen({ name, url })} /></li>`)}
    </ul>
    ${open && html`<${Dialog} title=${captionOf(open.name)} onClose=${() => setOpen(null)} wide>
      <div class="dialog-body"><img class="picture" src=${open.url} alt=${captionOf(open.name)} /></div><//>`}`;
}

function Small({ category, version, name, onOpen }) {
  const [element, file] = useWhenSeen((signal) => picture(category, version, name, signal), [category, version, name]);
  const url = useObjectUrl(file);
  return html`<button ref=${element} type="button" class="card" disabled=${!url} onClick=${() => onOpen(url)}>
    <span class="card-image">${url && html`<img src=${url} alt="" />`}</span>
    <span>${captionOf(name)}</span>
  </button>`;
}

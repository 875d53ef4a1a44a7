// What people say of inspected parts.

import { feedbackImage, giveFeedback } from "../api.js";
import { html, useState } from "../html.js";
import { score, when } from "../format.js";
import { useObjectUrl, useWhenSeen } from "../hooks.js";
import { ProblemMessage } from "./messages.js";

const words = (label) => label.replace("_", " ");

/** The label of a part that is good or not, and was rejected or not. */
export const labelOf = (isGood, wasRejected) =>
  (isGood ? (wasRejected ? "false_alarm" : "confirmed_good") : wasRejected ? "confirmed_defect" : "missed_defect");

/** Two buttons by which whoever looks at a report says what the part is. */
export function Tell({ category, report, file }) {
  const [{ said, problem }, setState] = useState({});
  const say = (label) => giveFeedback(category, { request_id: report.request_id, label }, file).then((said) => setState({ said }), (problem) => setState({ problem }));
  return html`<section><h2>Was it right?</h2>
    <div class="row marks" role="group" aria-label="What it is">
      ${["This was a good part", "This is a defect"].map((text, bad) => {
        const label = labelOf(!bad, report.is_anomalous);
        return html`<button key=${text} type="button" aria-pressed=${said?.label === label} onClick=${() => say(label)}>${text}</button>`;
      })}
    </div>
    <p class="hint" role="status">${said ? `Kept as ${words(said.label)}.` : ""}</p>
    <${ProblemMessage} problem=${problem} quiet />
  </section>`;
}

export function FeedbackList({ category, feedback }) {
  return html`<div class="scroller" tabindex="0" role="region" aria-label="Feedback"><table class="list">
    <thead><tr>${["Part", "Said", "By", "Score", "Note"].map((each) => html`<th key=${each} scope="col">${each}</th>`)}</tr></thead>
    <tbody>${feedback.map((each) => html`<${Said} key=${each.id} category=${category} said=${each} />`)}</tbody>
  </table></div>`;
}

function Said({ category, said }) {
  const [element, image] = useWhenSeen((signal) => feedbackImage(category, said.id, signal), [said.id]);
  return html`<tr ref=${element}><td><img src=${useObjectUrl(image)} alt="" height="48" /></td>
    <td class="told">${words(said.label)} <bdi>${said.kind}</bdi> ${said.is_disputed && html`<span class="tag warn">disputed</span>`}${said.is_used && html`<span class="tag good">used</span>`}</td>
    <td>${said.by}<span class="hint">${when(said.at)}</span></td><td>${score(said.score)}</td><td class="told"><bdi>${said.note}</bdi></td></tr>`;
}

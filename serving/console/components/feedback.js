// What people say of an inspected part, and what was said of a category.

import { feedbackImage, giveFeedback } from "../api.js";
import { html, useState } from "../html.js";
import { score, when } from "../format.js";
import { useObjectUrl, useWhenSeen } from "../hooks.js";
import { Icon } from "./icons.js";
import { ProblemMessage } from "./messages.js";

const LABELS = {
  false_alarm: "False alarm", missed_defect: "Missed defect", confirmed_defect: "Confirmed defect", confirmed_good: "Confirmed good", sampled: "To be judged",
};

/** The label of a part that is good or not, and was rejected or not. */
export const labelOf = (isGood, wasRejected) =>
  (isGood ? (wasRejected ? "false_alarm" : "confirmed_good") : wasRejected ? "confirmed_defect" : "missed_defect");

/** Two buttons by which whoever looks at a report says what the part is. */
export function Tell({ category, report, file }) {
  const [state, setState] = useState({});
  const say = async (isGood) => {
    setState({ isBusy: true });
    try {
      setState({ said: await giveFeedback(category, { request_id: report.request_id, label: labelOf(isGood, report.is_anomalous) }, file) });
    } catch (problem) {
      setState({ problem });
    }
  };
  return html`<section><h2>Was it right?</h2>
    <div class="row marks" role="group" aria-label="What it is">
      ${[[true, "This was a good part"], [false, "This is a defect"]].map(([isGood, label]) => html`<button key=${label} type="button" disabled=${state.isBusy}
        aria-pressed=${state.said?.label === labelOf(isGood, report.is_anomalous)} onClick=${() => say(isGood)}><${Icon} name=${isGood ? "good" : "bad"} />${label}</button>`)}
    </div>
    <p class="hint" role="status">${state.said ? `${LABELS[state.said.label]}: kept for an operator.` : ""}</p>
    <${ProblemMessage} problem=${state.problem} quiet />
  </section>`;
}

/** All that was said, newest first. */
export function FeedbackList({ category, feedback }) {
  return html`<div class="scroller" tabindex="0" role="region" aria-label="Feedback"><table class="list">
    <thead><tr><th scope="col">Part</th><th scope="col">Said</th><th scope="col">By</th><th scope="col" class="num">Score</th><th scope="col">Note</th></tr></thead>
    <tbody>${feedback.map((each) => html`<${Said} key=${each.id} category=${category} said=${each} />`)}</tbody>
  </table></div>`;
}

function Said({ category, said }) {
  const [element, image] = useWhenSeen((signal) => feedbackImage(category, said.id, signal), [category, said.id]);
  const url = useObjectUrl(image);
  return html`<tr ref=${element}>
    <td>${url && html`<img src=${url} alt="" height="48" />`}</td>
    <td>${LABELS[said.label]} ${said.kind} ${said.is_disputed && html`<span class="tag warn">disputed</span>`}${said.is_used && html`<span class="tag good">used</span>`}</td>
    <td>${said.by}<span class="hint">${when(said.at)}</span></td>
    <td class="num">${score(said.score)}</td>
    <td>${said.note}</td>
  </tr>`;
}

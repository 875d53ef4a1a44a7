// Inspect: images in, verdicts out. One image is looked at closely, several make a contact sheet.

import { html, useEffect, useState } from "../html.js";
import { inspect } from "../api.js";
import { because, howUsual, milliseconds, promise, score } from "../format.js";
import { pngOf, readMap } from "../heat.js";
import { may } from "../hooks.js";
import { ContactSheet } from "../components/contact-sheet.js";
import { Explanation } from "../components/explanation.js";
import { Tell } from "../components/feedback.js";
import { Icon } from "../components/icons.js";
import { Intake } from "../components/intake.js";
import { Verdict } from "../components/marks.js";
import { ProblemMessage } from "../components/messages.js";
import { Regions } from "../components/regions.js";
import { ScoreChart, topOf } from "../components/scores.js";
import { ThresholdPanel } from "../components/threshold.js";
import { Viewer } from "../components/viewer.js";
import { MAP_SIDE, visitOf } from "../visit.js";

export function InspectTab({ session, category, about, status, reload }) {
  const visit = visitOf(category);
  const [, setVersion] = useState(visit.version);
  const [openId, setOpenId] = useState(visit.items.length === 1 ? visit.items[0].id : null);
  const [tried, setTried] = useState(null);
  useEffect(() => visit.follow(setVersion), [visit]);

  const { items } = visit;
  const open = items.find(({ id }) => id === openId) ?? null;
  const add = (files) => {
    const added = visit.add(files);
    setOpenId(added.length === 1 ? added[0].id : null);
  };
  const threshold = about.data?.threshold ?? visit.done.at(-1)?.report.threshold ?? null;
  const panel = html`<${ThresholdPanel} category=${category} about=${about.data} threshold=${threshold} items=${items}
    tried=${tried} onTry=${setTried} mayChange=${may(session, "operate")} onChanged=${reload} />`;

  if (!may(session, "inspect", category)) {
    return html`<${ProblemMessage} problem=${{
      title: "Not for this token",
      detail: `The token of ${session.name} has no right to inspect ${category}.`,
      remedy: `Sign in with a token that has the scope inspect or inspect:${category}.`,
    }} />`;
  }
  if (items.length === 0) {
    return html`<div class="inspect start">
      <${Intake} onFiles=${add} />
      <aside class="panel side">
        ${about.problem ? html`<${ProblemMessage} problem=${about.problem} onRetry=${about.reload} quiet />` : panel}
      </aside>
    </div>`;
  }
  if (!open) {
    return html`<div class="inspect">
      <${ContactSheet} visit=${visit} tried=${tried} onOpen=${(item) => setOpenId(item.id)} onFiles=${add} />
      <aside class="panel side">${panel}</aside>
    </div>`;
  }
  return html`<${OneImage} key=${open.id} visit=${visit} item=${open} about=${about.data} status=${status} tried=${tried}
    mayTell=${may(session, "feedback", category)} onFiles=${add} onOpen=${setOpenId} panel=${panel} />`;
}

function OneImage({ visit, item, about, status, tried, mayTell, onFiles, onOpen, panel }) {
  const [mode, setMode] = useState("overlay");
  const [selected, setSelected] = useState(null);
  const [candidate, setCandidate] = useState({ state: "none" });
  const [map, setMap] = useState(null);
  const [evidence, setEvidence] = useState(null);  // a map of one kind of it, looked at instead
  useEffect(() => void (item.mapPng && readMap(item.mapPng).then(setMap)), [item.mapPng]);
  const { report } = item;
  const limit = tried ?? report?.threshold;
  const index = visit.items.indexOf(item);

  const compare = async () => {
    if (candidate.state === "shown") return setCandidate({ state: "none" });
    setCandidate({ state: "asked" });
    try {
      const found = await inspect(visit.category, item.file, { mapSide: MAP_SIDE, alias: "candidate" });
      const map = found.map_png ? await readMap(pngOf(found.map_png)) : null;
      setCandidate({ state: "shown", report: found, map });
    } catch (problem) {
      setCandidate({ state: "failed", problem });
    }
    return undefined;
  };
  const isCompared = candidate.state === "shown";
  const mayCompare = report && !item.drawn && (status == null || status.candidate != null);

  return html`<div class="inspect one">
    <div class="inspect-bar">
      ${visit.items.length > 1 && html`
        <button type="button" onClick=${() => onOpen(null)}><${Icon} name="back" size=${12} />All ${visit.items.length}</button>
        <div class="zoom" role="group" aria-label="Images">
          <button type="button" aria-label="Previous image" disabled=${index === 0} onClick=${() => onOpen(visit.items[index - 1].id)}><${Icon} name="back" /></button>
          <button type="button" aria-label="Next image" disabled=${index === visit.items.length - 1} onClick=${() => onOpen(visit.items[index + 1].id)}><${Icon} name="next" /></button>
        </div>`}
      <p class="file-name" title=${item.name}>${report && html`<span class="narrow-only"><${Verdict} bad=${report.is_anomalous} /></span>`}${item.name}</p>
      <${Intake} onFiles=${onFiles} small />
    </div>
    ${item.state === "failed"
      ? html`<div class="panel view failed"><${ProblemMessage} problem=${item.problem} onRetry=${() => visit.retry(item)} /></div>`
      : html`<div class="panel view">
        <${Viewer} name=${item.name} src=${item.url} width=${item.width ?? 0} height=${item.height ?? 0} busy=${!report}
          map=${evidence ?? map} threshold=${limit ?? 0.5} regions=${report?.regions} selected=${selected} onSelect=${setSelected}
          mode=${mode} onMode=${(next) => { setMode(next); setCandidate({ state: "none" }); }}
          compared=${isCompared ? { map: candidate.map, threshold: candidate.report.threshold, regions: candidate.report.regions } : null} />
      </div>`}
    <aside class="panel side">
      <p class="visually-hidden" role="status">${report ? `${item.name}: ${report.is_anomalous ? "defective" : "good"}, score ${score(report.anomaly_score)}` : ""}</p>
      ${report ? html`<${Finding} report=${report} about=${about}  tried=${tried} />`
        : item.state === "failed" ? html`<p class="hint">No verdict on this image.</p>` : html`<${Pending} />`}
      ${mayCompare && html`<section>
        <button type="button" class="whole" aria-pressed=${isCompared} disabled=${candidate.state === "asked"} onClick=${compare}>
          <${Icon} name="star" />${candidate.state === "asked" ? "Asking the candidate …" : isCompared ? "Champion alone" : "Compare with the candidate"}
        </button>
        ${isCompared && html`<${Beside} one=${report} other=${candidate.report} />`}
        ${candidate.state === "failed" && html`<${ProblemMessage} problem=${candidate.problem} quiet />`}
      </section>`}
      ${report && mayTell && html`<${Tell} key=${report.request_id} category=${visit.category} report=${report} file=${item.file} />`}
      ${report && html`<section><h2>Unusual areas</h2>
        <${Regions} regions=${report.regions} width=${item.width} height=${item.height} selected=${selected} onSelect=${setSelected} />
      </section>`}
      ${report && html`<${Explanation} category=${visit.category} file=${() => item.file} version=${report.version}
        selected=${selected} onSelect=${setSelected} onMap=${item.drawn ? null : setEvidence} />`}
      ${panel}
      ${report && html`<p class="fine">Version ${report.version} · backbone ${report.backbone} · ${milliseconds(total(report.timings_ms))} in the fleet · request ${report.request_id}</p>`}
    </aside>
  </div>`;
}

function Finding({ report, about, tried }) {
  const { anomaly_score: found, threshold, is_anomalous: bad } = report;
  const normal = about?.normal_scores ?? [];
  const limit = tried ?? threshold;
  const wouldBe = found > limit;
  return html`<section class="finding ${bad ? "bad" : "good"}">
    <${Verdict} bad=${bad} large />
    <p>${because(report)}</p>
    ${tried != null && wouldBe !== bad && html`<p class="tag warn">With ${score(tried)} it would be ${wouldBe ? "defective" : "good"}</p>`}
    <div class="figures">
      <div><span class="figure-label">Score</span><output class="figure">${score(found)}</output></div>
      <div><span class="figure-label">Threshold</span><span class="figure quiet">${score(threshold)}</span></div>
    </div>
    <${ScoreChart} normal=${normal} score=${found} threshold=${threshold} tried=${tried} top=${topOf(normal, found, threshold, tried)} />
    <p>${howUsual(report.p_value, normal.length > 0 && found > normal.at(-1))}</p>
    <p class="hint">${promise(report.certified_false_alarm_rate)}</p>
  </section>`;
}

/** As large as what comes, so that nothing moves. */
function Pending() {
  return html`<section class="finding pending" role="status" aria-label="Inspecting">
    <span class="verdict large quiet"><${Icon} name="loading" size=${28} class="turning" />Inspecting</span>
    <p> </p>
    <div class="figures">
      <div><span class="figure-label">Score</span><span class="figure ghost">0.000</span></div>
      <div><span class="figure-label">Threshold</span><span class="figure ghost">0.000</span></div>
    </div>
    <div class="scores"></div>
  </section>`;
}

function Beside({ one, other }) {
  const row = (label, report) => html`<tr>
    <th scope="row">${label} <span class="version">v${report.version}</span></th>
    <td><${Verdict} bad=${report.is_anomalous} /></td>
    <td class="num">${score(report.anomaly_score)}</td><td class="num">${score(report.threshold)}</td></tr>`;
  return html`<table class="small">
    <thead><tr><td></td><th scope="col">Verdict</th><th scope="col" class="num">Score</th><th scope="col" class="num">Threshold</th></tr></thead>
    <tbody>${row("Champion", one)}${row("Candidate", other)}</tbody>
  </table>`;
}

const total = (timings) => Object.values(timings).reduce((sum, part) => sum + part, 0);

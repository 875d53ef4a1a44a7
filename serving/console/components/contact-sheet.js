// Many images at once: progress, verdicts sorted by score, and a download of all of it.

import { html, useMemo, useState } from "../html.js";
import { clock, plural, score } from "../format.js";
import { overlayOf } from "../visit.js";
import { zip } from "../zip.js";
import { Icon } from "./icons.js";
import { Intake } from "./intake.js";
import { Verdict } from "./marks.js";

const ORDERS = [
  { key: "score", label: "By score" },
  { key: "order", label: "As added" },
];

export function ContactSheet({ visit, tried, onOpen, onFiles }) {
  const [order, setOrder] = useState("score");
  const [packing, setPacking] = useState(null);
  const { items, done } = visit;
  const failed = items.filter(({ state }) => state === "failed").length;
  const ended = done.length + failed;
  const bad = done.filter(({ report }) => report.is_anomalous).length;
  const isRunning = ended < items.length;
  const sorted = useMemo(() => (order === "order" ? items : [...items].sort((a, b) => rank(b) - rank(a))), [items, order, visit.version]);

  const download = async () => {
    setPacking(0);
    const files = [{ name: "results.csv", bytes: new TextEncoder().encode(table(items)) }];
    for (const [index, item] of done.entries()) {
      const bytes = new Uint8Array(await (await overlayOf(item)).arrayBuffer());
      files.push({ name: `overlays/${String(index + 1).padStart(3, "0")} ${plainName(item.name)}.jpg`, bytes });
      setPacking((index + 1) / done.length);
    }
    save(zip(files), `${visit.category} ${clock(new Date()).replaceAll(":", "-")}.zip`);
    setPacking(null);
  };

  return html`<section class="panel sheet" aria-label="Contact sheet">
    <div class="toolbar">
      <p class="sheet-count" role="status"><b>${isRunning ? `${ended} of ${items.length}` : plural(items.length, "image")}</b>
        <span class="hint">${plural(bad, "defective", "defective")}${failed ? `, ${failed} not inspected` : ""}</span></p>
      <div class="segments" role="group" aria-label="Order">
        ${ORDERS.map(({ key, label }) => html`<button key=${key} type="button" aria-pressed=${order === key} onClick=${() => setOrder(key)}>${label}</button>`)}
      </div>
      <button type="button" disabled=${isRunning || done.length === 0 || packing !== null} onClick=${download}>
        <${Icon} name="download" />${packing === null ? "Download" : `${Math.round(100 * packing)} %`}</button>
      <button type="button" onClick=${() => visit.clear()}>Clear</button>
      <${Intake} onFiles=${onFiles} small />
    </div>
    <div class="progress ${isRunning ? "" : "whole"}"><progress max=${items.length} value=${ended} aria-label="Inspected" /></div>
    <ol class="cards">
      ${sorted.map((item) => html`<li key=${item.id}><${Card} item=${item} tried=${tried} onOpen=${() => onOpen(item)} /></li>`)}
    </ol>
  </section>`;
}

function Card({ item, tried, onOpen }) {
  const { report, state } = item;
  const wouldBe = report && tried != null ? report.anomaly_score > tried : report?.is_anomalous;
  const changes = report && wouldBe !== report.is_anomalous;
  return html`<button type="button" class="card ${state} ${report?.is_anomalous ? "bad" : ""} ${changes ? "changes" : ""}" onClick=${onOpen}>
    <span class="card-image">${item.thumb ? html`<img src=${item.thumb} alt="" />` : html`<${Icon} name=${state === "failed" ? "warn" : "loading"} size=${24} class=${state === "running" ? "turning" : ""} />`}</span>
    <span class="card-line">
      ${report ? html`<${Verdict} bad=${report.is_anomalous} /><span class="num">${score(report.anomaly_score)}</span>`
        : html`<span class="hint">${{ waiting: "Waits", running: "Inspecting", failed: item.problem?.title }[state]}</span>`}
    </span>
    <span class="card-name">${item.name}</span>
    ${changes && html`<span class="tag warn">would be ${wouldBe ? "defective" : "good"}</span>`}
  </button>`;
}

const rank = ({ report, state, id }) => (report ? report.anomaly_score : state === "failed" ? 2 : -id);

const HEADER = ["file", "verdict", "score", "threshold", "p_value", "category", "version", "regions", "peak", "x", "y", "width", "height", "request_id", "problem"];

/** Everything that was found, one line an image, its worst region with it. */
export function table(items) {
  const rows = items.map(({ name, report, problem }) => {
    if (!report) return [name, "", "", "", "", "", "", "", "", "", "", "", "", "", problem?.detail ?? "not inspected"];
    const worst = report.regions[0] ?? {};
    return [name, report.is_anomalous ? "defective" : "good", report.anomaly_score, report.threshold, report.p_value,
      report.category, report.version, report.regions.length, worst.peak, worst.x, worst.y, worst.width, worst.height, report.request_id, ""];
  });
  return [HEADER, ...rows].map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

/** A cell; text that a spreadsheet would take for a formula gets an apostrophe. */
function quoted(value) {
  if (value == null) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const plainName = (name) => name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}._ -]/gu, "_").slice(0, 80);

function save(blob, name) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// The images that a category is to be learned from: sent, seen, struck out.

import { sendTrainingImage, strikeOut, trainingImage } from "../api.js";
import { html, useEffect, useRef, useState } from "../html.js";
import { plural } from "../format.js";
import { useObjectUrl, useWhenSeen } from "../hooks.js";
import { Icon } from "./icons.js";
import { Intake } from "./intake.js";
import { ProblemMessage, Skeleton } from "./messages.js";

// No file will fare better than the one before.
const LASTING = [0, 401, 403, 503, 507];

/** `loaded`: {data: {images}, problem, reload}, as the fleet has them; `onChanged(answer)` has others. */
export function TrainingImages({ category, loaded, onChanged }) {
  const [sending, setSending] = useState(null);
  const [struck, setStruck] = useState("");
  const list = useRef(null);
  const wanted = useRef(null);
  const images = loaded.data?.images ?? [];

  // The keyboard stays where an image was struck out.
  useEffect(() => {
    if (wanted.current == null) return;
    const buttons = list.current?.querySelectorAll("button") ?? [];
    buttons[Math.min(wanted.current, buttons.length - 1)]?.focus();
    wanted.current = null;
  }, [images.length]);

  const send = async (files) => {
    const state = { done: 0, total: files.length, copies: 0, refused: [], left: [], problem: null };
    setStruck("");
    for (const [index, file] of files.entries()) {
      setSending({ ...state });
      try {
        const answer = await sendTrainingImage(category, file);
        state.copies += answer.copies;
        onChanged(answer);
      } catch (problem) {
        if (LASTING.includes(problem.status) || problem.type?.endsWith(":too-many-images")) {
          Object.assign(state, { problem, left: files.slice(index) });
          break;
        }
        state.refused.push({ name: file.name, problem });
      }
      state.done += 1;
    }
    const isToTell = state.problem || state.refused.length || state.copies;
    setSending(isToTell ? { ...state, isOver: true } : null);
  };
  const strike = async (name, index) => {
    try {
      onChanged(await strikeOut(category, name));
      wanted.current = index;
      setStruck(`Image ${index + 1} is struck out.`);
    } catch (problem) {
      setSending({ isOver: true, done: 0, total: 0, copies: 0, refused: [], left: [], problem });
    }
  };

  const isSending = sending && !sending.isOver;
  const isEmpty = loaded.data && images.length === 0;
  return html`
    <p class="visually-hidden" role="status">${isSending ? "" : struck}</p>
    <div class="progress ${isSending ? "" : "whole"}"><progress max=${sending?.total || 1} value=${sending?.done ?? 0} aria-label="Sent" /></div>
    ${sending && html`<${Sending} sending=${sending} onAgain=${() => send(sending.left)} onClose=${() => setSending(null)} />`}
    ${loaded.problem && !loaded.data && html`<${ProblemMessage} problem=${loaded.problem} onRetry=${loaded.reload} />`}
    ${!loaded.data && !loaded.problem && html`<${Skeleton} rows=${2} height=${150} />`}
    ${isEmpty && !isSending && html`<${Intake} onFiles=${send} veil="Drop to learn from"
      hint="of good parts: ten are a good start. They teach what is normal, so a defect among them is never found again." />`}
    ${images.length > 0 && html`<ol class="cards training" ref=${list}>
      ${images.map(({ name }, index) => html`<li key=${name}><${Card} category=${category} name=${name} index=${index} onStrike=${() => strike(name, index)} /></li>`)}
    </ol>
    <div class="toolbar below">
      <p class="hint grow">${isSending ? `${sending.done} of ${sending.total} sent` : `${plural(images.length, "image")}. Strike out what is not good, blurred or of another part.`}</p>
      <${Intake} onFiles=${send} small veil="Drop to learn from" />
    </div>`}`;
}

function Sending({ sending, onAgain, onClose }) {
  const { isOver, done, total, copies, refused, left, problem } = sending;
  if (!isOver) return done === 0 && total > 1 ? null : html`<p class="visually-hidden" role="status">${done} of ${total} sent</p>`;
  return html`<div class="sent" role="status">
    ${problem && html`<${ProblemMessage} problem=${problem} onRetry=${left.length ? onAgain : undefined} />
      ${left.length > 0 && html`<p class="hint">${plural(left.length, "image")} not sent.</p>`}`}
    ${refused.length > 0 && html`<div class="message quiet"><${Icon} name="warn" size=${20} /><div>
      <strong>${plural(refused.length, "file")} not taken</strong>
      <ul>${refused.map(({ name, problem: why }) => html`<li><b>${name}</b>: ${why.detail}</li>`)}</ul></div></div>`}
    ${copies > 0 && html`<p>${plural(copies, "image")} ${copies === 1 ? "was" : "were"} there already.</p>`}
    <button type="button" onClick=${onClose}>Close</button>
  </div>`;
}

function Card({ category, name, index, onStrike }) {
  const [element, file] = useWhenSeen((signal) => trainingImage(category, name, signal), [category, name]);
  const url = useObjectUrl(file);
  return html`<figure ref=${element} class="card">
    <span class="card-image">${url && html`<img src=${url} alt="Good image ${index + 1}" />`}</span>
    <button type="button" class="bare" aria-label="Strike out image ${index + 1}" onClick=${onStrike}><${Icon} name="close" size=${12} />Strike out</button>
  </figure>`;
}

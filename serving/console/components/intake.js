// How images come in: dropped anywhere, pasted, chosen, or taken with the camera.

import { html, useEffect, useRef, useState } from "../html.js";
import { Dialog } from "./dialog.js";
import { Icon } from "./icons.js";
import { ProblemMessage } from "./messages.js";

const TYPES = "image/png,image/jpeg,image/bmp,image/tiff,image/webp";

/** `onFiles(files)`; small once there are images; `veil` says what a drop does, `hint` what is taken. */
export function Intake({ onFiles, small = false, veil = "Drop to inspect",
  hint = "or paste one. PNG, JPEG, BMP, TIFF or WebP; several at once make a contact sheet." }) {
  const [isOver, setOver] = useState(false);
  const [isTaking, setTaking] = useState(false);
  const chooser = useRef(null);
  const capturer = useRef(null);
  const latest = useRef(onFiles);
  latest.current = onFiles;

  useEffect(() => {
    let depth = 0;
    const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    const enter = (event) => hasFiles(event) && ((depth += 1), setOver(true));
    const leave = (event) => hasFiles(event) && (depth = Math.max(0, depth - 1)) === 0 && setOver(false);
    // Missing the field shall not replace the page by the image.
    const over = (event) => event.preventDefault();
    const drop = (event) => {
      event.preventDefault();
      depth = 0;
      setOver(false);
      give(event.dataTransfer.files);
    };
    const paste = (event) => {
      if (event.clipboardData?.files.length) give(event.clipboardData.files);
    };
    const give = (files) => files.length && latest.current([...files]);
    const all = { dragenter: enter, dragleave: leave, dragover: over, drop, paste };
    for (const [name, listener] of Object.entries(all)) document.addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(all)) document.removeEventListener(name, listener);
    };
  }, []);

  const chosen = (event) => {
    const files = [...event.target.files];
    event.target.value = "";  // the same file may be chosen again
    if (files.length) onFiles(files);
  };
  // Without a secure connection a page may not open the camera itself; the tablet's camera app may.
  const take = () => (navigator.mediaDevices?.getUserMedia ? setTaking(true) : capturer.current.click());
  return html`<div class="intake ${small ? "small" : ""} ${isOver ? "over" : ""}">
    ${!small && html`<${Icon} name="image" size=${40} /><p class="intake-title">Drop images here</p>
      <p class="hint">${hint}</p>`}
    <div class="intake-actions">
      <button type="button" class=${small ? "" : "primary"} onClick=${() => chooser.current.click()}>
        <${Icon} name="image" />${small ? "Add images" : "Choose images"}</button>
      <button type="button" onClick=${take}><${Icon} name="camera" />Camera</button>
    </div>
    <input ref=${chooser} type="file" multiple accept=${TYPES} class="visually-hidden" tabindex="-1" aria-label="Images" onChange=${chosen} />
    <input ref=${capturer} type="file" accept="image/*" capture="environment" class="visually-hidden" tabindex="-1" aria-label="Photo" onChange=${chosen} />
    ${isOver && html`<div class="drop-veil" aria-hidden="true"><p>${veil}</p></div>`}
    ${isTaking && html`<${Camera} onClose=${() => setTaking(false)} onTaken=${(file) => { setTaking(false); onFiles([file]); }} />`}
  </div>`;
}

function Camera({ onClose, onTaken }) {
  const video = useRef(null);
  const [problem, setProblem] = useState(null);
  const [isReady, setReady] = useState(false);
  useEffect(() => {
    let stream = null;
    let isGone = false;
    navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 4096 }, height: { ideal: 3072 } } }).then(
      (opened) => {
        stream = opened;
        if (isGone) return stop();
        video.current.srcObject = opened;
        return video.current.play().then(() => setReady(true), () => {});
      },
      (error) => setProblem({
        title: "No camera",
        detail: error.name === "NotAllowedError" ? "This page may not use the camera." : "No camera was found.",
        remedy: "Allow it in the browser's address bar, or choose an image instead.",
      }),
    );
    const stop = () => stream?.getTracks().forEach((track) => track.stop());
    return () => {
      isGone = true;
      stop();
    };
  }, []);
  const take = () => {
    const { videoWidth: width, videoHeight: height } = video.current;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.getContext("2d").drawImage(video.current, 0, 0);
    const name = `camera ${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.jpg`;
    canvas.toBlob((blob) => onTaken(new File([blob], name, { type: "image/jpeg" })), "image/jpeg", 0.95);
  };
  return html`<${Dialog} title="Take an image" onClose=${onClose} wide>
    <div class="dialog-body">
      ${problem ? html`<${ProblemMessage} problem=${problem} />` : html`<video ref=${video} class="camera" muted playsinline />`}
    </div>
    <footer>
      <button type="button" onClick=${onClose}>Cancel</button>
      <button type="button" class="primary" disabled=${!isReady} onClick=${take}><${Icon} name="camera" />Take</button>
    </footer>
  <//>`;
}

// Dialogs, and the reason that every change asks for.

import { html, useEffect, useId, useRef, useState } from "../html.js";
import { Icon } from "./icons.js";
import { ProblemMessage } from "./messages.js";

/** A dialog that keeps the focus until it is closed (Esc does). */
export function Dialog({ title, onClose, children, wide = false }) {
  const dialog = useRef(null);
  const titleId = useId();
  useEffect(() => {
    const opener = document.activeElement;
    dialog.current.showModal();
    return () => opener?.isConnected && opener.focus();
  }, []);
  return html`<dialog ref=${dialog} class=${wide ? "wide" : ""} aria-labelledby=${titleId}
      onCancel=${(event) => { event.preventDefault(); onClose(); }}
      onClick=${(event) => event.target === dialog.current && onClose()}>
    <div class="dialog">
      <header>
        <h2 id=${titleId}>${title}</h2>
        <button type="button" class="bare square" aria-label="Close" onClick=${onClose}><${Icon} name="close" /></button>
      </header>
      ${children}
    </div>
  </dialog>`;
}

const SHORTEST = 3;
const LONGEST = 500;

/**
 * Asks why, then does it: `act({reason, ...})` may throw a Problem, which is shown.
 *
 * `force` is the label of a choice to do it whatever the comparison says.
 */
export function ReasonDialog({ title, children, label, tone = "primary", force, act, onClose }) {
  const [reason, setReason] = useState("");
  const [isForced, setForced] = useState(false);
  const [state, setState] = useState({ isBusy: false, problem: null });
  const id = useId();
  const field = useRef(null);
  useEffect(() => field.current.focus(), []);
  const submit = async (event) => {
    event.preventDefault();
    setState({ isBusy: true, problem: null });
    try {
      await act({ reason: reason.replace(/\s+/g, " ").trim(), force: isForced });
      onClose();
    } catch (problem) {
      setState({ isBusy: false, problem });
    }
  };
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <form onSubmit=${submit}>
      <div class="dialog-body">
        ${children}
        <div class="field">
          <label for=${id}>Reason</label>
          <textarea id=${id} ref=${field} rows="3" required minlength=${SHORTEST} maxlength=${LONGEST}
            aria-describedby="${id}-hint" value=${reason} onInput=${(event) => setReason(event.target.value)} />
          <p class="hint" id="${id}-hint">Kept with the change, under your token's name.</p>
        </div>
        ${force && html`<label class="check">
          <input type="checkbox" checked=${isForced} onChange=${(event) => setForced(event.target.checked)} />
          <span>${force}</span>
        </label>`}
        <${ProblemMessage} problem=${state.problem} />
      </div>
      <footer>
        <button type="button" onClick=${onClose}>Cancel</button>
        <button type="submit" class=${tone} disabled=${state.isBusy || reason.trim().length < SHORTEST}>
          ${state.isBusy ? "One moment …" : label}
        </button>
      </footer>
    </form>
  <//>`;
}

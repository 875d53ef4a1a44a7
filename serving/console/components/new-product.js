// A product that the fleet does not know yet: its name, then the page on which it is tuned.

import { html, useEffect, useId, useRef, useState } from "../html.js";
import { categoryAddress, navigate } from "../router.js";
import { Dialog } from "./dialog.js";

// As the API has it: it names folders, models and addresses.
const NAME = /^[A-Za-z0-9_-]+$/;
const LONGEST = 64;

/** `names`: those that are taken. */
export function NewProduct({ names, onClose }) {
  const [name, setName] = useState("");
  const id = useId();
  const field = useRef(null);
  useEffect(() => field.current.focus(), []);
  const isTaken = names.includes(name);
  const isWrong = name !== "" && !NAME.test(name);
  const isLike = !isTaken && names.find((each) => each.toLowerCase() === name.toLowerCase());
  const submit = (event) => {
    event.preventDefault();
    if (!name || isWrong) return;
    onClose();
    navigate(categoryAddress(name, "tune"));
  };
  return html`<${Dialog} title="New product" onClose=${onClose}>
    <form onSubmit=${submit}>
      <div class="dialog-body"><div class="field">
        <label for=${id}>Name</label>
        <input id=${id} ref=${field} required maxlength=${LONGEST} autocomplete="off" autocapitalize="none" spellcheck="false" aria-invalid=${isWrong}
          aria-describedby="${id}-hint" value=${name} onInput=${(event) => setName(event.target.value.trim())} />
        <p class=${isWrong ? "wrong" : "hint"} id="${id}-hint" role="status">${isWrong ? "Letters (a to z), digits, - and _ alone: the name stands in addresses and folders."
          : isTaken ? `${name} is there already: this opens its page.`
          : isLike ? `There is ${isLike} already, which differs in capitals alone.`
          : "Letters, digits, - and _. Its address is made of it, and it cannot be changed later."}</p>
      </div></div>
      <footer><button type="button" onClick=${onClose}>Cancel</button>
        <button type="submit" class="primary" disabled=${!name || isWrong}>${isTaken ? "Open" : "Next"}</button></footer>
    </form><//>`;
}

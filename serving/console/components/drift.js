// Drift: what is no longer as it was, since when, and that somebody has seen to it.

import { resetDrift } from "../api.js";
import { html, useState } from "../html.js";
import { score, when } from "../format.js";
import { ReasonDialog } from "./dialog.js";
import { Icon } from "./icons.js";
import { prose } from "./messages.js";

/** An alarm as a sentence: "Images are darker than they were, since 4 May 2026, 14:10." */
export const drifted = ({ says, since }) => prose(`${says}, since ${when(since)}`);

/** The alarms of a category, and the way to take them back. */
export function Drift({ category, drift, reload }) {
  const [isAsking, setAsking] = useState(false);
  if (!drift?.alarms.length) return null;
  return html`<div class="message quiet" role="status">
    <${Icon} name="warn" size=${20} />
    <div>
      ${drift.alarms.map((alarm) => html`<p key=${alarm.stream}><strong>${drifted(alarm)}</strong>${" "}
        <span class="hint">${alarm.stream} ${score(alarm.before)} before, ${score(alarm.after)} since; noticed after ${alarm.images} images</span></p>`)}
      <p class="remedy">Look at camera, lamp and parts. If they shall look like this from now on, tune the category again.</p>
    </div>
    <button type="button" onClick=${() => setAsking(true)}>Seen to …</button>
    ${isAsking && html`<${ReasonDialog} title=${`Drift of ${category} has been seen to`} label="Seen to"
      force="Compare with the next images instead of those of before"
      act=${async ({ reason, force }) => { await resetDrift(category, { reason, anew: force }); reload(); }} onClose=${() => setAsking(false)}>
      <p>Images are compared with those of before again. If the cause has not gone, this is back within some images.</p><//>`}
  </div>`;
}

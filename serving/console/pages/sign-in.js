// Who asks: a token, kept in this tab's memory until it is closed or loaded again.

import { html, useEffect, useId, useRef, useState } from "../html.js";
import { ProblemMessage } from "../components/messages.js";

/** The API's remedy is for programs: they send a header. */
function forPeople(problem) {
  if (problem.status !== 401) return problem;
  return { title: "Not known", detail: problem.detail, remedy: "Check it, or ask whoever runs the fleet for another" };
}

/** `reason`: why a token that was taken before is none now; `onToken(token)` throws a Problem. */
export function SignIn({ reason, onToken }) {
  const [token, setToken] = useState("");
  const [state, setState] = useState({ isBusy: false, problem: reason && forPeople(reason) });
  const id = useId();
  const field = useRef(null);
  useEffect(() => {
    document.title = "Sign in · apt-ray";
    field.current.focus();
  }, []);
  const submit = async (event) => {
    event.preventDefault();
    setState({ isBusy: true, problem: null });
    try {
      await onToken(token.trim());
    } catch (problem) {
      setState({ isBusy: false, problem: forPeople(problem) });
      field.current?.select();
    }
  };
  return html`<div class="sign-in">
    <form class="panel" onSubmit=${submit}>
      <h1 tabindex="-1">Sign in</h1>
      <p class="hint">This fleet asks for an access token. Whoever runs it makes one with${" "}
        <code>python -m serving.fleet token</code>.</p>
      <div class="field">
        <label for=${id}>Access token</label>
        <input id=${id} ref=${field} type="password" required autocomplete="off" spellcheck="false"
          aria-describedby="${id}-hint" value=${token} onInput=${(event) => setToken(event.target.value)} />
        <p class="hint" id="${id}-hint">It stays in this tab and is forgotten with it.</p>
      </div>
      <${ProblemMessage} problem=${state.problem} />
      <button type="submit" class="primary" disabled=${state.isBusy || !token.trim()}>${state.isBusy ? "One moment …" : "Sign in"}</button>
    </form>
  </div>`;
}

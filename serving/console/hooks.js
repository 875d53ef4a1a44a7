// What the pages share: loading, polling, the session.

import { useCallback, useEffect, useRef, useState } from "./html.js";

const POLL_MS = 5000;

/** {data, problem, isLoading, reload} of `load(signal)`, asked again when `keys` change; what was known stays. */
export function useLoaded(load, keys) {
  const [state, setState] = useState({ data: null, problem: null, isLoading: true });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const controller = new AbortController();
    setState((before) => ({ ...before, isLoading: true }));
    load(controller.signal).then(
      (data) => !controller.signal.aborted && setState({ data, problem: null, isLoading: false }),
      (problem) => !controller.signal.aborted && setState((before) => ({ ...before, problem, isLoading: false })),
    );
    return () => controller.abort();
  }, [...keys, turn]);
  return { ...state, reload: useCallback(() => setTurn((before) => before + 1), []) };
}

/**
 * {data, problem, since} of `ask(signal)`, asked every 5 s while the tab is seen.
 *
 * `ask` gives undefined where nothing has changed. What was known stays while the fleet does not
 * answer; `since` is when it last did.
 */
export function usePolled(makeAsk, keys) {
  const [state, setState] = useState({ data: null, problem: null, since: null });
  const wake = useRef(() => {});
  useEffect(() => {
    const controller = new AbortController();
    const ask = makeAsk();
    let timer = 0;
    let isAsking = false;
    const poll = async () => {
      clearTimeout(timer);
      if (document.hidden || isAsking) return;
      isAsking = true;
      try {
        const found = await ask(controller.signal);
        const since = new Date();
        setState((before) => found === undefined && !before.problem
          ? before
          : { data: found === undefined ? before.data : found, problem: null, since });
      } catch (problem) {
        if (!controller.signal.aborted) setState((before) => ({ ...before, problem }));
      }
      isAsking = false;
      if (!controller.signal.aborted) timer = setTimeout(poll, POLL_MS);
    };
    wake.current = poll;
    document.addEventListener("visibilitychange", poll);
    poll();
    return () => {
      controller.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", poll);
    };
  }, keys);
  return { ...state, ask: useCallback(() => wake.current(), []) };
}

/** The address of a blob for as long as it is shown. */
export function useObjectUrl(blob) {
  const [url, setUrl] = useState("");
  useEffect(() => {
    if (!blob) return setUrl("");
    const made = URL.createObjectURL(blob);
    setUrl(made);
    return () => URL.revokeObjectURL(made);
  }, [blob]);
  return url;
}

/** A ref for an element, and what `load(signal)` gives once that is about to be seen. */
export function useWhenSeen(load, keys) {
  const element = useRef(null);
  const [found, setFound] = useState(null);
  useEffect(() => {
    const controller = new AbortController();
    const observer = new IntersectionObserver((changes) => {
      if (!changes.some(({ isIntersecting }) => isIntersecting)) return;
      observer.disconnect();
      load(controller.signal).then((data) => !controller.signal.aborted && setFound(data), () => {});
    }, { rootMargin: "300px" });
    observer.observe(element.current);
    return () => {
      observer.disconnect();
      controller.abort();
    };
  }, keys);
  return [element, found];
}

/** Whether a media query holds. */
export function useMedia(query) {
  const [holds, setHolds] = useState(() => matchMedia(query).matches);
  useEffect(() => {
    const list = matchMedia(query);
    const follow = () => setHolds(list.matches);
    follow();
    list.addEventListener("change", follow);
    return () => list.removeEventListener("change", follow);
  }, [query]);
  return holds;
}

/** Whether who signed in may do `scope` (for a category, where it has one of its own). */
export function may(session, scope, category) {
  if (!session.needs_token) return true;
  return session.scopes.includes(scope) || (category && session.scopes.includes(`${scope}:${category}`));
}

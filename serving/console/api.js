// The fleet's public HTTP API, and who asks. Whatever the console can do, curl can: see /docs.

import { address } from "./router.js";

/** What the fleet answers to a request that it cannot fulfil (RFC 9457). */
export class Problem extends Error {
  constructor({ title, detail, remedy, status = 0, type = "" }, retryAfterS = 0) {
    super(detail);
    Object.assign(this, { title, detail, remedy, status, type, retryAfterS });
  }
}

// In this tab's memory alone: closed or reloaded, it is forgotten.
let token = "";
const onUnauthorized = new Set();

export function signWith(given) {
  token = given;
}

/** Calls `listener(problem)` whenever the fleet no longer knows who asks. */
export function whenUnauthorized(listener) {
  onUnauthorized.add(listener);
  return () => onUnauthorized.delete(listener);
}

async function send(path, { headers = {}, ...options } = {}) {
  const authorization = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers: { ...authorization, ...headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      title: "No answer",
      detail: "The fleet cannot be reached.",
      remedy: "Check the network; the fleet's operator sees more in `python -m serving.fleet status`.",
    });
  }
  if (response.ok || response.status === 304) return response;
  const problem = await problemOf(response);
  if (problem.status === 401) onUnauthorized.forEach((listener) => listener(problem));
  throw problem;
}

async function problemOf(response) {
  const retryAfterS = Number(response.headers.get("retry-after")) || 0;
  try {
    const said = await response.json();
    if (said.title && said.detail) return new Problem(said, retryAfterS);
  } catch {
    // No problem of the fleet's own: whatever stands before it answered.
  }
  return new Problem({
    title: `Answer ${response.status}`,
    detail: "Something between this page and the fleet answered, without a reason.",
    remedy: "Try again in a moment.",
    status: response.status,
  }, retryAfterS);
}

const json = async (path, options) => (await send(path, options)).json();

const post = (path, body, options = {}) =>
  json(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    ...options,
  });

const blob = async (path, options) => (await send(path, options)).blob();

/** Asks again and again for what seldom changes: `undefined` while it is as it was. */
function polled(path) {
  let etag = "";
  return async (signal) => {
    const response = await send(path, { signal, headers: etag ? { "If-None-Match": etag } : {} });
    if (response.status === 304) return undefined;
    etag = response.headers.get("etag") ?? "";
    return response.json();
  };
}

/** {name, scopes, needs_token}. */
export const whoAmI = () => json(address("fleet", "me"));

export const pollStatus = () => polled(address("fleet", "status"));
export const pollList = () => polled(address("v1"));
export const describe = (category, signal) => json(address("v1", category), { signal });
export const categoryStatus = async (category, signal) =>
  (await json(address("fleet", "status"), { signal })).categories[category] ?? null;

/** The report of one image; `mapSide` asks for its anomaly map as well, so many pixels long. */
export function inspect(category, file, { mapSide, alias, drawn = false, signal } = {}) {
  const query = new URLSearchParams();
  if (mapSide) query.set("map", drawn ? "overlay" : "png");
  if (mapSide) query.set("map_side", mapSide);
  if (alias) query.set("alias", alias);
  return json(`${address("v1", category, "inspect")}?${query}`, {
    method: "POST",
    headers: typeOf(file),
    body: file,
    signal,
  });
}

/** What a verdict on an image rests on. */
export const explain = (category, file, signal) =>
  json(address("v1", category, "explain"), { method: "POST", headers: typeOf(file), body: file, signal });

const typeOf = (file) => ({ "Content-Type": /^image\//.test(file.type) ? file.type : "application/octet-stream" });

const ofCategory = (category, ...parts) => address("fleet", "categories", category, ...parts);

export const versions = (category, signal) => json(ofCategory(category, "versions"), { signal });
export const operation = (id, signal) => json(address("fleet", "operations", id), { signal });

/** Starts a move: `promote`, `discard` or `roll-back`. */
export const move = (category, how, { reason, force = false }) =>
  post(ofCategory(category, how), how === "promote" ? { reason, force } : { reason });

export const threshold = (category, signal) => json(ofCategory(category, "threshold"), { signal });
export const setThreshold = (category, value, reason) =>
  post(ofCategory(category, "threshold"), { threshold: value, reason }, { method: "PUT" });
export const dropThreshold = (category, reason) =>
  post(ofCategory(category, "threshold"), { reason }, { method: "DELETE" });

export const resetDrift = (category, { reason, anew }) => post(ofCategory(category, "drift", "reset"), { reason, anew });

export function history(category, { before, limit = 48, only = "all", signal } = {}) {
  const query = new URLSearchParams({ limit, only });
  if (before != null) query.set("before", before);
  return json(`${address("v1", category, "history")}?${query}`, { signal });
}

export const historyImage = (category, id, signal) =>
  blob(address("v1", category, "history", String(id), "image"), { signal });
export const historyMap = (category, id, signal) =>
  blob(address("v1", category, "history", String(id), "map"), { signal });
export const mark = (category, id, verdict, note) =>
  post(address("v1", category, "history", String(id), "mark"), { verdict, note });

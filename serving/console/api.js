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
/** {category, newcomers}: what the fleet does of a category, null for nothing, and of new ones. */
export const categoryStatus = async (category, signal) => {
  const { categories, newcomers } = await json(address("fleet", "status"), { signal });
  return { category: categories[category] ?? null, newcomers };
};

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

const FORCIBLE = ["promote", "accept-feedback"];
/** Starts a move: `promote`, `discard`, `roll-back` or `accept-feedback`. */
export const move = (category, how, { reason, force = false }) =>
  post(ofCategory(category, how), FORCIBLE.includes(how) ? { reason, force } : { reason });

const ofVersion = (category, version, ...parts) => ofCategory(category, "versions", String(version), "pictures", ...parts);

export const pictures = async (category, version, signal) => (await json(ofVersion(category, version), { signal })).pictures;
export const picture = (category, version, name, signal) => blob(ofVersion(category, version, name), { signal });

// The images that a category is to be learned from; each answers with all that are there.
export const trainingImages = (category, signal) => json(ofCategory(category, "images"), { signal });
export const sendTrainingImage = (category, file) =>
  json(ofCategory(category, "images"), { method: "POST", headers: typeOf(file), body: file });
export const strikeOut = (category, name) => json(ofCategory(category, "images", name), { method: "DELETE" });
export const trainingImage = (category, name, signal) => blob(ofCategory(category, "images", name), { signal });

/** The searches of a category, of all without one, newest first. */
export const searches = async (category, signal) =>
  (await json(`${address("fleet", "searches")}${category ? `?${new URLSearchParams({ category })}` : ""}`, { signal })).searches;
export const search = (id, signal) => json(address("fleet", "searches", id), { signal });
export const startSearch = (wanted) => post(address("fleet", "searches"), wanted);
export const stopSearch = (id) => json(address("fleet", "searches", id), { method: "DELETE" });

export const threshold = (category, signal) => json(ofCategory(category, "threshold"), { signal });
export const setThreshold = (category, value, reason) =>
  post(ofCategory(category, "threshold"), { threshold: value, reason }, { method: "PUT" });
export const dropThreshold = (category, reason) =>
  post(ofCategory(category, "threshold"), { reason }, { method: "DELETE" });

export const resetDrift = (category, { reason, anew }) => post(ofCategory(category, "drift", "reset"), { reason, anew });

const feedbackOf = (category, ...parts) => address("v1", category, "feedback", ...parts);

export const feedback = async (category, signal) => (await json(`${feedbackOf(category)}?limit=200`, { signal })).feedback;
export const feedbackImage = (category, id, signal) => blob(feedbackOf(category, id, "image"), { signal });
export const withdraw = (category, id) => send(feedbackOf(category, id), { method: "DELETE" });

/** Says what a part was; the file comes along in case the fleet has not kept the image. */
export function giveFeedback(category, said, file) {
  if (!file) return post(feedbackOf(category), said);
  const form = new FormData();
  form.append("feedback", JSON.stringify(said));
  form.append("image", file);
  return json(feedbackOf(category), { method: "POST", body: form });
}

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

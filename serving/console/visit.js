// The images of this visit, by category: kept while the tab is open, whatever page is shown.

import { inspect, Problem } from "./api.js";
import { overlaid, pngOf, readMap } from "./heat.js";

// The map is a few dozen patches a side: more pixels show nothing more.
export const MAP_SIDE = 640;
const THUMB_SIDE = 360;
const DOWNLOAD_SIDE = 1600;
const AT_ONCE = 2;
const MOST_TRIES = 8;

const visits = new Map();
let lastId = 0;

export function visitOf(category) {
  if (!visits.has(category)) visits.set(category, new Visit(category));
  return visits.get(category);
}

/** What whoever signs out leaves behind: nothing. */
export function forgetVisits() {
  for (const visit of visits.values()) visit.clear();
  visits.clear();
}

class Visit {
  constructor(category) {
    this.category = category;
    this.items = [];
    this.version = 0;  // of this list, not of a prompt set: one more for every change
    this._listeners = new Set();
    this._running = 0;
    this._aborter = new AbortController();
  }

  follow(listener) {
    this._listeners.add(listener);
    return () => this._listeners.delete(listener);
  }

  get done() {
    return this.items.filter(({ state }) => state === "done");
  }

  /** Inspects files, a few at once, in order; gives their items. */
  add(files) {
    const added = files.map((file) => ({
      id: (lastId += 1), file, name: file.name || "pasted image", state: "waiting",
      report: null, problem: null, mapPng: null, thumb: "", url: "",
    }));
    this.items = [...this.items, ...added];
    this._changed();
    this._next();
    return added;
  }

  retry(item) {
    Object.assign(item, { state: "waiting", problem: null });
    this._changed();
    this._next();
  }

  clear() {
    this._aborter.abort();
    this._aborter = new AbortController();
    for (const { url, thumb } of this.items) [url, thumb].forEach((each) => each && URL.revokeObjectURL(each));
    this.items = [];
    this._changed();
  }

  _next() {
    while (this._running < AT_ONCE) {
      const item = this.items.find(({ state }) => state === "waiting");
      if (!item) return;
      this._running += 1;
      item.state = "running";
      this._run(item, this._aborter.signal).finally(() => {
        this._running -= 1;
        this._next();
      });
    }
  }

  async _run(item, signal) {
    try {
      item.url ||= URL.createObjectURL(item.file);
      const report = await patiently(() => this._ask(item, signal), signal);
      const { width, height } = await sizeOf(report, item);
      Object.assign(item, { report, width, height, state: "done" });
      this._changed();
      // An image alone is looked at as a whole: its small copy waits until that has been drawn.
      if (this.items.length === 1) await new Promise((done) => setTimeout(done, 500));
      await this._thumb(item);
    } catch (problem) {
      if (signal.aborted) return;
      Object.assign(item, {
        state: "failed",
        problem: problem instanceof Problem ? problem : new Problem({ title: "Not shown", detail: String(problem), remedy: "Try another image." }),
      });
    }
    if (!signal.aborted) this._changed();
  }

  async _ask(item, signal) {
    const report = await inspect(this.category, item.file, { mapSide: MAP_SIDE, signal });
    if (!report.map_png) return report;
    item.mapPng = pngOf(report.map_png);
    delete report.map_png;
    if (await isShown(item.file)) return report;
    // A file that this browser cannot show, such as TIFF: the fleet draws it.
    const drawn = await inspect(this.category, item.file, { mapSide: 2048, drawn: true, signal });
    URL.revokeObjectURL(item.url);
    item.drawn = pngOf(drawn.map_png);
    item.url = URL.createObjectURL(item.drawn);
    item.mapPng = null;
    return report;
  }

  async _thumb(item) {
    const shown = await createImageBitmap(item.drawn ?? item.file, { resizeWidth: Math.min(THUMB_SIDE, item.width), resizeQuality: "medium" });
    const made = await overlaid(shown, await mapOf(item), item.report.threshold, THUMB_SIDE);
    shown.close();
    item.thumb = URL.createObjectURL(made);
  }

  _changed() {
    this.version += 1;
    for (const listener of this._listeners) listener(this.version);
  }
}

/** Kept as a file: as pixels, the maps of a few hundred images would fill the memory of a tablet. */
const mapOf = ({ mapPng }) => mapPng && readMap(mapPng);

/** The overlay of an item as a JPEG file. */
export async function overlayOf(item) {
  const bitmap = await createImageBitmap(item.drawn ?? item.file);
  const made = await overlaid(bitmap, await mapOf(item), item.report.threshold, DOWNLOAD_SIDE);
  bitmap.close();
  return made;
}

const SHOWN = ["image/png", "image/jpeg", "image/bmp", "image/webp"];

/** Whether the browser reads a file; asked of those alone of which that is not known. */
async function isShown(file) {
  if (SHOWN.includes(file.type)) return true;
  return createImageBitmap(file).then((bitmap) => (bitmap.close(), true), () => false);
}

async function sizeOf(report, item) {
  if (report.width) return report;
  const image = new Image();  // an older fleet does not say
  image.src = item.url;
  await image.decode();
  return { width: image.naturalWidth, height: image.naturalHeight };
}

/** The fleet says when to come back if it has too much to do. */
async function patiently(ask, signal) {
  for (let turn = 1; ; turn++) {
    try {
      return await ask();
    } catch (problem) {
      if (![429, 503].includes(problem.status) || !problem.retryAfterS || turn === MOST_TRIES || signal.aborted) throw problem;
      await new Promise((done) => setTimeout(done, 1000 * Math.min(problem.retryAfterS, 10)));
    }
  }
}

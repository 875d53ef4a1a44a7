// Numbers and findings in words.

const LOCALE = "en-GB";
const WHOLE = new Intl.NumberFormat(LOCALE, { maximumFractionDigits: 0 });
const WHEN = new Intl.DateTimeFormat(LOCALE, { dateStyle: "medium", timeStyle: "short" });
const CLOCK = new Intl.DateTimeFormat(LOCALE, { timeStyle: "medium", hour12: false });

export const NONE = "–";

export const score = (value) => (value == null ? NONE : value.toFixed(3));
export const count = (value) => (value == null ? NONE : WHOLE.format(value));
export const percent = (share, digits = 1) => (share == null ? NONE : `${(100 * share).toFixed(digits)} %`);
export const milliseconds = (value) => (value == null ? NONE : `${WHOLE.format(value)} ms`);
/** A length of time. */
export function duration(seconds) {
  if (seconds == null) return NONE;
  if (seconds < 90) return `${WHOLE.format(seconds)} s`;
  return seconds < 5400 ? `${WHOLE.format(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
export const clock = (date) => CLOCK.format(date);

/** A date of the API (ISO 8601, or seconds since 1970) as people write it. */
export function when(value) {
  if (value == null || value === "") return NONE;
  const date = new Date(typeof value === "number" ? 1000 * value : value);
  return Number.isNaN(date.getTime()) ? String(value) : WHEN.format(date);
}

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** A conformal p-value: how many good parts look at least as unusual. `isBeyond`: no calibration image does. */
export function howUsual(pValue, isBeyond) {
  if (pValue == null) return "Too few calibration images to say how usual this is.";
  if (isBeyond) return `No calibration image scores this high: at most about 1 good part in ${count(Math.round(1 / pValue))} does.`;
  if (pValue > 0.4) return "As usual as most good parts.";
  return `About 1 good part in ${count(Math.max(2, Math.round(1 / pValue)))} scores this high.`;
}

/** What a threshold promises. */
export function promise(rate) {
  return rate == null
    ? "The threshold is an estimate: too few calibration images to promise a false-alarm rate."
    : `At most ${+(100 * rate).toFixed(2)} % of good parts are rejected (certified).`;
}

export function because({ is_anomalous: bad, regions }) {
  if (!bad) return "Nothing about it is more unusual than the threshold allows.";
  if (regions.length === 0) return "As a whole it looks unlike the good parts.";
  if (regions.length === 1) return "One area looks unlike the good parts.";
  return `${regions.length} areas look unlike the good parts.`;
}

/** Where a region lies, in thirds of the image. */
export function place({ x, y, width, height }, imageWidth, imageHeight) {
  const third = (position, names) => names[Math.min(2, Math.floor(3 * position))];
  const row = third((y + height / 2) / imageHeight, ["top", "middle", "bottom"]);
  const column = third((x + width / 2) / imageWidth, ["left", "centre", "right"]);
  if (row === "middle" && column === "centre") return "centre";
  return row === "middle" ? column : column === "centre" ? row : `${row} ${column}`;
}

// Anomaly maps as colours: the same tint and outline as the fleet's own overlays (apt_ray/images.py).

// Control points of the "plasma" colour map: even in lightness, readable by colour-blind people.
const RAMP = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];
export const OPACITY = 0.6;

// Small maps are drawn at this size, so that outlines are smooth.
const LEAST_SIDE = 640;

/** An anomaly map, 256 levels a pixel: {width, height, levels}. */
export async function readMap(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.max(1, LEAST_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [Math.round(bitmap.width * scale), Math.round(bitmap.height * scale)];
  const context = canvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height).data;
  const levels = new Uint8Array(width * height);
  for (let i = 0; i < levels.length; i++) levels[i] = pixels[4 * i];
  return { width, height, levels };
}

/** The blob of a PNG file in base64. */
export function pngOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });
}

/** Draws the tint: clear at 0, half way up its colours at the threshold, strongest from twice it on. */
export function drawTint(target, map, threshold) {
  size(target, map);
  const colours = new Uint32Array(256);
  const scale = 1 / 255 / Math.max(2 * threshold, 1e-6);
  for (let level = 0; level < 256; level++) {
    const step = Math.min(1, level * scale);
    const [red, green, blue] = colourAt(step);
    const alpha = Math.round(255 * step ** 1.5);
    colours[level] = ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  }
  const context = target.getContext("2d");
  const image = context.createImageData(map.width, map.height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colours[map.levels[i]];
  context.putImageData(image, 0, 0);
}

/** Outlines what is above the threshold: white within black, which shows on every ground. */
export function drawOutline(target, map, threshold) {
  size(target, map);
  const { width, height, levels } = map;
  const limit = 255 * threshold;
  const context = target.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const reach = Math.max(1, Math.round(Math.min(width, height) / 300));
  const edges = [];
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (levels[i] <= limit) continue;
      const isEdge = (x > 0 && levels[i - 1] <= limit) || (x < width - 1 && levels[i + 1] <= limit)
        || (y > 0 && levels[i - width] <= limit) || (y < height - 1 && levels[i + width] <= limit);
      if (isEdge) edges.push(i);
    }
  }
  for (const [distance, colour] of [[2 * reach, 0xff000000], [reach, 0xffffffff]]) {
    for (const i of edges) {
      const x0 = i % width;
      const y0 = (i - x0) / width;
      for (let y = Math.max(0, y0 - distance); y <= Math.min(height - 1, y0 + distance); y++) {
        for (let x = Math.max(0, x0 - distance); x <= Math.min(width - 1, x0 + distance); x++) {
          const j = y * width + x;
          if (levels[j] <= limit) pixels[j] = colour;
        }
      }
    }
  }
  context.putImageData(image, 0, 0);
}

/** The image with tint and outline, at most `side` pixels long, as a JPEG file. */
export async function overlaid(bitmap, map, threshold, side, opacity = OPACITY) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const drawn = canvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  const context = drawn.getContext("2d");
  context.drawImage(bitmap, 0, 0, drawn.width, drawn.height);
  if (map) {
    const layer = canvas(1, 1);
    drawTint(layer, map, threshold);
    context.globalAlpha = opacity;
    context.drawImage(layer, 0, 0, drawn.width, drawn.height);
    drawOutline(layer, map, threshold);
    context.globalAlpha = 1;
    context.drawImage(layer, 0, 0, drawn.width, drawn.height);
  }
  return new Promise((done) => drawn.toBlob(done, "image/jpeg", 0.85));
}

export function canvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

function size(target, { width, height }) {
  if (target.width !== width) target.width = width;
  if (target.height !== height) target.height = height;
}

function colourAt(step) {
  const position = step * (RAMP.length - 1);
  const index = Math.min(RAMP.length - 2, Math.floor(position));
  return RAMP[index].map((from, channel) =>
    Math.round(from + (position - index) * (RAMP[index + 1][channel] - from)));
}

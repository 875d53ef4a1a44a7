// One image, or several of one size side by side: anomaly map, outlines and regions over it; zoom and pan.

import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../html.js";
import { drawOutline, drawTint, OPACITY } from "../heat.js";
import { useMedia } from "../hooks.js";
import { Icon } from "./icons.js";

const MOST = 16;
const BLINK_MS = 700;

export const MODES = [
  { key: "overlay", label: "Overlay" },
  { key: "side", label: "Side by side" },
  { key: "blink", label: "Blink" },
];

/**
 * `panes`: [{label, src, map, threshold, regions, tinted}] of one image; `width`, `height`: its pixels;
 * `selected`: the index of a region that is looked at; `mode`: as in MODES; `onMode` changes it.
 */
export function Viewer({ name, src, width, height, map, threshold, regions, selected, onSelect, mode, onMode, compared, busy = false }) {
  const [opacity, setOpacity] = useState(OPACITY);
  const [view, setView] = useState({ scale: 1, x: 0.5, y: 0.5 });
  const [isPeeking, setPeeking] = useState(false);
  const isBlinking = mode === "blink";
  const [isOn, setOn] = useState(true);
  const calm = useMedia("(prefers-reduced-motion: reduce)");

  useEffect(() => setView({ scale: 1, x: 0.5, y: 0.5 }), [src]);
  useEffect(() => {
    setOn(true);
    if (!isBlinking || calm) return undefined;
    const timer = setInterval(() => setOn((before) => !before), BLINK_MS);
    return () => clearInterval(timer);
  }, [isBlinking, calm]);

  const isTinted = !isPeeking && (!isBlinking || isOn);
  const shared = { src, width, height, view, setView, opacity, selected, onSelect, name, setPeeking };
  const own = { map, threshold, regions };
  const panes = compared
    ? [{ ...own, label: "Champion" }, { ...compared, label: "Candidate" }]
    : mode === "side"
      ? [{ label: "As sent" }, { ...own, label: "With the map" }]
      : [own];
  const zoom = (factor) => setView((before) => clamped({ ...before, scale: before.scale * factor }));

  return html`<section class="viewer" aria-label="Image" aria-busy=${busy}>
    <div class="viewer-bar">
      <div class="segments" role="group" aria-label="How the map is shown">
        ${MODES.map(({ key, label }) => html`<button key=${key} type="button" aria-pressed=${mode === key && !compared}
          onClick=${() => onMode(key)}>${label}</button>`)}
      </div>
      <label class="slider">
        <span>Map</span>
        <input type="range" min="0" max="1" step="0.02" value=${opacity} aria-label="Opacity of the map"
          aria-valuetext="${Math.round(100 * opacity)} %" onInput=${(event) => setOpacity(Number(event.target.value))} />
      </label>
      <div class="zoom" role="group" aria-label="Zoom">
        <button type="button" aria-label="Zoom out" disabled=${view.scale <= 1} onClick=${() => zoom(1 / 1.6)}>−</button>
        <button type="button" class="fit" aria-label="Fit to the frame" disabled=${view.scale <= 1}
          onClick=${() => setView({ scale: 1, x: 0.5, y: 0.5 })}>${view.scale <= 1 ? "Fit" : `${view.scale.toFixed(1)}×`}</button>
        <button type="button" aria-label="Zoom in" disabled=${view.scale >= MOST} onClick=${() => zoom(1.6)}>+</button>
      </div>
    </div>
    <div class="stage ${panes.length > 1 ? "two" : ""}">
      ${panes.map((pane, index) => html`<${Pane} key=${pane.label ?? "only"} ...${shared} ...${pane}
        isTinted=${isTinted && pane.map} isOutlined=${isTinted} isFirst=${index === 0} />`)}
    </div>
    <p class="viewer-legend">
      <span class="ramp" aria-hidden="true"></span><span>usual to unusual; outlined above the threshold.</span>
      <span class="keys"><kbd>+</kbd> <kbd>−</kbd> zoom, arrows move, hold <kbd>Space</kbd> for the bare image</span>
    </p>
  </section>`;
}

function Pane({ name, src, width, height, map, threshold, regions, label, tone, view, setView, opacity, isTinted, isOutlined, selected, onSelect, setPeeking }) {
  const frame = useRef(null);
  const tint = useRef(null);
  const outline = useRef(null);
  const pointers = useRef(new Map());
  const [box, setBox] = useState({ width: 0, height: 0 });

  useLayoutEffect(() => {
    const follow = () => setBox({ width: frame.current.clientWidth, height: frame.current.clientHeight });
    follow();
    const observer = new ResizeObserver(follow);
    observer.observe(frame.current);
    return () => observer.disconnect();
  }, []);

  useEffect(() => {
    if (!map) return;
    drawTint(tint.current, map, threshold);
    drawOutline(outline.current, map, threshold);
  }, [map, threshold]);

  const plane = useMemo(() => {
    if (!width || !box.width) return null;
    const fit = Math.min(box.width / width, box.height / height);
    const size = { width: width * fit * view.scale, height: height * fit * view.scale };
    // The point of the image that lies in the middle of the frame, kept inside of it.
    const at = (length, room, share) => length <= room ? (room - length) / 2
      : Math.min(0, Math.max(room - length, room / 2 - share * length));
    return { ...size, left: at(size.width, box.width, view.x), top: at(size.height, box.height, view.y), fit };
  }, [width, height, box, view]);

  const pan = (dx, dy) => setView((before) => clamped({ ...before, x: before.x - dx / plane.width, y: before.y - dy / plane.height }));
  const zoomAt = (factor, clientX, clientY) => {
    const edge = frame.current.getBoundingClientRect();
    const [px, py] = [clientX - edge.left, clientY - edge.top];
    setView((before) => {
      const scale = Math.min(MOST, Math.max(1, before.scale * factor));
      const real = scale / before.scale;
      // What lies under the pointer stays there.
      const share = (start, length, p) => (p - start) / length;
      const [x, y] = [share(plane.left, plane.width, px), share(plane.top, plane.height, py)];
      return clamped({
        scale,
        x: x + (box.width / 2 - px) / (plane.width * real),
        y: y + (box.height / 2 - py) / (plane.height * real),
      });
    });
  };

  const down = (event) => {
    if (event.pointerType === "mouse" && event.button !== 0) return;
    pointers.current.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (view.scale > 1 || pointers.current.size > 1) frame.current.setPointerCapture(event.pointerId);
  };
  const moved = (event) => {
    const before = pointers.current.get(event.pointerId);
    if (!before || !plane) return;
    const now = { x: event.clientX, y: event.clientY };
    if (pointers.current.size === 1) {
      if (view.scale > 1) pan(now.x - before.x, now.y - before.y);
    } else {
      const [other] = [...pointers.current].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const apart = (a) => Math.hypot(a.x - other.x, a.y - other.y) || 1;
      zoomAt(apart(now) / apart(before), (now.x + other.x) / 2, (now.y + other.y) / 2);
    }
    pointers.current.set(event.pointerId, now);
  };
  const up = (event) => pointers.current.delete(event.pointerId);
  // Not passive: the page must not scroll under a zoom.
  useEffect(() => {
    const element = frame.current;
    const wheel = (event) => {
      if (!plane || !(event.ctrlKey || event.metaKey || view.scale > 1)) return;
      event.preventDefault();
      zoomAt(Math.exp(-event.deltaY / 300), event.clientX, event.clientY);
    };
    element.addEventListener("wheel", wheel, { passive: false });
    return () => element.removeEventListener("wheel", wheel);
  });
  const key = (event) => {
    const step = 60;
    const edge = frame.current.getBoundingClientRect();
    const middle = [edge.left + edge.width / 2, edge.top + edge.height / 2];
    const act = {
      "+": () => zoomAt(1.6, ...middle), "=": () => zoomAt(1.6, ...middle), "-": () => zoomAt(1 / 1.6, ...middle),
      0: () => setView({ scale: 1, x: 0.5, y: 0.5 }), " ": () => setPeeking(true),
      ...(view.scale > 1 && {
        ArrowLeft: () => pan(step, 0), ArrowRight: () => pan(-step, 0), ArrowUp: () => pan(0, step), ArrowDown: () => pan(0, -step),
      }),
    }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  };

  const stroke = plane && { left: `${plane.left}px`, top: `${plane.top}px`, width: `${plane.width}px`, height: `${plane.height}px` };
  return html`<figure class="pane">
    ${label && html`<figcaption class=${tone ?? ""}>${label}</figcaption>`}
    <div ref=${frame} class="frame ${view.scale > 1 ? "zoomed" : ""}" tabindex="0" role="group"
        aria-label="${[label, name].filter(Boolean).join(": ")}. Plus and minus zoom, arrow keys move, space hides the map."
        onPointerDown=${down} onPointerMove=${moved} onPointerUp=${up} onPointerCancel=${up}
        onDblClick=${(event) => plane && zoomAt(view.scale > 1 ? 1 / view.scale : 3, event.clientX, event.clientY)}
        onKeyDown=${key} onKeyUp=${(event) => event.key === " " && setPeeking(false)} onBlur=${() => setPeeking(false)}>
      <div class="plane" style=${stroke ?? { visibility: "hidden" }}>
        ${src && html`<img src=${src} alt=${name} draggable=${false} class=${plane && plane.fit * view.scale > 4 ? "pixels" : ""} />`}
        ${map && html`<canvas ref=${tint} class="layer" hidden=${!isTinted} style=${{ opacity }} aria-hidden="true" />
          <canvas ref=${outline} class="layer" hidden=${!isOutlined} aria-hidden="true" />`}
        ${width > 0 && isOutlined && (regions ?? []).map((region, index) => html`
          <button key=${index} type="button" tabindex="-1" class="region ${selected === index ? "on" : ""}"
              aria-label="Region ${index + 1}" onClick=${() => onSelect?.(index)}
              style=${{ left: share(region.x, width), top: share(region.y, height), width: share(region.width, width), height: share(region.height, height) }}>
            <span aria-hidden="true">${index + 1}</span>
          </button>`)}
      </div>
    </div>
  </figure>`;
}

const share = (pixels, of) => `${(100 * pixels) / of}%`;

function clamped({ scale, x, y }) {
  const within = (value) => Math.min(1, Math.max(0, value));
  return { scale: Math.min(MOST, Math.max(1, scale)), x: within(x), y: within(y) };
}

// Long tables: only the rows that are seen are in the page.

import { html, useLayoutEffect, useRef, useState } from "../html.js";

const OVERSCAN = 6;

/**
 * A table of rows of one height, `--row` in the stylesheet, scrolled with the page.
 *
 * `columns` are [{key, label, sort, class}]; `row(item, index)` gives the cells.
 * Arrow keys, Home and End move between the rows' links.
 */
export function WindowedTable({ label, columns, items, keyOf, row, sort, onSort }) {
  const body = useRef(null);
  const [shown, setShown] = useState({ first: 0, last: 30, height: 56 });
  const wanted = useRef(null);

  useLayoutEffect(() => {
    const follow = () => {
      const height = parseFloat(getComputedStyle(body.current).getPropertyValue("--row")) || 56;
      const top = body.current.getBoundingClientRect().top;
      const first = Math.max(0, Math.floor(-top / height) - OVERSCAN);
      const last = Math.min(items.length, Math.ceil((innerHeight - top) / height) + OVERSCAN);
      setShown((before) => before.first === first && before.last === last && before.height === height
        ? before : { first, last, height });
    };
    follow();
    addEventListener("scroll", follow, { passive: true });
    addEventListener("resize", follow);
    return () => {
      removeEventListener("scroll", follow);
      removeEventListener("resize", follow);
    };
  }, [items.length]);

  useLayoutEffect(() => {
    if (wanted.current == null) return;
    const link = body.current.querySelector(`[aria-rowindex="${wanted.current + 2}"] a`);
    if (link) {
      wanted.current = null;
      link.focus({ preventScroll: true });
    }
  });

  const move = (event) => {
    const at = event.target.closest?.("[aria-rowindex]");
    if (!at) return;
    const index = Number(at.getAttribute("aria-rowindex")) - 2;
    const to = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: items.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const next = Math.min(items.length - 1, Math.max(0, to));
    wanted.current = next;
    // Into the middle of what is not covered by the head.
    const top = body.current.getBoundingClientRect().top + next * shown.height;
    if (top < 2.5 * shown.height || top > innerHeight - 2 * shown.height) {
      scrollBy({ top: top - innerHeight / 2, behavior: "instant" });
    }
    const link = body.current.querySelector(`[aria-rowindex="${next + 2}"] a`);
    if (link) {
      wanted.current = null;
      link.focus({ preventScroll: true });
    }
  };

  const last = Math.min(shown.last, items.length);
  const first = Math.min(shown.first, last);
  const [sortKey, isDown] = sort.startsWith("-") ? [sort.slice(1), true] : [sort, false];
  return html`<div class="table" role="table" aria-label=${label} aria-rowcount=${items.length + 1} onKeyDown=${move}>
    <div class="table-head" role="rowgroup">
      <div class="tr" role="row" aria-rowindex="1">
        ${columns.map(({ key, label: text, class: className = "", first: startsDown }) => html`
          <div key=${key} role="columnheader" class="th ${className}"
              aria-sort=${sortKey !== key ? "none" : isDown ? "descending" : "ascending"}>
            <button type="button" class="sorter ${sortKey === key ? (isDown ? "down" : "up") : ""}"
              onClick=${() => onSort(sortKey === key ? (isDown ? key : `-${key}`) : startsDown ? `-${key}` : key)}>${text}</button>
          </div>`)}
      </div>
    </div>
    <div ref=${body} class="table-body" role="rowgroup" style=${{ height: `calc(var(--row) * ${items.length})` }}>
      ${items.slice(first, last).map((item, offset) => html`
        <div key=${keyOf(item)} class="tr" role="row" aria-rowindex=${first + offset + 2}
            style=${{ transform: `translateY(calc(var(--row) * ${first + offset}))` }}>
          ${row(item)}
        </div>`)}
    </div>
  </div>`;
}

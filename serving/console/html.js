// The view library: `html` is JSX without a build step. See vendor/README.md.

import { h } from "./vendor/preact/preact.js";
import htm from "./vendor/htm/htm.js";

export { Fragment, render } from "./vendor/preact/preact.js";
export {
  useCallback, useEffect, useId, useLayoutEffect, useMemo, useRef, useState,
} from "./vendor/preact/hooks.js";

export const html = htm.bind(h);

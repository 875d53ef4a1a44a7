// The console: who asks, the bar, and the page at the present address.

import { whenUnauthorized, whoAmI, signWith } from "./api.js";
import { may } from "./hooks.js";
import { html, render, useEffect, useRef, useState } from "./html.js";
import { address, Link, ROOT, useAddress, whereIs } from "./router.js";
import { Icon } from "./components/icons.js";
import { Empty, ProblemMessage } from "./components/messages.js";
import { CategoryPage } from "./pages/category.js";
import { FleetPage } from "./pages/fleet.js";
import { SearchesPage } from "./pages/searches.js";
import { SignIn } from "./pages/sign-in.js";
import { forgetVisits } from "./visit.js";

const THEMES = ["auto", "light", "dark"];
const THEME_ICONS = { auto: "auto", light: "sun", dark: "moon" };

function App() {
  const url = useAddress();
  const where = whereIs(url.pathname);
  // null while it is not known who asks; `problem` is why a token is asked for.
  const [session, setSession] = useState(null);
  const [problem, setProblem] = useState(null);
  const [isAsking, setAsking] = useState(false);
  const isFirst = useRef(true);

  const enter = async (token) => {
    if (token !== undefined) signWith(token);
    try {
      setSession(await whoAmI());
      setAsking(false);
      setProblem(null);
    } catch (found) {
      if (token !== undefined) throw found;
      if (found.status === 401) setAsking(true);
      else setProblem(found);
    }
  };
  useEffect(() => void enter(), []);
  useEffect(() => whenUnauthorized((found) => {
    setSession((before) => {
      if (before) setProblem(found);  // a token that has just ceased to be known
      return null;
    });
    setAsking(true);
  }), []);
  const leave = () => {
    signWith("");
    forgetVisits();
    setSession(null);
    setProblem(null);
    setAsking(true);
  };

  // A new page begins at its heading, for whoever does not see it.
  const pageKey = `${where.page} ${where.category ?? ""}`;
  useEffect(() => {
    if (isFirst.current) isFirst.current = false;
    else document.querySelector("h1")?.focus({ preventScroll: true });
    scrollTo(0, 0);
  }, [pageKey]);

  return html`
    <a class="skip" href="#main">Skip to the content</a>
    <${Bar} session=${session} where=${where} onLeave=${leave} />
    <main id="main" tabindex="-1">
      ${session
        ? html`<${Page} key=${pageKey} where=${where} url=${url} session=${session} />`
        : isAsking
          ? html`<${SignIn} reason=${problem} onToken=${enter} />`
          : problem && html`<div class="narrow"><${ProblemMessage} problem=${problem} onRetry=${() => { setProblem(null); enter(); }} /></div>`}
    </main>`;
}

function Page({ where, url, session }) {
  if (where.page === "fleet") return html`<${FleetPage} session=${session} url=${url} />`;
  if (where.page === "searches") return html`<${SearchesPage} session=${session} />`;
  if (where.page === "category") return html`<${CategoryPage} session=${session} category=${where.category} tab=${where.tab} />`;
  return html`<div class="narrow"><h1 tabindex="-1" class="visually-hidden">Not found</h1>
    <${Empty} title="There is no such page"><${Link} to=${ROOT}>All categories<//><//></div>`;
}

function Bar({ session, where, onLeave }) {
  return html`<header class="bar">
    <${Link} to=${ROOT} class="brand" aria-label="apt-ray, all categories"><img src="${ROOT}console/icon.svg" alt="" width="26" height="26" /><span>apt-ray</span><//>
    <nav aria-label="Console">
      <${Link} to=${ROOT} aria-current=${where.page === "fleet" ? "page" : undefined}>Fleet<//>
      ${session && may(session, "operate") && html`<${Link} to=${address("searches")} aria-current=${where.page === "searches" ? "page" : undefined}>Searches<//>`}
      <a href=${address("docs")}>API</a>
    </nav>
    <div class="bar-end">
      <${ThemeSwitch} />
      ${session?.needs_token && html`<button type="button" class="bare who" onClick=${onLeave} title="Forget the token">
        ${session.name && html`<span class="who-name">${session.name}</span>`}<span>Sign out</span>
      </button>`}
    </div>
  </header>`;
}

function ThemeSwitch() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme ?? "auto");
  const next = () => {
    const chosen = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    document.documentElement.dataset.theme = chosen;
    try {
      localStorage.setItem("apt-ray theme", chosen);
    } catch {
      // No storage: it holds until the page is loaded again.
    }
    setTheme(chosen);
  };
  return html`<button type="button" class="bare square" onClick=${next}
    aria-label="Colours: ${theme === "auto" ? "as the system's" : theme}" title="Colours: ${theme}">
    <${Icon} name=${THEME_ICONS[theme]} size=${18} /></button>`;
}

// What the page shows before its first script gives way at once.
const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);

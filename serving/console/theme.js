// Light or dark, before the first paint: no module, since those run after it.
// The choice is all that the console keeps in the browser.
(() => {
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("apt-ray theme") || "auto";
  } catch {
    // No storage: the system's own scheme, each time.
  }
  document.documentElement.dataset.theme = chosen;
})();

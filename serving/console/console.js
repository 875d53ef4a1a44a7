// The console: a category, a picture, a verdict and why. Everything comes from this server.

const element = (id) => document.getElementById(id);
const percent = (share) => `${100 * Math.min(Math.max(share, 0), 1)}%`;
const decimals = (value) => value.toFixed(3);

let file = null;
let pictures = { overlay: "", original: "" };
let latest = 0;

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  } catch {
    throw { title: "No answer", detail: "The fleet cannot be reached.", remedy: "Try again in a moment." };
  }
  if (response.ok) return response.json();
  if (response.status === 401) element("token-field").hidden = false;
  throw await response.json().catch(() => ({
    title: `The fleet answered ${response.status}`,
    detail: "It gave no reason.",
    remedy: "Try again in a moment.",
  }));
}

async function loadCategories() {
  const select = element("category");
  try {
    const { categories } = await ask("v1");
    select.replaceChildren(...categories.map(({ category }) => new Option(category)));
    const wanted = new URLSearchParams(location.search).get("category");
    if (categories.some(({ category }) => category === wanted)) select.value = wanted;
    select.disabled = false;
    element("token-field").hidden = true;
    complain(null);
    inspect();
  } catch (problem) {
    complain(problem);
  }
}

async function inspect() {
  const category = element("category").value;
  if (!file || !category) return;
  const turn = ++latest;
  element("result").setAttribute("aria-busy", "true");
  try {
    const answer = await ask(`v1/${encodeURIComponent(category)}/inspect?map=overlay`, {
      method: "POST",
      headers: { "Content-Type": file.type || "application/octet-stream" },
      body: file,
    });
    if (turn === latest) {
      complain(null);
      show(answer);
    }
  } catch (problem) {
    if (turn === latest) complain(problem);
  } finally {
    if (turn === latest) element("result").setAttribute("aria-busy", "false");
  }
}

function complain(problem) {
  const message = element("message");
  message.hidden = !problem;
  if (!problem) return;
  const title = document.createElement("b");
  title.textContent = problem.title;
  message.replaceChildren(title, problem.detail, document.createElement("br"), problem.remedy);
  element("answer").hidden = true;
  element("empty").hidden = true;
}

function show(answer) {
  const { anomaly_score: score, threshold, is_anomalous: bad, regions } = answer;
  element("empty").hidden = true;
  element("answer").hidden = false;
  element("banner").className = `banner ${bad ? "bad" : "good"}`;
  element("verdict").textContent = bad ? "Defective" : "Good";
  element("because").textContent = because(answer);

  URL.revokeObjectURL(pictures.original);
  pictures = { overlay: `data:image/png;base64,${answer.map_png}`, original: URL.createObjectURL(file) };
  showPicture("overlay");

  element("fill").style.width = percent(score);
  element("limit").style.left = percent(threshold);
  element("limit-value").textContent = `threshold ${decimals(threshold)}`;
  element("score").textContent = decimals(score);
  element("score-hint").textContent = bad ? "above the threshold" : "not above the threshold";
  element("gauge").setAttribute("aria-label", `Score ${decimals(score)}, threshold ${decimals(threshold)}, of at most 1`);

  element("no-regions").hidden = regions.length > 0;
  element("sure").replaceChildren(...certainty(answer).map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  const spent = Object.values(answer.timings_ms).reduce((sum, part) => sum + part, 0);
  element("facts").textContent =
    `${file.name} · ${answer.category}, version ${answer.version} · backbone ${answer.backbone}` +
    ` · ${Math.round(spent)} ms · request ${answer.request_id}`;

  // Regions are in pixels of the image, whose size is known once the overlay has loaded.
  const image = element("shown");
  image.decode().then(() => {
    element("frame").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    showRegions(regions, image.naturalWidth, image.naturalHeight);
  });
}

function because({ is_anomalous: bad, regions }) {
  if (!bad) return "Nothing about it is more unusual than the threshold allows.";
  if (regions.length === 0) return "As a whole it looks unlike the good parts.";
  return regions.length === 1
    ? "One area looks unlike the good parts."
    : `${regions.length} areas look unlike the good parts.`;
}

function certainty({ p_value: pValue, certified_false_alarm_rate: rate }) {
  const sentences = [];
  if (pValue !== null) {
    sentences.push(`About ${Math.round(100 * pValue)} in 100 good parts look at least this unusual.`);
  }
  sentences.push(
    rate === null
      ? "The threshold is an estimate: too few good pictures were set aside to promise a false-alarm rate."
      : `At most ${+(100 * rate).toFixed(2)} % of good parts are called defective (certified).`,
  );
  return sentences;
}

function showRegions(regions, width, height) {
  const boxes = regions.map((region, index) => {
    const box = document.createElement("div");
    const number = document.createElement("span");
    number.textContent = index + 1;
    box.className = "box";
    box.append(number);
    box.style.left = percent(region.x / width);
    box.style.top = percent(region.y / height);
    box.style.width = percent(region.width / width);
    box.style.height = percent(region.height / height);
    return box;
  });
  element("boxes").replaceChildren(...boxes);
  element("regions").replaceChildren(...regions.map((region, index) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const title = document.createElement("b");
    button.type = "button";
    title.textContent = `${index + 1} · ${place(region, width, height)}`;
    button.append(title, `${region.width} × ${region.height} px, peak ${decimals(region.peak)}`);
    const mark = (on) => () => boxes[index].classList.toggle("on", on);
    for (const event of ["mouseenter", "focus"]) button.addEventListener(event, mark(true));
    for (const event of ["mouseleave", "blur"]) button.addEventListener(event, mark(false));
    item.append(button);
    return item;
  }));
}

function place(region, width, height) {
  const third = (position, names) => names[Math.min(2, Math.floor(3 * position))];
  const row = third((region.y + region.height / 2) / height, ["top", "middle", "bottom"]);
  const column = third((region.x + region.width / 2) / width, ["left", "centre", "right"]);
  return row === "middle" && column === "centre" ? "centre" : `${row} ${column}`;
}

function showPicture(kind) {
  const image = element("shown");
  image.src = pictures[kind];
  image.alt = kind === "overlay"
    ? "The picture, tinted where it is unusual and outlined where it is above the threshold"
    : "The picture as it was sent";
  for (const name of ["overlay", "original"]) {
    element(`show-${name}`).setAttribute("aria-pressed", String(name === kind));
  }
}

function choose(chosen) {
  if (!chosen) return;
  file = chosen;
  const name = document.createElement("b");
  name.textContent = file.name;
  element("drop-text").replaceChildren(name, document.createElement("br"), "Drop or choose another");
  element("again").disabled = false;
  inspect();
}

const drop = element("drop");
for (const event of ["dragenter", "dragover"]) {
  drop.addEventListener(event, () => drop.classList.add("over"));
}
for (const event of ["dragleave", "drop"]) {
  drop.addEventListener(event, () => drop.classList.remove("over"));
}
// A picture may be dropped anywhere: missing the field shall not replace the page by the picture.
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  choose(event.dataTransfer.files[0]);
});
element("file").addEventListener("change", (event) => choose(event.target.files[0]));
element("category").addEventListener("change", inspect);
element("show-overlay").addEventListener("click", () => showPicture("overlay"));
element("show-original").addEventListener("click", () => showPicture("original"));
element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  inspect();
});
element("sign-in").addEventListener("click", () => {
  sessionStorage.setItem("token", element("token").value.trim());
  loadCategories();
});

loadCategories();

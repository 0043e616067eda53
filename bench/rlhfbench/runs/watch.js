// Loads the page again when the run has new records, and keeps what the reader chose: switches, folds, place.
const script = document.currentScript ?? document.querySelector("script[data-version]");
const KEY = "rlhfbench-watch";
const POLL_MS = 2000;

const controls = () => [...document.querySelectorAll("main input, main select")];
const nameOf = (control) => `${control.closest("figure")?.id}/${control.name}/${control.getAttribute("aria-label")}`;

function kept() {
  const values = controls().map((c) => [nameOf(c), c.type === "radio" || c.type === "checkbox" ? (c.checked ? c.value : null) : c.value]);
  const folds = [...document.querySelectorAll("details")].map((d) => d.open);
  return { values: values.filter(([, value]) => value !== null), folds, x: window.scrollX, y: window.scrollY };
}

function choose(control, value) {
  const isButton = control.type === "radio" || control.type === "checkbox";
  if (isButton ? control.checked : control.value === value) return;
  if (isButton) control.checked = true;
  else if (control.tagName === "SELECT" && ![...control.options].some((o) => o.value === value)) return;
  else control.value = value;
  for (const type of ["input", "change"]) control.dispatchEvent(new Event(type, { bubbles: true }));
}

function restore({ values, folds, x, y }) {
  for (const [name, value] of values) {
    const same = controls().filter((c) => nameOf(c) === name);
    const control = same.find((c) => c.type !== "radio" && c.type !== "checkbox") ?? same.find((c) => c.value === value);
    if (control) choose(control, value);
  }
  document.querySelectorAll("details").forEach((fold, i) => (fold.open = folds[i] ?? fold.open));
  window.scrollTo(x, y);
}

while (document.querySelector("[data-chart], table[data-filters]") && document.documentElement.dataset.ready !== "true") {
  await new Promise((done) => setTimeout(done, 20));
}
const saved = sessionStorage.getItem(KEY);
sessionStorage.removeItem(KEY);
if (saved) restore(JSON.parse(saved));
document.documentElement.dataset.watching = "true";

for (;;) {
  await new Promise((done) => setTimeout(done, POLL_MS));
  if (document.hidden) continue;
  try {
    const answer = await fetch("version", { cache: "no-store" });
    if (!answer.ok || (await answer.text()) === script.dataset.version) continue;
    sessionStorage.setItem(KEY, JSON.stringify(kept()));
    location.reload();
    break;
  } catch {
    // The server has ended; it may come back.
  }
}

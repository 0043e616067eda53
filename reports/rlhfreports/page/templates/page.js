// Hands the page's data to Vega and DataTables, makes downloads, and tells the charts of dark mode and print.
const json = (id) => JSON.parse(document.getElementById(id).textContent);
const [columns, specs, files] = [json("page-data"), json("page-specs"), json("page-files")];

// The exports of a library, which the page holds as base64 of gzip.
async function library(id) {
  const packed = await fetch(`data:;base64,${document.getElementById(id).textContent}`);
  const text = await new Response(packed.body.pipeThrough(new DecompressionStream("gzip"))).text();
  const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  return import(url);
}

const decoded = (column) => (Array.isArray(column) ? column : column.codes.map((code) => column.values[code]));
const rowsOf = (table) => {
  const names = Object.keys(table);
  const values = names.map((name) => decoded(table[name]));
  return (values[0] ?? []).map((_, i) => Object.fromEntries(names.map((name, j) => [name, values[j][i]])));
};

const darkMode = window.matchMedia("(prefers-color-scheme: dark)");
const views = [];

async function drawChart(figure) {
  const { spec, data } = specs[figure.dataset.chart];
  const datasets = Object.fromEntries(data.map((name) => [name, rowsOf(columns[name])]));
  const params = spec.params.map((p) => (p.name === "dark" ? { ...p, value: darkMode.matches } : p));
  const actions = { export: true, source: false, compiled: false, editor: false };
  const bind = figure.parentElement.querySelector(".switches");
  const { view } = await vegaEmbed(figure, { ...spec, datasets, params }, { actions, bind, renderer: "svg" });
  figure.querySelector("summary")?.setAttribute("aria-label", "Save this chart as a picture");
  views.push(view);
  if (spec.params.some((p) => p.name === "zoom")) bind.append(zoomButtons(view));
}

// What the wheel and dragging do, for the keyboard and for touch: each button gives the new ends of the x axis.
const ZOOMS = {
  "Zoom in": (low, high) => [low + (high - low) / 4, high - (high - low) / 4],
  "Zoom out": (low, high) => [low - (high - low) / 2, high + (high - low) / 2],
  Earlier: (low, high) => [low - (high - low) / 4, high - (high - low) / 4],
  Later: (low, high) => [low + (high - low) / 4, high + (high - low) / 4],
  Whole: () => null,
};
const button = (text, act) => {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", act);
  return made;
};
function zoomButtons(view) {
  const group = document.createElement("span");
  const move = (ends) => view.signal("zoom_x0", ends(...view.scale("x").domain())).runAsync();
  group.append(...Object.entries(ZOOMS).map(([text, ends]) => button(text, () => move(ends))));
  return group;
}

// A chart that fails leaves the others, and says so.
async function drawCharts() {
  await library("vega-library");
  for (const figure of document.querySelectorAll("[data-chart]")) {
    await drawChart(figure).catch((error) => {
      figure.textContent = "This chart cannot be drawn.";
      console.error(figure.dataset.chart, error);
    });
  }
}

const setDark = (isDark) => {
  document.documentElement.classList.toggle("dark", isDark); // the class that DataTables has its own dark colours for
  views.forEach((view) => view.signal("dark", isDark).run());
};
setDark(darkMode.matches);
darkMode.addEventListener("change", (event) => setDark(event.matches));
// A print is light, and its tables have all their rows and columns: a wide one is made smaller.
const PRINT_PX = 680; // of a page of A4 with margins
const grids = [];
const setPrint = (isPrint) => {
  setDark(!isPrint && darkMode.matches);
  for (const grid of grids) {
    if (grid.page.info().recordsDisplay > PAGE_ROWS) grid.page.len(isPrint ? -1 : PAGE_ROWS).draw();
    grid.table().container().style.zoom = isPrint ? Math.min(1, PRINT_PX / grid.table().node().offsetWidth) : "";
  }
};
window.addEventListener("beforeprint", () => setPrint(true));
window.addEventListener("afterprint", () => setPrint(false));

// A file of a table with the rows that are shown, in their order, on all of its pages.
function download(file, table) {
  const rows = table.rows({ search: "applied", order: "applied" }).indexes().toArray();
  const content = file.head + rows.map((row) => file.rows[row]).join("") + file.foot;
  const url = URL.createObjectURL(new Blob([content], { type: file.media_type }));
  Object.assign(document.createElement("a"), { href: url, download: file.name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

const PAGE_ROWS = 50;
async function makeTables() {
  const { default: DataTable } = await library("tables-library");
  for (const table of document.querySelectorAll("table[data-filters]")) {
    const filters = JSON.parse(table.dataset.filters);
    const numRows = table.tBodies[0].rows.length;
    const headings = [...table.querySelectorAll("thead th")].map((th) => th.textContent);
    const order = (heading) => ({ extend: "order", text: `Sort by ${heading}` });
    const filter = (heading) => ({ extend: "dropdown", text: `Filter ${heading}`, content: ["searchList"] });
    const made = new DataTable(table, {
      order: [],
      pageLength: PAGE_ROWS,
      paging: numRows > PAGE_ROWS,
      searching: true,
      layout: {
        topStart: numRows > PAGE_ROWS ? "pageLength" : null,
        topEnd: numRows > 10 ? "search" : null,
        bottomStart: numRows > 10 ? "info" : null,
        bottomEnd: numRows > PAGE_ROWS ? "paging" : null,
      },
      scrollX: true,
      columnDefs: headings.map((heading, i) => ({
        targets: i,
        columnControl: filters.includes(heading) ? [order(heading), filter(heading)] : [order(heading)],
      })),
      ordering: { indicators: false, handler: false },
    });
    grids.push(made);
    const saves = (files[table.id] ?? []).map((file) => button(file.title, () => download(file, made)));
    document.querySelector(`[data-downloads="${table.id}"]`)?.append(...saves);
  }
}

await Promise.all([drawCharts(), makeTables()]);
document.documentElement.dataset.ready = "true";

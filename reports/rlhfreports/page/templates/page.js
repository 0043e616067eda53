// Hands the page's data to Vega and DataTables, and tells the charts of dark mode and print.
const json = (id) => JSON.parse(document.getElementById(id).textContent);
const [columns, specs] = [json("page-data"), json("page-specs")];

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
}

// A chart that fails leaves the others, and says so.
async function drawCharts() {
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
window.addEventListener("beforeprint", () => setDark(false));
window.addEventListener("afterprint", () => setDark(darkMode.matches));

async function makeTables() {
  const source = document.getElementById("tables-library").textContent;
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const { default: DataTable } = await import(url);
  for (const table of document.querySelectorAll("table[data-filters]")) {
    const filters = JSON.parse(table.dataset.filters);
    const numRows = table.tBodies[0].rows.length;
    const headings = [...table.querySelectorAll("thead th")].map((th) => th.textContent);
    new DataTable(table, {
      order: [],
      pageLength: 25,
      paging: numRows > 25,
      searching: true,
      layout: {
        topStart: numRows > 25 ? "pageLength" : null,
        topEnd: numRows > 10 ? "search" : null,
        bottomStart: numRows > 10 ? "info" : null,
        bottomEnd: numRows > 25 ? "paging" : null,
      },
      scrollX: true,
      columnDefs: [
        { targets: headings.flatMap((h, i) => (filters.includes(h) ? [i] : [])), columnControl: ["order", ["searchList"]] },
        { targets: "_all", columnControl: ["order"] },
      ],
      ordering: { indicators: false, handler: false },
    });
  }
}

await Promise.all([drawCharts(), makeTables()]);
document.documentElement.dataset.ready = "true";

"use strict";

/**
 * Modelled time, entry by entry; the same as `ist_jax.report.runs.modelled_seconds`.
 * @param {ArrayLike<number>} secondsLocal measured seconds of the local steps
 * @param {ArrayLike<number>} bytesSent bytes sent by a worker
 * @param {number} bitsPerSecond bandwidth of a worker's link
 * @returns {number[]} seconds
 */
function modelledSeconds(secondsLocal, bytesSent, bitsPerSecond) {
  return Array.from(secondsLocal, (seconds, i) => Number(seconds) + (8 * bytesSent[i]) / bitsPerSecond);
}

/** The sources of a figure's glyphs, each once. */
function sources(figure) {
  return new Set(figure.renderers.map((renderer) => renderer.data_source));
}

function showBandwidth(figures, bitsPerSecond) {
  for (const source of sources(figures.time)) {
    const { seconds_local, bytes_sent } = source.data;
    source.data = { ...source.data, x: modelledSeconds(seconds_local, bytes_sent, bitsPerSecond) };
  }
  const seconds = ({ dataset }) => modelledSeconds([dataset.secondsLocal], [dataset.bytesSent], bitsPerSecond)[0];
  for (const cell of document.querySelectorAll("[data-seconds-local]")) {
    const own = seconds(cell), digits = { minimumFractionDigits: 2, maximumFractionDigits: 2 };
    cell.firstChild.textContent = own.toLocaleString("en", digits) + " ";
    const ratio = cell.querySelector("small");
    if (ratio) ratio.textContent = Number((own / seconds(cell.parentElement.querySelector("[data-base]"))).toPrecision(3)) + "\u00d7";
  }
  for (const place of document.querySelectorAll(".bandwidth")) place.textContent = bitsPerSecond / 1e9;
}

/** Draws bytes and time along a "Log" or a "Linear" axis. */
function showAxis(figures, kind) {
  const make = (name, values) => new (Bokeh.Models.get(name))(values);
  const log = kind === "Log";
  for (const figure of [figures.exchanged, figures.time]) {
    figure.setv({ x_range: make("DataRange1d", log ? {} : { start: 0 }), x_scale: make(`${kind}Scale`) });
    figure.below[0].ticker = make(log ? "LogTicker" : "BasicTicker", { desired_num_ticks: 5 });
    for (const source of sources(figure)) source.change.emit();
  }
}

/** What a figure draws, a line per point, bar or cell; x and y under the names of their axes. */
function makeTable(figure) {
  const names = { x: figure.below[0].axis_label, y: figure.left[0].axis_label };
  const tables = [...sources(figure)].map(({ data }) => data);
  const columns = [...new Set(tables.flatMap(Object.keys))].filter((name) => !["color", "alpha"].includes(name));
  const rows = tables.flatMap((data) => Array.from(Object.values(data)[0], (_, i) => columns.map((name) => data[name]?.[i] ?? "")));
  const quote = (value) => (typeof value === "number" ? value : `"${value.replaceAll('"', '""')}"`);
  return [columns.map((name) => names[name] ?? name), ...rows].map((row) => row.map(quote).join(",") + "\r\n").join("");
}

async function save(view, name, kind) {
  const text = () => new Blob([makeTable(view.model)], { type: "text/csv" });
  const blob = kind === "CSV" ? text() : await view.export("png").to_blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${name}.${kind.toLowerCase()}`;
  link.click();
  URL.revokeObjectURL(link.href);
}

/** Fades the rectangles of all workers but one; "all" shows every worker. */
function showWorker(figures, names, chosen) {
  for (const name of names) {
    for (const source of sources(figures[name])) {
      const alpha = Array.from(source.data.worker, (w) => (chosen === "all" || w === Number(chosen) ? 1 : 0.1));
      source.data = { ...source.data, alpha };
    }
  }
}

async function start() {
  const items = JSON.parse(document.getElementById("figures").textContent);
  const figures = {}, views = {};
  for (const [name, item] of Object.entries(items)) {
    const manager = await Bokeh.embed.embed_item(item, name);
    views[name] = manager.roots[0];
    figures[name] = views[name].model;
  }
  for (const input of document.querySelectorAll("input[name=bandwidth]")) {
    input.addEventListener("change", () => showBandwidth(figures, Number(input.value)));
  }
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.addEventListener("change", () => showAxis(figures, input.value));
  }
  for (const button of document.querySelectorAll("button[data-chart]")) {
    const { chart, kind } = button.dataset;
    button.addEventListener("click", () => save(views[chart], chart, kind));
  }
  for (const select of document.querySelectorAll("select[data-figures]")) {
    select.addEventListener("change", () => showWorker(figures, select.dataset.figures.split(" "), select.value));
  }
  // the frames' colours are custom properties, read when a figure is painted
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const figure of Object.values(figures)) figure.change.emit();
  });
  // a browser may keep the reader's choices over a reload
  showBandwidth(figures, Number(document.querySelector("input[name=bandwidth]:checked").value));
  const axis = document.querySelector("input[name=axis]:checked");
  if (axis) showAxis(figures, axis.value);
  if (matchMedia("(max-width: 480px)").matches) {
    for (const details of document.querySelectorAll("details")) details.open = false;
  }
  window.figures = figures;
  document.documentElement.dataset.ready = "yes";
}

start();

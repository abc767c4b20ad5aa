"use strict";

/**
 * Modelled time, entry by entry; the same as `ist_jax.costs.link.modelled_seconds`.
 * @param {ArrayLike<number>} computing measured seconds of the local steps
 * @param {ArrayLike<number>} sent bytes sent by a worker
 * @param {ArrayLike<number>} messages the same
 * @param {{bitsPerSecond: number, latency: number}} link of a worker; latency: seconds per message
 * @returns {number[]} seconds
 */
function modelledSeconds(computing, sent, messages, link) {
  return Array.from(computing, (seconds, i) =>
    Number(seconds) + link.latency * messages[i] + (8 * sent[i]) / link.bitsPerSecond);
}

/** What the table says of a cell, as text; the same as `ist_jax.costs.link.Modelled`. */
const MODELLED = {
  seconds: (computing, seconds) => digits(seconds, 2),
  utilisation: (computing, seconds) => digits(seconds ? (100 * computing) / seconds : 100, 1) + "%",
  overlap_saves: (computing, seconds) => digits(Math.min(computing, seconds - computing), 2),
};

function digits(number, many) {
  return number.toLocaleString("en", { minimumFractionDigits: many, maximumFractionDigits: many });
}

/** The sources of a figure's glyphs, each once. */
function sources(figure) {
  return new Set(figure.renderers.map((renderer) => renderer.data_source));
}

/** Draws and writes what is modelled over the link that an input stands for. */
function showLink(figures, { value, dataset: { latency, text } }) {
  const link = { bitsPerSecond: Number(value), latency: Number(latency) };
  for (const source of sources(figures.time)) {
    const { seconds_local, bytes_sent, messages } = source.data;
    source.data = { ...source.data, x: modelledSeconds(seconds_local, bytes_sent, messages, link) };
  }
  const seconds = ({ dataset }) =>
    modelledSeconds([dataset.secondsLocal], [dataset.bytesSent], [dataset.messages], link)[0];
  for (const cell of document.querySelectorAll("[data-seconds-local]")) {
    const own = seconds(cell);
    cell.firstChild.textContent = MODELLED[cell.dataset.modelled](Number(cell.dataset.secondsLocal), own) + " ";
    const ratio = cell.querySelector("small");
    if (ratio) ratio.textContent = Number((own / seconds(cell.parentElement.querySelector("[data-base]"))).toPrecision(3)) + "\u00d7";
  }
  for (const place of document.querySelectorAll(".link")) place.textContent = text;
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
  for (const input of document.querySelectorAll("input[name=link]")) {
    input.addEventListener("change", () => showLink(figures, input));
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
  showLink(figures, document.querySelector("input[name=link]:checked"));
  const axis = document.querySelector("input[name=axis]:checked");
  if (axis) showAxis(figures, axis.value);
  if (matchMedia("(max-width: 480px)").matches) {
    for (const details of document.querySelectorAll("details")) details.open = false;
  }
  window.figures = figures;
  document.documentElement.dataset.ready = "yes";
}

start();

"use strict";

/**
 * Modelled time, entry by entry; the same as `ist_jax.report.runs.modelled_seconds`.
 * @param {ArrayLike<number>} secondsLocal measured seconds of the local steps
 * @param {ArrayLike<number>} bytesSent bytes sent by a worker
 * @param {number} bitsPerSecond bandwidth of a worker's link
 * @returns {number[]} seconds
 */
function modelledSeconds(secondsLocal, bytesSent, bitsPerSecond) {
  return Array.from(secondsLocal, (seconds, i) => seconds + (8 * bytesSent[i]) / bitsPerSecond);
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
  for (const cell of document.querySelectorAll("[data-seconds-local]")) {
    const { secondsLocal, bytesSent } = cell.dataset;
    const [seconds] = modelledSeconds([Number(secondsLocal)], [Number(bytesSent)], bitsPerSecond);
    cell.textContent = seconds.toLocaleString("en", { maximumFractionDigits: seconds < 100 ? 2 : 0 });
  }
  for (const place of document.querySelectorAll(".bandwidth")) place.textContent = bitsPerSecond / 1e9;
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
  const figures = {};
  for (const [name, item] of Object.entries(items)) {
    const manager = await Bokeh.embed.embed_item(item, name);
    figures[name] = manager.roots[0].model;
  }
  for (const input of document.querySelectorAll("input[name=bandwidth]")) {
    input.addEventListener("change", () => showBandwidth(figures, Number(input.value)));
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
  window.figures = figures;
  document.documentElement.dataset.ready = "yes";
}

start();

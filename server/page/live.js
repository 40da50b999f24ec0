// The numbers and the plot of the answer in progress, which stay once it has ended.

import { Plot } from "./plot.js";

const $ = (id) => document.getElementById(id);
const panel = $("live"), plot = new Plot($("plot"));
let reading = null; // what the numbers say

export const percent = (share) => (share == null ? "–" : `${Math.round(100 * share)}%`);
export const rate = (speed) => (speed == null ? "–" : speed < 100 ? speed.toFixed(1) : speed.toFixed(0));

export function clear() {
  reading = null;
  plot.clear();
  show();
}

// One token's reading: {nominal, achieved, tokens}.
export function add(live) {
  reading = plot.add(live);
}

export function show() {
  panel.hidden = !reading;
  if (!reading) return;
  panel.classList.toggle("over", Boolean(reading.over));
  $("speed").textContent = rate(reading.speed);
  $("achieved").textContent = percent(reading.achieved);
  $("set").textContent = percent(reading.nominal);
  plot.draw();
}

// The answer's own means take the place of the last tokens'.
export function end(speed, achieved) {
  if (!reading) return;
  Object.assign(reading, { over: true, speed, achieved: achieved ?? reading.achieved });
  const means = `${rate(speed)} tokens per second and ${percent(reading.achieved)} of weights skipped`;
  $("plot").ariaLabel = `Over ${reading.tokens} tokens: ${means}`;
  show();
}

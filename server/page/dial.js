// The dial: how sparse the next token is. What it is turned to during an answer, the server hears at once.

import { setSparsity } from "./api.js";

const input = document.getElementById("sparsity"), word = document.getElementById("word");
const number = document.getElementById("nominal").firstChild;
const QUIET = 50; // ms that the dial rests before the server is told

// Channels sorted by size, as a Laplace distribution has them: what activations look like, arXiv:2408.14690.
const bars = Array.from({ length: 100 }, (_, i) => {
  const height = 3 + (97 * Math.log(1 - (i + 0.5) / 100)) / Math.log(0.005);
  return `M${i + 0.2} 100v${-height.toFixed(1)}h.6v${height.toFixed(1)}z`;
}).join("");

document.querySelectorAll(".dial path").forEach((path) => path.setAttribute("d", bars));

let answer = null; // {id, sent}: the answer that the dial steers
let timer = 0;
let telling = false; // one PATCH at a time, so that the last value wins
let failed = () => {};

// What is asked for; null where the model has only its dense weights.
export const sparsity = () => (input.disabled ? null : Number(input.value) / 100);

export function start(share, calibrated, onFailure) {
  failed = onFailure;
  input.disabled = !calibrated;
  input.value = calibrated ? Math.round(100 * share) : 0;
  input.addEventListener("input", turned);
  show();
  if (calibrated) return;
  word.dataset.fixed = "";
  word.textContent = "This model has no calibration, so it runs dense. Make one with calibrate.py.";
}

// `running`: the answer in progress, whose id comes with its first chunk; null once it has ended.
export function steer(running) {
  answer = running;
}

export function turn(steps) {
  if (input.disabled) return;
  input.value = Number(input.value) + steps;
  turned();
}

// Tells the server if the dial was moved since it last heard.
export async function tell() {
  const told = answer;
  if (telling || !told?.id || sparsity() === null || told.sent === sparsity()) return;
  telling = true;
  told.sent = sparsity();
  try {
    await setSparsity(told.id, told.sent);
  } catch (error) {
    if (error.status !== 404 && error.status !== 409) failed(error.message); // those two: it has just ended
  }
  telling = false;
  tell();
}

function turned() {
  show();
  clearTimeout(timer);
  timer = setTimeout(tell, QUIET);
}

function show() {
  const { value } = input;
  input.parentElement.style.setProperty("--sparsity", value);
  number.data = value;
  input.setAttribute("aria-valuetext", `${value}%`);
  word.textContent = value === "0" ? "Dense: every weight is read." : `About ${value} of 100 inputs are skipped.`;
}

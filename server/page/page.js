// The chat page: a conversation, and a dial whose sparsity the running answer follows from its next token on.

import { chat, get } from "./api.js";
import * as dial from "./dial.js";
import * as live from "./live.js";
import { render } from "./markdown.js";
import { settings } from "./settings.js";

const $ = (id) => document.getElementById(id);
const scroller = $("scroller"), box = $("message");
const turns = []; // {role, content, article}, in order
let model; // its name, as the server lists it
let running = null; // {abort, id, sent}: the answer in progress

// The conversation

function stamp(name) {
  return $(`${name}-template`).content.firstElementChild.cloneNode(true);
}

function addTurn(role, content) {
  const article = stamp(role);
  const turn = { role, content, article };
  if (role === "user") article.querySelector(".text").textContent = content;
  turns.push(turn);
  $("messages").append(article);
  $("welcome").hidden = true;
  return turn;
}

function cutTurns(length) {
  for (const turn of turns.splice(length)) (turn.form ?? turn.article).remove();
  $("welcome").hidden = turns.length > 0;
}

let pinned = true; // the conversation follows the answer until the reader scrolls up

function follow() {
  if (pinned) scroller.scrollTop = scroller.scrollHeight;
}

scroller.addEventListener("scroll", () => {
  pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 32;
  $("latest").hidden = pinned;
});
$("latest").addEventListener("click", () => {
  pinned = true;
  follow();
});
new ResizeObserver(follow).observe(scroller);

const say = (text) => ($("status").textContent = text);

function showError(text) {
  $("error").hidden = !text;
  $("error").firstElementChild.textContent = text;
  $("retry").hidden = running !== null || (model && !turns.length);
}

// An answer

// Neighbours of one role, as after a failed answer, become one message: many templates want the roles to alternate.
function messages(system) {
  const made = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of turns) {
    if (made.at(-1)?.role === role) made.at(-1).content += `\n\n${content}`;
    else if (content) made.push({ role, content });
  }
  return made;
}

function requestBody() {
  const { system, temperature, tokens, lossless } = settings(), sparsity = dial.sparsity();
  const body = { model, messages: messages(system) };
  if (lossless) body.lossless = true;
  else if (sparsity !== null) body.sparsity = sparsity;
  if (temperature) body.temperature = Number(temperature);
  if (tokens) body.max_tokens = Number(tokens);
  return body;
}

async function answer() {
  const body = requestBody();
  const turn = Object.assign(addTurn("assistant", ""), { thinking: "", began: performance.now(), facts: {} });
  const mine = (running = { abort: new AbortController(), id: null, sent: body.sparsity });
  dial.steer(body.lossless ? null : mine);
  begin();
  try {
    for await (const chunk of chat(body, mine.abort.signal)) read(chunk, turn, mine);
  } catch (error) {
    if (error.name === "AbortError") turn.facts.finish = "stopped";
    else turn.failed = error.message;
  }
  dial.steer((running = null));
  finish(turn);
}

function begin() {
  document.body.classList.add("running");
  $("send").hidden = !($("stop").hidden = false);
  showError("");
  live.clear();
  say("Answering");
  pinned = true;
  follow();
}

function read(chunk, turn, mine) {
  const { delta = {}, finish_reason } = chunk.choices?.[0] ?? {};
  const first = !mine.id;
  mine.id = chunk.id;
  if (first) dial.tell(); // it may have been turned before the answer had a name
  turn.thinking += delta.reasoning_content ?? "";
  turn.content += delta.content ?? "";
  if (turn.content && turn.thinking) turn.thought ??= performance.now();
  if (finish_reason) turn.facts.finish = finish_reason;
  if (chunk.usage) turn.facts.usage = chunk.usage;
  if (chunk.sparsity) {
    live.add(chunk.sparsity);
    turn.facts.tokens = chunk.sparsity.tokens;
    turn.facts.first ??= performance.now();
    turn.facts.last = performance.now();
  }
  turn.frame ||= requestAnimationFrame(() => paint(turn));
}

function paint(turn) {
  turn.frame = 0;
  const details = turn.article.querySelector("details");
  if (turn.thinking) {
    if (details.hidden) details.hidden = !(details.open = true);
    details.lastElementChild.textContent = turn.thinking.trim();
    if (turn.thought && !turn.folded) details.open = !(turn.folded = true);
    const seconds = ((turn.thought ?? performance.now()) - turn.began) / 1000;
    details.firstElementChild.textContent = turn.thought ? `Thought for ${seconds.toFixed(1)} s` : "Thinking";
  }
  render(turn.article.lastElementChild.previousElementSibling, turn.content);
  live.show();
  follow();
}

function finish(turn) {
  cancelAnimationFrame(turn.frame);
  document.body.classList.remove("running");
  if (document.activeElement === $("stop")) box.focus();
  $("send").hidden = !($("stop").hidden = true);
  turn.article.removeAttribute("aria-busy");
  const { finish, usage, tokens, first, last } = turn.facts;
  const speed = tokens > 1 ? (1000 * (tokens - 1)) / (last - first) : null;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  turn.article.querySelector(".facts").textContent = [
    tokens != null && `${usage?.completion_tokens ?? tokens} tokens`,
    speed && `${live.rate(speed)} tokens/s`,
    usage?.achieved_sparsity != null && `${live.percent(usage.achieved_sparsity)} skipped`,
    cached > 0 && `${cached} of ${usage.prompt_tokens} prompt cached`,
    finish === "length" && "cut at max tokens",
    finish === "stopped" && "stopped",
  ].filter(Boolean).join(" · ");
  if (!turns.includes(turn)) return say(""); // a new chat was begun
  live.end(speed, usage?.achieved_sparsity);
  paint(turn);
  if (!turn.content && !turn.thinking) {
    cutTurns(turns.indexOf(turn));
    turn.failed ??= finish === "stopped" ? "Stopped before the first token." : "The answer is empty.";
  }
  say(turn.failed ? "" : turn.content);
  if (turn.failed) showError(turn.failed);
}

function stop() {
  running?.abort.abort();
}

function send(text) {
  if (running || !text.trim()) return false;
  addTurn("user", text.trim());
  answer();
  return true;
}

function regenerate() {
  if (running) return;
  cutTurns(turns.findLastIndex((turn) => turn.role === "user") + 1);
  answer();
}

// Keys and buttons

function grow() {
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 200)}px`;
}

const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

box.addEventListener("input", grow);
box.addEventListener("keydown", (event) => {
  if (!isEnter(event)) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (send(box.value)) box.value = "";
  grow();
});
$("stop").addEventListener("click", stop);
$("retry").addEventListener("click", () => (model ? regenerate() : start()));
$("new").addEventListener("click", () => {
  stop();
  cutTurns(0);
  showError("");
  live.clear();
  box.focus();
});
document.querySelectorAll(".example").forEach((button) => {
  button.addEventListener("click", () => send(button.textContent) && box.focus());
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") stop();
  if (event.altKey && ["ArrowUp", "ArrowDown"].includes(event.key)) {
    event.preventDefault();
    dial.turn(event.key === "ArrowUp" ? 5 : -5);
  }
});

async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here"; // browsers lend the clipboard to https and localhost only
  }
  setTimeout(() => (button.textContent = label), 1200);
}

function edit(turn) {
  const form = (turn.form = stamp("edit")), area = form.querySelector("textarea");
  const close = () => {
    form.replaceWith(turn.article);
    turn.form = null;
    turn.article.querySelector("[data-act=edit]").focus();
  };
  area.value = turn.content;
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !running) close();
    if (isEnter(event) && event.target === area) event.preventDefault(), form.requestSubmit();
  });
  form.querySelector("[data-act=cancel]").addEventListener("click", close);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !area.value.trim()) return;
    cutTurns(turns.indexOf(turn));
    send(area.value);
    box.focus();
  });
  turn.article.replaceWith(form);
  area.style.height = `${Math.min(area.scrollHeight + 2, 300)}px`;
  area.focus();
}

$("messages").addEventListener("click", ({ target }) => {
  const act = target.dataset.act, turn = turns.find(({ article }) => article.contains(target));
  if (act === "copy") copy(turn.content, target);
  if (act === "copy-code") copy(target.closest(".code").querySelector("pre").textContent, target);
  if (act === "edit" && !running) edit(turn);
  if (act === "again" && !running) {
    cutTurns(turns.indexOf(turn));
    box.focus();
    answer();
  }
});

async function start() {
  showError("");
  try {
    const [models, props] = await Promise.all([get("v1/models"), get("props")]);
    model = models.data[0].id;
    $("model").textContent = model;
    $("context").textContent = ` · ${props.n_ctx.toLocaleString("en")} tokens of context`;
    dial.start(props.sparsity, props.calibrated, showError);
  } catch (error) {
    showError(error.message);
    if (error.status === 503) setTimeout(start, 1000); // the model is loading
  }
}

start();

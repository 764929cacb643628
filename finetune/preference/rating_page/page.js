// The flow of the page: what is on screen, what a key means, what is sent. Answers show the next question at once and
// travel to disk behind it (outbox.js); pictures of the next questions are loaded and decoded ahead.
import { Outbox } from "./outbox.js";
import { preferredLanguage, TEXTS } from "./texts.js";
import * as views from "./views.js";

const SHORTEST_VIEW = 150;
const MOST_UNSAVED = 3;
const $ = (id) => document.getElementById(id);
const stage = $("stage");
const outbox = new Outbox(new URLSearchParams(location.search).get("token") ?? "", onState, onTrouble);
const images = new Map();
let language = preferredLanguage();
let state = null;
let queue = [];
let local = freshAnswer();
let busy = false;
let ended = false;
let atEnd = false;
const started = { at: performance.now(), answered: null };

function freshAnswer() {
  return { ranks: [], order: [], equal: false, points: {}, current: 0, flicker: null, since: performance.now() };
}

const texts = () => TEXTS[language];
const question = () => queue[0] ?? null;

async function loadImage(name) {
  const response = await outbox.request(`/api/pictures/${name}`);
  if (!response.ok) throw new Error(await response.text());
  const image = new Image();
  image.src = URL.createObjectURL(await response.blob());
  await image.decode();
  return image;
}

function picture(name) {
  if (!images.has(name)) {
    const loading = loadImage(name);
    loading.catch(() => images.delete(name));
    images.set(name, loading);
  }
  return images.get(name);
}

function forgetOldImages() {
  const wanted = new Set(queue.flatMap((one) => one.pictures));
  for (const [name, loading] of images) {
    if (wanted.has(name) || images.size <= 24) continue;
    images.delete(name);
    loading.then((image) => URL.revokeObjectURL(image.src), () => {});
  }
}

function onState(next, action, unsaved) {
  if (next === null) return reload();
  state = next;
  if (unsaved) return drawProgress();
  const before = question()?.key;
  queue = next.questions;
  queue.flatMap((one) => one.pictures).forEach((name) => picture(name).catch(() => {}));
  forgetOldImages();
  if (action === "undo") say(texts().undone);
  if (before !== question()?.key || !question()) show();
  drawProgress();
}

function onTrouble(error) {
  $("trouble").hidden = error === null;
  if (error) $("trouble").textContent = `${texts().unsaved(outbox.waiting.length)} (${error.message})`;
}

async function reload() {
  const response = await outbox.request("/api/state");
  if (!response.ok) {
    $("trouble").hidden = false;
    $("trouble").textContent = `${texts().refused}: ${await response.text()}`;
    return;
  }
  onState(await response.json(), null, 0);
}

let speaking;
function say(text) {
  $("status").textContent = text;
  $("status").classList.add("visible");
  clearTimeout(speaking);
  speaking = setTimeout(() => $("status").classList.remove("visible"), 1100);
}

function drawProgress() {
  const { answered, skipped, total } = state.progress;
  const unsaved = outbox.waiting.filter((one) => one.action === "answer").length;
  const done = Math.min(answered + unsaved, total);
  started.answered ??= answered;
  $("count").textContent = texts().of(done, total);
  $("bar-fill").style.width = `${(100 * (done + skipped)) / Math.max(total, 1)}%`;
  $("bar").setAttribute("aria-valuemax", total);
  $("bar").setAttribute("aria-valuenow", done);
  const fresh = answered - started.answered;
  const minutes = Math.round(((performance.now() - started.at) / fresh) * (total - done) / 60000);
  $("pace").textContent = fresh >= 5 && total > done ? texts().left_time(minutes) : "";
}

// dataset.question names what is on screen and can be answered; between two questions there is none.
async function show() {
  local = freshAnswer();
  delete stage.dataset.question;
  const current = question();
  atEnd = !current && state.summary !== null && outbox.waiting.length === 0;
  document.documentElement.lang = language;
  $("language").textContent = texts().other;
  $("help-button").textContent = "?";
  $("help-button").setAttribute("aria-label", texts().help);
  $("keys").replaceChildren(...(current ? views.keyHints(hints()) : []));
  $("prompt").textContent = current?.prompt ?? "";
  document.title = `${state.annotator} · Brushwork`;
  if (!current) {
    stage.replaceChildren(atEnd ? views.done(texts(), state.summary, state.progress.skipped, { revisit, undo, finish }) : views.element("p", { textContent: texts().loading }));
    return;
  }
  busy = true;
  try {
    const loaded = await Promise.all(current.pictures.map(picture));
    if (question() !== current) return;
    local = freshAnswer();
    local.ranks = current.pictures.map(() => null);
    drawQuestion(loaded);
  } catch (error) {
    $("trouble").hidden = false;
    $("trouble").textContent = error.message;
  } finally {
    busy = false;
  }
}

async function drawQuestion(loaded) {
  const current = question();
  loaded ??= await Promise.all(current.pictures.map(picture));
  const labels = current.pictures.map((_, position) => texts().picture(position + 1));
  if (local.flicker !== null) stage.replaceChildren(views.flicker(loaded[local.flicker], state.mode === "pair" ? ["←", "→"][local.flicker] : "␣"));
  else if (state.mode === "score") stage.replaceChildren(views.scoring(loaded[0], state.criteria, texts(), setPoint));
  else stage.replaceChildren(views.choices(loaded, state.mode === "pair" ? ["←", "→"] : labels.map((_, position) => String(position + 1)), labels, choose));
  if (state.mode === "rank") views.markRanks(stage, local.ranks);
  views.fitColumns(stage);
  if (state.mode === "score" && local.flicker === null) views.markPoints(stage, local.points, state.criteria[local.current]);
  stage.dataset.question = current.key;
}

function ready() {
  return question() && !busy && !ended && outbox.waiting.length < MOST_UNSAVED && performance.now() - local.since >= SHORTEST_VIEW;
}

function answer(content, marked = [], className = "chosen") {
  if (!ready()) return;
  const current = question();
  stage.querySelectorAll(".picture").forEach((button, position) => button.classList.toggle(className, marked.includes(position)));
  outbox.send("answer", { question: current.key, ms: Math.round(performance.now() - local.since), ...content });
  advance();
}

function advance() {
  busy = true;
  delete stage.dataset.question;
  const delay = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 110;
  const answered = queue.shift();
  setTimeout(() => {
    busy = false;
    if (state && question() !== answered) show();
    drawProgress();
  }, delay);
}

function choose(position) {
  if (state.mode === "pair") answer({ position }, [position]);
  else rank(position);
}

function rank(position) {
  if (busy || position >= local.ranks.length || local.ranks[position] !== null) return;
  const last = local.order.at(-1);
  const place = local.equal && last !== undefined ? local.ranks[last] : local.order.length + 1;
  local.ranks[position] = place;
  local.order.push(position);
  local.equal = false;
  views.markRanks(stage, local.ranks);
}

function takeBackRank() {
  const position = local.order.pop();
  if (position !== undefined) local.ranks[position] = null;
  local.equal = false;
  views.markRanks(stage, local.ranks);
}

function confirmRanking() {
  if (local.ranks.includes(null)) say(texts().rankAll);
  else answer({ ranking: local.ranks });
}

function equalNext() {
  local.equal = true;
  say(texts().equal);
}

function setPoint(name, value) {
  if (!ready()) return;
  local.points[name] = value;
  local.current = state.criteria.indexOf(name);
  const missing = state.criteria.findIndex((one) => !(one in local.points));
  if (missing >= 0) local.current = missing;
  views.markPoints(stage, local.points, state.criteria[local.current]);
  if (missing < 0) answer({ points: local.points });
}

function moveCriterion(step) {
  local.current = (local.current + step + state.criteria.length) % state.criteria.length;
  views.markPoints(stage, local.points, state.criteria[local.current]);
}

function bad() {
  answer({ both_bad: true }, question()?.pictures.map((_, position) => position), "refused");
}

function skip() {
  if (!ready()) return;
  outbox.send("skip", { question: question().key });
  say(texts().skipped);
  advance();
}

function undo() {
  if (ended || outbox.waiting.length >= MOST_UNSAVED) return;
  if (state.progress.answered + state.progress.skipped + outbox.waiting.length === 0) return say(texts().nothingToUndo);
  queue = [];
  delete stage.dataset.question;
  outbox.send("undo", {});
}

function revisit() {
  outbox.send("revisit", {});
}

function finish() {
  ended = true;
  outbox.send("finish", {});
  stage.replaceChildren(views.element("div", { className: "done" }, views.element("h1", { textContent: texts().finished })));
}

function compareInPlace() {
  if (!question() || busy || state.mode === "rank") return;
  if (state.mode === "score") local.flicker = local.flicker === null ? 0 : null;
  else local.flicker = local.flicker === null ? 0 : 1 - local.flicker;
  drawQuestion();
}

function leaveFlicker() {
  if (local.flicker === null) return;
  local.flicker = null;
  drawQuestion();
}

function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  localStorage.setItem("brushwork.language", language);
  show();
  drawProgress();
}

function toggleHelp() {
  if ($("help").open) return $("help").close();
  $("help").replaceChildren(...views.help(texts(), texts().titles[state.mode], [...hints(), [["L"], texts().other], [["?"], texts().help]], () => $("help").close()));
  $("help").showModal();
}

// [keys as printed, meaning, action]
function hints() {
  const t = texts();
  const own = {
    pair: [[["←"], t.left, () => choose(0)], [["→"], t.right, () => choose(1)], [["0"], t.tie, () => answer({ tie: true })], [["X"], t.bad, bad], [["␣"], t.flicker, compareInPlace]],
    rank: [[["1", "…"], t.best, () => {}], [["="], t.equal, equalNext], [["⌫"], t.takeBack, takeBackRank], [["X"], t.allBad, bad], [["↵"], t.confirm, confirmRanking]],
    score: [[["1", "…", "5"], t.titles.score, () => {}], [["↑", "↓"], t.move, () => {}], [["␣"], t.zoom, compareInPlace]],
  };
  return [...own[state.mode], [["S"], t.skip, skip], [["U"], t.undo, undo]];
}

const KEYS = {
  pair: { ArrowLeft: () => choose(0), 1: () => choose(0), ArrowRight: () => choose(1), 2: () => choose(1), 0: () => answer({ tie: true }), ArrowDown: () => answer({ tie: true }), x: bad, " ": compareInPlace, Escape: leaveFlicker },
  rank: { x: bad, "=": equalNext, Backspace: takeBackRank, Enter: confirmRanking },
  score: { ArrowUp: () => moveCriterion(-1), ArrowDown: () => moveCriterion(1), " ": compareInPlace, Escape: leaveFlicker },
};
const COMMON = { s: skip, u: undo, l: switchLanguage, "?": toggleHelp };

function keyAction(name) {
  if (!question()) return atEnd && { r: () => state.progress.skipped && revisit(), u: undo, Enter: finish, l: switchLanguage }[name];
  if (COMMON[name]) return COMMON[name];
  if (/^[1-9]$/.test(name) && state.mode === "rank") return () => rank(Number(name) - 1);
  if (/^[1-5]$/.test(name) && state.mode === "score") return () => setPoint(state.criteria[local.current], Number(name));
  return KEYS[state.mode][name];
}

document.addEventListener("keydown", (event) => {
  if (!state || ended || event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if ($("help").open) {
    if (event.key === "?") toggleHelp();
    return;
  }
  // Enter and Space belong to a focused button; everything else works wherever the focus is.
  if (event.target.closest?.("button") && (event.key === "Enter" || event.key === " ")) return;
  const action = keyAction(event.key.length === 1 ? event.key.toLowerCase() : event.key);
  if (!action) return;
  event.preventDefault();
  action();
});
addEventListener("resize", () => views.fitColumns(stage));
$("language").addEventListener("click", switchLanguage);
$("help-button").addEventListener("click", toggleHelp);

reload().then(() => {
  if (state && outbox.restore(`${state.folder}.${state.annotator}`) && outbox.waiting.length) say(texts().loading);
}, onTrouble);

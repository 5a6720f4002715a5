"use strict";
// The playground: talks to the server that it came from, and to nothing else. All text is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let known = null; // what /v1/emotions says
let key = "";
let turns = []; // {said, reply, feels}
let running = null; // AbortController of what is being written
let last = null; // the last request's body

function make(name, attributes = {}, ...children) {
  const node = ["svg", "rect", "line", "text", "polyline", "title"].includes(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  node.append(...children);
  return node;
}

function tell(text, bad = false) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

// Whether the server has said what it knows: before that there is nothing to send, and the reader is told why.
function ready() {
  if (!known) tell($("key-form").hidden ? "The server has not yet said what it knows. Reload the page if this stays." : "Give the API key first.", true);
  return Boolean(known);
}

async function call(path, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body ? JSON.stringify(body) : undefined, signal });
  if (!answer.ok) {
    const wrong = await answer.json().catch(() => null);
    if (answer.status === 401) $("key-form").hidden = false;
    throw new Error(wrong?.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

// ---- what is felt ---------------------------------------------------------------------------------------------------

function addSliders(box, prefix) {
  for (const [index, emotion] of known.emotions.entries()) {
    const id = `${prefix}-${index}`;
    const input = make("input", { type: "range", id, min: -100, max: 100, step: 5, value: 0 });
    const shown = make("output", { for: id, "aria-live": "off" }, "0"); // the slider itself is read out
    input.addEventListener("input", () => { shown.textContent = input.value; sums(); });
    box.append(make("div", { class: "slider" }, make("label", { for: id }, emotion.name), input, shown));
  }
}

function mixture(prefix) {
  const found = {};
  for (const [index, emotion] of known.emotions.entries()) {
    const value = Number($(`${prefix}-${index}`).value);
    if (value) found[emotion.name] = value;
  }
  return found;
}

const written = (mix) => Object.entries(mix).map(([name, value]) => `${name}:${value}`).join(" + ") || "neutral";

function sums() {
  if (!known) return;
  for (const [prefix, id] of [["mix", "sum"], ["arc", "arc-sum"]]) {
    const mix = mixture(prefix);
    const total = Object.values(mix).reduce((sum, value) => sum + Math.abs(value), 0);
    const over = total > known.most_together;
    $(id).textContent = `${written(mix)}; ${total} of ${known.most_together}${over ? ": more than the text bears, the server weakens it" : ""}`;
    $(id).classList.toggle("over", over);
  }
}

function feels() {
  const from = mixture("mix");
  const found = {};
  if ($("arc-on").checked) {
    found.arc = `${written(from)} -> ${written(mixture("arc"))}`;
    found.arc_tokens = Number($("arc-tokens").value) || known.arc_tokens;
  } else if (Object.keys(from).length) {
    found.mix = from;
  }
  const fade = Number($("fade").value);
  if (fade > 0 && (found.arc || found.mix)) found.fade = fade;
  return found;
}

function bodyFor(messages, felt) {
  const number = (id, usual) => ($(id).value === "" ? usual : Number($(id).value));
  return {
    model: known.model,
    messages,
    ...felt,
    max_tokens: number("max-tokens", known.usual.max_tokens),
    temperature: number("temperature", known.usual.temperature),
    guidance: number("guidance", known.usual.guidance),
    instruction: $("instruction").value,
  };
}

const conversation = (text) => [
  ...turns.flatMap((turn) => [{ role: "user", content: turn.said }, { role: "assistant", content: turn.reply }]),
  { role: "user", content: text },
];

// ---- talking --------------------------------------------------------------------------------------------------------

async function* pieces(body, signal) {
  const answer = await call("/v1/chat/completions", { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield { text: event.choices[0]?.delta.content ?? "", felt: event.emosteer.felt };
    }
  }
}

function showTurn(who, text, kind) {
  const body = make("p", { class: "text" }, text);
  const turn = make("div", { class: `turn ${kind}` }, make("p", { class: "who" }, who), body);
  if (!turns.length && kind === "user") $("log").replaceChildren();
  $("log").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  return { turn, body };
}

function busy(on) {
  for (const id of ["send", "compare"]) $(id).disabled = on;
  $("stop").disabled = !on;
  for (const id of ["undo", "new"]) $(id).disabled = on || !turns.length;
}

async function send() {
  const text = $("say").value.trim();
  if (!text || running || !ready()) return;
  const messages = conversation(text);
  const body = (last = bodyFor(messages, feels()));
  running = new AbortController();
  busy(true);
  tell("Writing");
  $("log").setAttribute("aria-busy", "true"); // a growing reply would be read out from its beginning at every piece
  const mine = showTurn("You", text, "user");
  const theirs = showTurn("…", "", "model");
  let reply = "", felt = "neutral";
  try {
    for await (const piece of pieces(body, running.signal)) {
      reply += piece.text;
      felt = piece.felt === "none" ? "neutral" : piece.felt;
      theirs.body.textContent = reply;
    }
    tell("");
  } catch (error) {
    const stopped = error.name === "AbortError";
    tell(stopped ? "Stopped" : error.message, !stopped);
  }
  running = null;
  $("log").removeAttribute("aria-busy");
  if (reply.trim()) {
    turns.push({ said: text, reply: reply.trim(), nodes: [mine.turn, theirs.turn] });
    theirs.turn.querySelector(".who").textContent = `${known.model}, ${felt}`;
    $("say").value = "";
    busy(false);
    await read(theirs, messages, reply.trim(), body.instruction);
  } else {
    mine.turn.remove();
    theirs.turn.remove();
    busy(false);
  }
}

async function read(place, messages, reply, instruction) {
  try {
    const found = await (await call("/v1/readings", { messages, reply, instruction })).json();
    place.turn.setAttribute("aria-live", "off"); // the reply was read out when it was whole
    place.body.replaceChildren(...shaded(found.tokens));
    place.turn.append(judged(found), plotted(found.tokens), tabled(found.tokens));
  } catch (error) {
    tell(error.message, true);
  }
}

function shaded(tokens) {
  return tokens.map((token) => {
    const node = make("span", { class: "token", title: `${token.surprise.toFixed(1)} nats` }, token.text);
    node.style.setProperty("--surprise", Math.min(token.surprise / 12, 1) / 2);
    return node;
  });
}

function judged(found) {
  const sound = found.sound === false ? "; the text is not sound" : "";
  if (!found.judge) return make("p", { class: "read" }, `No judge read it: ${found.problem}${sound}`);
  const list = make("ul", { class: "bars" });
  for (const [label, share] of Object.entries(found.judge.probabilities ?? {}).sort((a, b) => b[1] - a[1]).slice(0, 4)) {
    const index = known.emotions.findIndex((emotion) => emotion.name === label);
    const bar = make("svg", { width: 60, height: 10, "aria-hidden": "true" }, make("rect", { class: "cell", width: 60, height: 10 }), make("rect", { class: `head s${index < 0 ? 7 : index % 7}`, width: 60 * share, height: 10 }));
    list.append(make("li", {}, bar, ` ${label} ${Math.round(100 * share)} %`));
  }
  return make("div", {}, make("p", { class: "read" }, `Read as ${found.judge.label} by ${found.judge.name}${sound}. Shading: how surprised the plain model is.`), list);
}

function plotted(tokens) {
  const width = 520, height = 130, left = 30, names = known.emotions.map((emotion) => emotion.name);
  const values = tokens.flatMap((token) => Object.values(token.along));
  const high = Math.max(1, ...values), low = Math.min(-1, ...values);
  const x = (place) => left + (place * (width - left - 5)) / Math.max(1, tokens.length - 1);
  const y = (value) => 8 + ((high - value) * (height - 16)) / (high - low);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot", role: "img", "aria-label": `State along each emotion, over ${tokens.length} tokens; the table below has the numbers` });
  svg.append(make("line", { class: "axis", x1: left, x2: width, y1: y(0), y2: y(0) }), make("text", { x: 0, y: y(0) + 4 }, "0"), make("text", { x: 0, y: 12 }, high.toFixed(1)), make("text", { x: 0, y: height - 4 }, low.toFixed(1)));
  for (const [index, name] of names.entries()) svg.append(make("polyline", { class: `s${index % 8}`, points: tokens.map((token, place) => `${x(place)},${y(token.along[name])}`).join(" ") }));
  const legend = make("ul", { class: "legend" });
  for (const [index, name] of names.entries()) legend.append(make("li", {}, make("svg", { width: 14, height: 8, "aria-hidden": "true" }, make("rect", { class: `head s${index % 8}`, width: 14, height: 8 })), ` ${name}`));
  return make("div", {}, make("p", { class: "read" }, "How far the plain model's state lies along each emotion, token by token"), svg, legend);
}

function tabled(tokens) {
  const names = known.emotions.map((emotion) => emotion.name);
  const head = make("tr", {}, ...["token", "surprise", ...names].map((name) => make("th", { scope: "col" }, name)));
  const rows = tokens.map((token) => make("tr", {}, make("td", {}, token.text), make("td", {}, token.surprise.toFixed(1)), ...names.map((name) => make("td", {}, token.along[name].toFixed(2)))));
  return make("details", {}, make("summary", {}, "Numbers"), make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Numbers by token" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
}

// ---- side by side ---------------------------------------------------------------------------------------------------

async function compare() {
  const text = $("say").value.trim() || turns.at(-1)?.said;
  if (running || !ready()) return;
  if (!text) {
    tell("Write a message first, which every emotion then answers.", true);
    return;
  }
  const messages = $("say").value.trim() ? conversation(text) : conversation(text).slice(0, -3).concat({ role: "user", content: text });
  const strongest = Math.max(0, ...Object.values(mixture("mix")).map(Math.abs)) || 75;
  running = new AbortController();
  busy(true);
  tell("Writing under every emotion");
  $("cards").replaceChildren();
  $("sides").hidden = false;
  const signal = running.signal;
  const jobs = [null, ...known.emotions.map((emotion) => emotion.name)].map(async (emotion) => {
    const reply = make("p", {}, "…"), how = make("p", { class: "read" });
    $("cards").append(make("article", { class: "card" }, make("h3", {}, emotion ? `${emotion} ${strongest}` : "neutral"), reply, how));
    const body = bodyFor(messages, emotion ? { mix: { [emotion]: strongest } } : {});
    let whole = "";
    for await (const piece of pieces(body, signal)) reply.textContent = whole += piece.text;
    if (!whole.trim()) return;
    const found = await (await call("/v1/readings", { messages, reply: whole, instruction: body.instruction }, signal)).json();
    const share = found.judge?.probabilities?.[found.judge.label];
    const seen = found.judge ? `read as ${found.judge.label}${share === undefined ? "" : ` (${Math.round(100 * share)} %)`}` : `no judge read it: ${found.problem}`;
    how.textContent = seen + (found.sound === false ? ", not sound" : "");
  });
  const failed = (await Promise.allSettled(jobs)).find((job) => job.status === "rejected")?.reason;
  running = null;
  busy(false);
  tell(failed ? (failed.name === "AbortError" ? "Stopped" : failed.message) : "", failed && failed.name !== "AbortError");
}

// ---- the map --------------------------------------------------------------------------------------------------------

function drawMap() {
  const index = $("map-emotion").selectedIndex, emotion = known.emotions[index];
  const size = Math.max(7, Math.min(14, Math.floor(300 / known.heads))), left = 26, width = left + known.heads * size, height = known.layers * size + 16;
  const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${emotion.heads.length} of ${known.layers * known.heads} heads carry ${emotion.name}, in layers ${Math.min(...emotion.heads.map((head) => head[0]))} to ${Math.max(...emotion.heads.map((head) => head[0]))}` });
  const most = Math.max(...emotion.heads.map((head) => head[2]), 1e-9);
  for (let layer = 0; layer < known.layers; layer++) {
    if (layer % 5 === 0) svg.append(make("text", { x: 0, y: (layer + 1) * size }, String(layer)));
    for (let head = 0; head < known.heads; head++) svg.append(make("rect", { class: "cell", x: left + head * size, y: layer * size, width: size - 1, height: size - 1 }));
  }
  for (const [layer, head, amount] of emotion.heads) svg.append(make("rect", { class: `head s${index % 8}`, opacity: 0.35 + 0.65 * (amount / most), x: left + head * size, y: layer * size, width: size - 1, height: size - 1 }, make("title", {}, `layer ${layer}, head ${head}: ${amount}`)));
  svg.append(make("text", { x: left, y: height - 3 }, "heads →"));
  $("map").replaceChildren(svg, make("p", { class: "hint" }, "Layers from top to bottom. The fuller the colour, the more a head adds."));
}

// ---- copying --------------------------------------------------------------------------------------------------------

function request() {
  return last ?? bodyFor(conversation($("say").value.trim() || "My landlord came by this morning about the lease."), feels());
}

function asCurl() {
  const quoted = JSON.stringify(request(), null, 1).replaceAll("'", "'\\''");
  const auth = known.needs_key ? " -H \"authorization: Bearer $EMOSTEER_API_KEY\"" : "";
  return `curl ${location.origin}/v1/chat/completions -H 'content-type: application/json'${auth} -d '${quoted}'`;
}

function asPython() {
  const { model, messages, max_tokens, temperature, ...rest } = request();
  const python = JSON.stringify; // texts, numbers, lists and objects are the same in both
  return `import os
from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("EMOSTEER_API_KEY", "none"))
reply = client.chat.completions.create(
    model=${python(model)},
    messages=${python(messages)},
    max_tokens=${max_tokens},
    temperature=${temperature},
    extra_body=${python(rest)},
)
print(reply.choices[0].message.content)`;
}

function copy(head, textOf) {
  if (!ready()) return;
  $("copy-head").textContent = head;
  $("copy-text").textContent = textOf();
  $("copy-said").textContent = "";
  $("copy").showModal();
}

// ---- beginning ------------------------------------------------------------------------------------------------------

function showArc() {
  $("arc-box").hidden = !$("arc-on").checked;
}

async function begin() {
  busy(Boolean(running)); // some browsers bring back after a reload how the controls were left
  showArc();
  try {
    known = await (await call("/v1/emotions")).json();
  } catch (error) {
    tell(error.message, true);
    return;
  }
  $("key-form").hidden = true;
  tell("");
  $("model").textContent = known.model;
  for (const [box, prefix] of [["sliders", "mix"], ["arc-sliders", "arc"]]) {
    $(box).replaceChildren();
    addSliders($(box), prefix);
  }
  $("map-emotion").replaceChildren(...known.emotions.map((emotion) => make("option", {}, emotion.name)));
  $("arc-tokens").value = known.arc_tokens;
  $("max-tokens").value = known.usual.max_tokens;
  $("max-tokens").max = known.max_tokens;
  $("temperature").value = known.usual.temperature;
  $("guidance").value = known.usual.guidance ?? 1;
  $("instruction").value = known.instruction;
  sums();
  drawMap();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("compare").addEventListener("click", compare);
$("undo").addEventListener("click", () => {
  const turn = turns.pop();
  turn?.nodes.forEach((node) => node.remove());
  if (turn) $("say").value = turn.said;
  busy(false);
  $("say").focus();
});
$("new").addEventListener("click", () => { turns = []; last = null; $("log").replaceChildren(); busy(false); $("say").focus(); });
$("neutral").addEventListener("click", () => {
  for (const input of document.querySelectorAll(".slider input")) { input.value = 0; input.nextElementSibling.textContent = "0"; }
  sums();
});
$("arc-on").addEventListener("change", showArc);
$("map-emotion").addEventListener("change", drawMap);
$("curl").addEventListener("click", () => copy("As curl", asCurl));
$("python").addEventListener("click", () => copy("As Python", asPython));
$("copy-do").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("copy-text").textContent);
    $("copy-said").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("copy-text"));
    $("copy-said").textContent = "Selected; copy it with the keyboard";
  }
});
$("copy-close").addEventListener("click", () => $("copy").close());
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); key = $("key").value.trim(); begin(); });
begin();

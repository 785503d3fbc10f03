"use strict";
// Draws the page from its embedded data. Text of the data only ever becomes text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const PREVIEW = 300; // tokens of a sample shown at first
const BATCH = 15; // samples shown at first
const number = new Intl.NumberFormat("en-US");
const byId = (id) => document.getElementById(id);
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const plural = (count, noun) => `${number.format(count)} ${noun}${count === 1 ? "" : "s"}`;

function element(tag, attributes = {}, ...children) {
  const node = tag === "svg" || attributes.svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "svg" || value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ---- tokens ---------------------------------------------------------------------------------------------------------

function expand(runs) {
  const values = [];
  for (let i = 0; i < runs.length; i += 2) for (let n = 0; n < runs[i]; n++) values.push(runs[i + 1]);
  return values;
}

// A sample has one part; a pair has its prompt, if both sides share it, and its answers. A unit is what is shown as one:
// a token, or the few that make up one character.
function unitsOf(part) {
  if (part.units) return part.units;
  const weights = expand(part.weights);
  let at = 0;
  part.units = part.pieces.map((index, i) => {
    const [ids, text, special] = data.pieces[index];
    const own = weights.slice(at, at + ids.length);
    const position = part.start + at + (i >= part.gap[0] && part.gap[1] ? part.gap[1] : 0);
    at += ids.length;
    return { ids, text, special, position, weights: own };
  });
  part.text = part.units.map((unit) => unit.text).join("");
  return part.units;
}

// Line ends, tabs and characters that are invisible or reorder text are shown; joiners inside words are left alone.
const HIDDEN = /\n|\t|[\p{Cc}\p{Zl}\p{Zp}\p{Co}]|(?![\u200c\u200d])\p{Cf}/gu;

function visible(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    const char = match[0];
    if (char === "\n") nodes.push(element("i", { class: "nl" }, "\n"));
    else if (char === "\t") nodes.push(element("i", { class: "tab" }, "\t"));
    else nodes.push(element("i", { class: "cc" }, codePoint(char)));
    end = match.index + char.length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

const codePoint = (char) => "U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

function weightClass(weight) {
  return weight === 0 ? "" : weight === 1 ? " w1" : " wx";
}

function tokenSpan(unit, hit) {
  const weight = unit.weights[unit.weights.length - 1];
  const classes = "t" + weightClass(weight) + (unit.special ? " sp" : "") + (hit ? " hit" : "");
  const span = element("span", { class: classes }, ...visible(unit.text === "" ? "∅" : unit.text));
  span.unit = unit;
  return span;
}

function gapNode(text, cut) {
  return element("span", { class: cut ? "gap cut" : "gap" }, text);
}

// Units of a part as one block that the arrow keys walk through: those in the ranges [from, to), ascending.
function tokenBlock(part, ranges, hits = new Set(), showAll = null) {
  const units = unitsOf(part), [before, behind] = part.cut;
  const block = element("div", { class: "tokens", tabindex: "0", role: "group",
    "aria-label": `${capital(part.name || "tokens")}; left and right arrow keys go from one token to the next` });
  const skipped = (from, to) => {
    const tokens = units.slice(from, to).reduce((sum, unit) => sum + unit.ids.length, 0);
    if (tokens) block.append(element("span", { class: "gap" }, `${plural(tokens, "token")} more `,
      element("button", { type: "button", onclick: showAll }, "Show all")));
  };
  if (before) block.append(gapNode(`✂ ${plural(before, "token")} cut off before this`, true));
  let done = 0;
  for (const [from, to] of ranges) {
    skipped(done, from);
    for (let i = from; i < to; i++) {
      if (part.gap[1] && i === part.gap[0]) block.append(gapNode(`${plural(part.gap[1], "token")} left out of this page`));
      if (part.border && units[i].position >= part.border && (i === from || units[i - 1].position < part.border))
        block.append(gapNode(`✂ data.max_length would cut ${units[i].position === part.border ? "here" : "before this"}`, true));
      block.append(tokenSpan(units[i], hits.has(i)));
    }
    done = to;
  }
  skipped(done, units.length);
  if (behind) block.append(gapNode(`✂ ${plural(behind, "token")} cut off here`, true));
  return block;
}

// Of a long part its start, and what surrounds the first match or the first trained token; of a long prompt also its end.
function windowed(part, hits = new Set()) {
  const units = unitsOf(part), holder = element("div");
  const draw = (ranges) => holder.replaceChildren(tokenBlock(part, ranges, hits, () => draw([[0, units.length]])));
  const first = hits.size ? Math.min(...hits) : units.findIndex((unit) => unit.weights.some((weight) => weight !== 0));
  if (units.length <= PREVIEW + 60) draw([[0, units.length]]);
  else if (part.name === "prompt" && !hits.size) draw([[0, 60], [units.length - 120, units.length]]);
  else if (first < PREVIEW - 60) draw([[0, PREVIEW]]);
  else draw([[0, 60], [first - 40, Math.min(units.length, first + PREVIEW - 100)]]);
  return holder;
}

// The parts of a sample, each drawn by `draw`: of a pair the answers side by side.
function partNodes(sample, draw) {
  const node = (part) => !part.name ? draw(part) : element("div", { class: part.name }, element("h3", {}, capital(part.name),
    part.name === "prompt" ? null : element("span", { class: "quiet" }, ` ${part.numbers}`)), draw(part));
  const answers = sample.parts.filter((part) => part.name && part.name !== "prompt");
  const others = sample.parts.filter((part) => !answers.includes(part)).map(node);
  return answers.length ? [...others, element("div", { class: "pair" }, ...answers.map(node))] : others;
}

// ---- what a token is: hover, tap or arrow keys ----------------------------------------------------------------------

const tip = byId("tip");
let current = null;

function select(span) {
  if (current) current.classList.remove("now");
  current = span;
  tip.hidden = !span;
  if (!span) return;
  span.classList.add("now");
  const { ids, text, special, position, weights } = span.unit;
  const trained = weights.some((weight) => weight !== 0);
  const weight = [...new Set(weights)].join(", ");
  const what = (special ? "special token, " : "") + (trained ? "trained on" : "only read");
  const line = (label, value) => element("div", {}, `${label} ${value}`);
  tip.replaceChildren(
    element("div", { class: "mono" }, JSON.stringify(text)),
    line(ids.length > 1 ? "ids" : "id", ids.join(" ")),
    line("weight", `${weight} (${what})`),
    line("position", ids.length > 1 ? `${position} to ${position + ids.length - 1}` : String(position)),
  );
  const box = span.getClientRects()[0] || span.getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
}

document.addEventListener("pointerover", (event) => {
  const span = event.target.closest?.(".t");
  select(span?.unit ? span : null);
});
document.addEventListener("click", (event) => {
  const span = event.target.closest?.(".t");
  if (span?.unit) select(span);
});
document.addEventListener("scroll", () => current?.matches(":hover") || (current && select(null)), { passive: true });
document.addEventListener("focusout", () => select(null));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") select(null);
  const block = document.activeElement;
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  if (!block?.classList.contains("tokens") || !(event.key in steps)) return;
  event.preventDefault();
  const spans = [...block.querySelectorAll(".t")];
  const at = current && block.contains(current) ? spans.indexOf(current) : steps[event.key] > 0 ? -1 : 1;
  const span = spans[Math.max(0, Math.min(spans.length - 1, at + steps[event.key]))];
  span?.scrollIntoView({ block: "nearest" });
  select(span);
});

// ---- headline, attention, sources -----------------------------------------------------------------------------------

function tableNodes({ columns, rows, remarks, total }) {
  const cell = (value) => element("td", {}, ...(Array.isArray(value) ? [value[0], element("small", {}, value[1])] : [value]));
  const row = (values) => element("tr", {}, ...values.map(cell));
  const remark = (text) => element("tr", { class: "remark" }, element("td", { colspan: columns.length }, text));
  return [
    element("thead", {}, element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows.flatMap((values, i) => remarks[i] ? [row(values), remark(remarks[i])] : [row(values)])),
    element("tfoot", {}, ...total.map(row))];
}

function drawTop() {
  for (const node of document.querySelectorAll("[data-rows]")) node.hidden = node.dataset.rows !== data.rows_of;
  byId("subtitle").textContent = data.subtitle;
  byId("headline").append(...data.headline.map(([label, value, note]) => element("div", {},
    element("dt", {}, label), element("dd", { class: "value" }, value), element("dd", { class: "note" }, note))));
  byId("attention").append(...data.attention.map((notice) => element("li", { class: `notice ${notice.level}` },
    element("span", { class: "level" }, { stop: "Error", warn: "Check", info: "Note", good: "Fine" }[notice.level]),
    element("span", { class: "text" }, notice.text,
      notice.fix ? element("span", { class: "fix" }, ` ${notice.fix}`) : null,
      notice.flag && data.flags.some(([name]) => name === notice.flag)
        ? element("span", {}, " ", element("button", { type: "button", class: "plain",
          onclick: () => showOnly(notice.flag) }, `Show ${data.noun}s`)) : null))));
  byId("sources").append(...tableNodes(data.sources));
  const answers = data.answers;
  byId("answers-section").hidden = byId("answers-lengths").hidden = !answers?.table;
  if (!answers?.table) return;
  byId("answers-text").textContent = answers.text;
  byId("answers-table").append(...tableNodes(answers.table));
}

// ---- pictures -------------------------------------------------------------------------------------------------------

const BARS = ["good", "bad"];
const shape = (tag, attributes, ...children) => element(tag, { svg: true, ...attributes }, ...children);

// Bars for each kind of thing, side by side in their buckets; `over` is the length behind which they are coloured.
function drawLengths({ text, edges, kinds, counts, over, limits }, width) {
  const left = 44, bottom = 34, top = 38, height = 260;
  const low = Math.log2(edges[0]), high = Math.log2(edges[edges.length - 1]);
  const x = (length) => left + (width - left - 8) * (Math.log2(length) - low) / (high - low);
  const most = Math.max(1, ...counts.flat());
  const y = (count) => height - bottom - (height - bottom - top) * count / most;
  const svg = element("svg", { width, height, role: "img", "aria-label": text });
  for (const tick of [0, 0.5, 1].map((part) => Math.round(most * part)).filter((v, i, all) => all.indexOf(v) === i)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - 8, y1: y(tick), y2: y(tick) }),
      shape("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, number.format(tick)));
  }
  counts.forEach((ofKind, kind) => ofKind.forEach((count, i) => {
    const [x1, x2] = [x(edges[i]) + 0.5, x(edges[i + 1]) - 0.5], wide = (x2 - x1) / kinds.length;
    const fill = kinds.length > 1 ? BARS[kind] : over !== null && edges[i] > over ? "over" : "bar";
    const bar = shape("rect", { class: fill, x: x1 + kind * wide, width: Math.max(1, wide), y: y(count),
      height: height - bottom - y(count) });
    const tokens = edges[i + 1] - edges[i] > 1 ? `${number.format(edges[i])} to ${number.format(edges[i + 1] - 1)}` : edges[i];
    bar.append(shape("title", {}, `${tokens} tokens: ${plural(count, kinds[kind])}`));
    svg.append(bar);
  }));
  if (kinds.length > 1) kinds.forEach((kind, i) => svg.append(
    shape("rect", { class: BARS[i], x: left + 150 * i, y: 4, width: 12, height: 12 }),
    shape("text", { class: "on", x: left + 150 * i + 18, y: 14 }, `${kind}s`)));
  let last = -99;
  for (let length = 1; length <= edges[edges.length - 1]; length *= 2) {
    if (length < edges[0] || x(length) - last < 40) continue;
    last = x(length);
    svg.append(shape("text", { x: last, y: height - bottom + 16, "text-anchor": "middle" }, number.format(length)));
  }
  svg.append(shape("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle" }, "tokens (log scale)"));
  limits.forEach(([name, value], i) => {
    if (value < edges[0] || value >= edges[edges.length - 1]) return;
    const at = x(value + 1), before = at > width / 2;
    svg.append(shape("line", { class: "limit", x1: at, x2: at, y1: 4 + 15 * i, y2: height - bottom }),
      shape("text", { class: "on", x: at + (before ? -5 : 5), y: 12 + 15 * i, "text-anchor": before ? "end" : "start" },
        `${name} ${number.format(value)}`));
  });
  return svg;
}

function drawPacking(width) {
  const { row_length: length, rows } = data.packing;
  const high = 14, step = 18;
  const svg = element("svg", { width, height: Math.max(1, rows.length * step), role: "img", "aria-label": data.packing.text });
  rows.forEach((row, i) => {
    let at = 0;
    svg.append(shape("rect", { class: "padding", x: 0.5, y: i * step + 0.5, width: width - 1, height: high }));
    for (const segment of row) {
      const bad = ["rejected", "undesirable"].includes(segment.name), other = segment.name === "mismatched";
      const [thick, fill] = other ? [2, "bar"] : bad ? [4, "bad"] : [high - 8, "good"];
      const x = (tokens) => tokens / length * (width - 1) + 0.5;
      const total = segment.runs.reduce((sum, run) => sum + run, 0);
      const group = shape("g", {}, shape("title", {}, `${segment.place}: ${plural(total, "token")}`),
        shape("rect", { class: "segment", x: x(at), y: i * step + 0.5, width: Math.max(0.5, x(at + total) - x(at)), height: high }));
      segment.runs.forEach((run, n) => {
        if (n % 2 && run) group.append(shape("rect", { class: fill, x: x(at), y: i * step + 0.5 + (high - thick) / 2,
          width: Math.max(0.3, x(at + run) - x(at)), height: thick }));
        at += run;
      });
      svg.append(group);
    }
  });
  return svg;
}

function drawChart(id, filled, draw) {
  const available = Math.floor(byId(id).clientWidth);
  if (available > 60 && filled) byId(id).replaceChildren(draw(available));
}

function drawCharts() {
  byId("lengths-title").textContent = data.lengths.title;
  byId("lengths-text").textContent = data.lengths.text;
  byId("packing-text").textContent = data.packing.text;
  drawChart("lengths", data.lengths.edges.length, (width) => drawLengths(data.lengths, width));
  drawChart("answers", data.answers?.edges.length, (width) => drawLengths(data.answers, width));
  drawChart("packing", data.packing.rows.length, drawPacking);
}

// ---- samples --------------------------------------------------------------------------------------------------------

const state = { query: "", source: "", flags: new Set(), shown: BATCH };
const wanted = (sample) => (state.source === "" || String(sample.source) === state.source)
  && [...state.flags].every((flag) => sample.flags.includes(flag));

function haystack(sample) {
  if (sample.search === undefined) {
    sample.parts.forEach(unitsOf);
    sample.search = [...sample.parts.map((part) => part.text), sample.place, sample.key, sample.reason,
      sample.parts.length ? "" : sample.row].join("\n").toLowerCase();
  }
  return sample.search;
}

// Indices of the units that hold a match of the query.
function hitUnits(part) {
  const hits = new Set();
  if (!state.query) return hits;
  const units = unitsOf(part), text = part.text.toLowerCase();
  if (text.length !== part.text.length) return hits; // a letter whose lower case is longer: no places to mark
  let unit = 0, start = 0;
  for (let at = text.indexOf(state.query); at >= 0; at = text.indexOf(state.query, at + 1)) {
    while (unit < units.length && start + units[unit].text.length <= at) start += units[unit++].text.length;
    for (let i = unit, end = start; i < units.length && end < at + state.query.length; i++) {
      hits.add(i);
      end += units[i].text.length;
    }
  }
  return hits;
}

const LOUD = ["dropped", "rejected", "left out", "truncated"];

function sampleCard(sample) {
  const tags = sample.flags.map((flag) => element("span", { class: LOUD.includes(flag) ? "tag loud" : "tag" }, flag));
  const card = element("article", {}, element("header", {},
    element("span", { class: "place" }, sample.place), element("span", { class: "quiet" }, sample.numbers), ...tags));
  const why = [sample.key, sample.reason].filter(Boolean).join(": ");
  if (why) card.append(element("p", { class: "reason" }, ...visible(why)));
  if (sample.notes.length) card.append(element("p", { class: "quiet" }, sample.notes.join("; ")));
  card.append(...partNodes(sample, (part) => windowed(part, hitUnits(part))));
  if (sample.row && sample.parts.length) {
    card.append(element("details", {}, element("summary", {}, "The row in the file"),
      element("pre", { tabindex: "0" }, ...visible(sample.row))));
  } else if (sample.row) card.append(element("pre", { tabindex: "0" }, ...visible(sample.row)));
  return card;
}

function drawSamples() {
  const found = data.samples.filter((sample) => wanted(sample) && (!state.query || haystack(sample).includes(state.query)));
  byId("count").textContent = `${number.format(found.length)} of ${plural(data.samples.length, data.noun)} shown here match`;
  byId("list").replaceChildren(...found.slice(0, state.shown).map(sampleCard));
  byId("more").hidden = found.length <= state.shown;
  byId("more").textContent = `Show ${number.format(Math.min(BATCH, found.length - state.shown))} more`;
  for (const button of byId("filters").children) button.setAttribute("aria-pressed", state.flags.has(button.dataset.flag));
}

function changed() {
  state.shown = BATCH;
  drawSamples();
}

function showOnly(flag) {
  Object.assign(state, { query: "", source: "", flags: new Set([flag]) });
  byId("search").value = byId("source").value = "";
  changed();
  byId("samples").scrollIntoView();
}

function setUpSamples() {
  byId("samples-title").textContent = `${capital(data.noun)}s, token by token`;
  byId("samples-text").textContent = data.samples_text;
  byId("source").append(element("option", { value: "" }, "all"),
    ...data.source_names.map((name, i) => element("option", { value: String(i) }, name)));
  byId("source").parentElement.hidden = data.source_names.length < 2;
  byId("filters").append(...data.flags.map(([flag, count]) => element("button",
    { type: "button", "data-flag": flag, "aria-pressed": "false", onclick: () => {
      state.flags.has(flag) ? state.flags.delete(flag) : state.flags.add(flag);
      changed();
    } }, flag, " ", element("span", { class: "number" }, number.format(count)))));
  byId("search").addEventListener("input", (event) => {
    state.query = event.target.value.toLowerCase();
    changed();
  });
  byId("source").addEventListener("change", (event) => {
    state.source = event.target.value;
    changed();
  });
  byId("borders").addEventListener("change", (event) => document.body.classList.toggle("borders", event.target.checked));
  byId("more").addEventListener("click", () => {
    state.shown += BATCH;
    drawSamples();
  });
  drawSamples();
}

// ---- packed rows, marks, tokenizer ----------------------------------------------------------------------------------

function drawRest() {
  byId("rows-section").hidden = !data.rows.length;
  byId("rows").append(...data.rows.map((row) => {
    const details = element("details", {}, element("summary", {}, row.title));
    details.addEventListener("toggle", () => { // drawn when it is opened: a row has thousands of tokens
      if (details.open && details.children.length === 1) {
        details.append(...row.samples.flatMap((sample) => [
          element("div", { class: "segment-head" }, `${sample.place} · ${sample.numbers}`),
          ...partNodes(sample, (part) => tokenBlock(part, [[0, unitsOf(part).length]]))]));
        if (row.padding) details.append(gapNode(`${plural(row.padding, "place")} of padding`));
      }
    });
    return element("article", {}, details);
  }));
  byId("marks-text").textContent = data.marks.text;
  byId("marks").append(...data.marks.rows.map((row) => {
    const { ours, theirs } = row, other = unitsOf(theirs);
    const hits = new Set(unitsOf(ours).flatMap((unit, i) => String(unit.weights) === String(other[i].weights) ? [] : [i]));
    const side = (title, part) => element("div", {}, element("h3", {}, title), windowed(part, hits));
    return element("article", {}, element("header", {}, element("span", { class: "place" }, row.place),
      element("span", { class: "quiet" }, `${plural(row.differ, "token")} marked differently`)),
    element("div", { class: "pair" }, side("Trained on here", ours), side("Marked by the template", theirs)));
  }));
  byId("tokenizer").append(...data.tokenizer.facts.flatMap(([name, value]) => [element("dt", {}, name),
    element("dd", {}, ...visible(value))]));
  byId("template-details").hidden = !data.tokenizer.template;
  byId("template").append(data.tokenizer.template);
}

drawTop();
drawCharts();
setUpSamples();
drawRest();
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== lastWidth) drawCharts();
  lastWidth = innerWidth;
});

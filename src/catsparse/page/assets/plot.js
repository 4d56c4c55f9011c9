// One chart: axes, marks, read-outs by pointer and by keys, and the same numbers as a table.

const WARPS = {
  linear: () => (v) => v,
  log: () => (v) => Math.log2(v),
  symlog: (axis) => (v) => Math.sign(v) * Math.log1p(Math.abs(v) / axis.unit),
};

function scaleOf(axis, from, to) {
  const warp = WARPS[axis.kind || "linear"](axis);
  const [low, high] = axis.domain.map(warp);
  return (value) => from + ((warp(value) - low) / (high - low || 1)) * (to - from);
}

/** Round steps over a domain, about `wanted` of them. */
function steps([low, high], wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
    found.push(k * step);
  }
  return found;
}

function powers([low, high], wanted) {
  const found = [];
  for (let k = Math.ceil(Math.log10(low)); 10 ** k <= high; k++) found.push(10 ** k);
  if (found.length < 3) {
    return found.flatMap((v) => [v / 5, v / 2, v, 2 * v, 5 * v])
      .filter((v, i, all) => v >= low && v <= high && all.indexOf(v) === i);
  }
  const every = Math.ceil(found.length / Math.max(1, wanted));
  return found.filter((_, k) => k % every === 0);
}

function ticksOf(axis, wanted) {
  if (typeof axis.ticks === "function") return axis.ticks(wanted * 70);
  if (axis.ticks) return axis.ticks.filter((v) => v >= axis.domain[0] && v <= axis.domain[1]);
  return axis.kind === "log" ? powers(axis.domain, wanted) : steps(axis.domain, wanted);
}

const MARKERS = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  square: (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
  triangle: (r) => `M0,${-r * 1.15}L${r * 1.1},${r * 0.85}H${-r * 1.1}z`,
  diamond: (r) => `M0,${-r * 1.3}L${r * 1.3},0L0,${r * 1.3}L${-r * 1.3},0z`,
  cross: (r) => `M${-r},${-r}L${r},${r}M${r},${-r}L${-r},${r}`,
  down: (r) => `M0,${r * 1.15}L${r * 1.1},${-r * 0.85}H${-r * 1.1}z`,
};
const MARKER_NAMES = Object.keys(MARKERS);

function marker(shape, x, y, kind, r = 4) {
  return draw("path", { d: MARKERS[shape](r), transform: `translate(${x},${y})`, class: `mark ${kind}` });
}

/** A short piece of a line with its marker, for legends. */
function swatch(kind, { dash = null, shape = null, line = true, hollow = false } = {}) {
  const icon = draw("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" });
  if (line) icon.append(draw("path", { d: "M1,6H25", class: `path ${kind}`, "stroke-dasharray": dash }));
  if (shape) icon.append(marker(shape, 13, 6, `${kind}${hollow ? " hollow" : ""}`, 3.5));
  return icon;
}

/** A rectangle for legends. */
function block(kind) {
  return draw("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" },
    draw("rect", { x: 5, y: 1, width: 16, height: 10, class: kind }));
}

const charts = [];

/** An empty chart with its heading; `show` fills it. */
function chart(parent, title, hint = null) {
  const canvas = make("div", { class: "canvas" });
  const heading = make("h3", {}, title);
  const legend = make("ul", { class: "legend" });
  const live = make("p", { class: "unseen", "aria-live": "polite" });
  const table = make("details", {}, make("summary", {}, "Numbers as a table"));
  const element = make("figure", { class: "figure" },
    make("div", { class: "figure-head" }, heading),
    hint && make("p", { class: "hint" }, hint), legend, canvas, live, table);
  parent.append(element);
  const it = { element, canvas, heading, legend, live, table, spec: null, active: null, width: 0 };
  table.addEventListener("toggle", () => fillTable(it));
  charts.push(it);
  new ResizeObserver(() => {
    if (it.spec && Math.abs(canvas.clientWidth - it.width) > 1) redraw(it);
  }).observe(canvas);
  return it;
}

function show(it, spec) {
  it.spec = spec;
  redraw(it);
  fillTable(it);
}

function legends(it, entries) {
  it.legend.replaceChildren(...entries.map(([icon, text]) => make("li", {}, icon, text)));
}

function fillTable(it) {
  if (!it.table.open || !it.spec) return;
  const { head, rows } = it.spec.table();
  const line = (cells, tag, scope) =>
    make("tr", {}, ...cells.map((cell) => make(tag, { scope }, String(cell))));
  const old = it.table.querySelector(".scroll");
  const fresh = make("div", { class: "scroll", tabindex: 0, role: "region",
    "aria-label": `Table: ${it.spec.label}` },
    make("table", {}, make("thead", {}, line(head, "th", "col")),
      make("tbody", {}, ...rows.map((row) => line(row, "td", null)))));
  if (old) {
    const { scrollTop } = old;
    old.replaceWith(fresh);
    fresh.scrollTop = scrollTop;
  } else it.table.append(fresh);
}

function redraw(it, forced = 0) {
  const { spec } = it;
  const width = forced || it.canvas.clientWidth || 640;
  it.width = width;
  const height = (spec.height || 300) * (forced ? 0.75 : 1);
  const box = { left: spec.left || 48, right: width - 14, top: spec.y.title ? 30 : 16,
    bottom: height - (spec.x.title ? 42 : 24) };
  const x = scaleOf(spec.x, box.left, box.right);
  const y = scaleOf(spec.y, box.bottom, box.top);
  const had = it.svg === document.activeElement;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "group",
    "aria-roledescription": "chart", "aria-label": `${spec.label}. Arrow keys read it out.` });
  const place = { x, y, box, width, height };
  svg.append(axes(spec, place));
  // Marks end at the axes; what stands for a point may reach over them.
  const clip = `clip${charts.indexOf(it)}`;
  svg.append(draw("clipPath", { id: clip }, draw("rect", { x: box.left, y: box.top - 6,
    width: Math.max(0, box.right - box.left), height: box.bottom - box.top + 6 })));
  const inside = draw("g", { "clip-path": `url(#${clip})` });
  const over = draw("g");
  svg.append(inside, over);
  spec.draw({ ...place, inside, over });
  it.place = place;
  it.ring = draw("circle", { r: 7, class: "ring", visibility: "hidden" });
  svg.append(it.ring);
  it.tip = make("div", { class: "tip", "aria-hidden": "true", hidden: true });
  it.svg = svg;
  it.canvas.replaceChildren(svg, it.tip);
  listen(it);
  if (had) svg.focus({ preventScroll: true });
  else if (it.active !== null) unpoint(it);
}

function axes(spec, { x, y, box }) {
  const group = draw("g", { "aria-hidden": "true" });
  const wide = box.right - box.left;
  const text = (at, word, extra) => draw("text", { ...at, ...extra }, word);
  for (const tick of ticksOf(spec.y, (box.bottom - box.top) / 36)) {
    group.append(draw("line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick), class: "grid" }),
      text({ x: box.left - 8, y: y(tick) + 4 }, spec.y.format(tick), { "text-anchor": "end" }));
  }
  for (const tick of ticksOf(spec.x, wide / 70)) {
    group.append(draw("line", { x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4, class: "base" }),
      text({ x: x(tick), y: box.bottom + 18 }, spec.x.format(tick), { "text-anchor": "middle" }));
  }
  group.append(draw("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "base" }));
  if (spec.y.title) group.append(text({ x: 0, y: 11 }, spec.y.title, { class: "title" }));
  if (spec.x.title) {
    group.append(text({ x: box.right, y: box.bottom + 37 }, spec.x.title, { "text-anchor": "end", class: "title" }));
  }
  return group;
}

/** `items`: what can be read out, each {x, y, series, lines}; lines[0] is its heading. */
function point(it, index, spoken) {
  const item = it.spec.items[index];
  if (!item) return;
  it.active = index;
  const { x, y, width, height } = it.place;
  const [px, py] = [x(item.x), clamp(y(item.y), it.place.box.top, it.place.box.bottom)];
  it.ring.setAttribute("cx", px);
  it.ring.setAttribute("cy", py);
  it.ring.setAttribute("visibility", "visible");
  it.tip.hidden = false;
  const [first, ...rest] = item.lines;
  it.tip.replaceChildren(make("b", {}, first), ...rest.map((line) => make("span", {}, line)));
  const scale = it.canvas.clientWidth / width;
  const [tw, th] = [it.tip.offsetWidth, it.tip.offsetHeight];
  const left = px * scale + 14 + tw > it.canvas.clientWidth ? px * scale - 14 - tw : px * scale + 14;
  it.tip.style.left = `${clamp(left, 0, Math.max(0, it.canvas.clientWidth - tw))}px`;
  it.tip.style.top = `${clamp(py * scale - th / 2, 0, Math.max(0, height * scale - th))}px`;
  if (spoken) it.live.textContent = item.lines.join(", ");
}

function unpoint(it) {
  it.active = null;
  it.tip.hidden = true;
  it.ring.setAttribute("visibility", "hidden");
}

function nearest(it, event) {
  const bounds = it.svg.getBoundingClientRect();
  const scale = it.place.width / bounds.width;
  const [mx, my] = [(event.clientX - bounds.left) * scale, (event.clientY - bounds.top) * scale];
  const { x, y } = it.place;
  const away = (item) => (x(item.x) - mx) ** 2 + (it.spec.columns ? 0 : (y(item.y) - my) ** 2);
  let best = 0;
  it.spec.items.forEach((item, k) => {
    if (away(item) < away(it.spec.items[best])) best = k;
  });
  return best;
}

/** The item that an arrow key leads to: along a series, or to the nearest of the next one. */
function neighbour(items, at, key) {
  const here = items[at];
  const along = { ArrowRight: 1, ArrowLeft: -1 }[key];
  if (along) return items[at + along]?.series === here.series ? at + along : at;
  if (key === "Home") return items.findIndex((item) => item.series === here.series);
  if (key === "End") return items.findLastIndex((item) => item.series === here.series);
  const names = [...new Set(items.map((item) => item.series))];
  const next = names[names.indexOf(here.series) + (key === "ArrowDown" ? 1 : -1)];
  let best = at;
  items.forEach((item, k) => {
    if (item.series !== next) return;
    const nearer = Math.abs(item.x - here.x) < Math.abs(items[best].x - here.x);
    if (items[best].series !== next || nearer) best = k;
  });
  return best;
}

function listen(it) {
  const { svg } = it;
  if (!it.spec.items.length) return;
  svg.addEventListener("pointermove", (event) => point(it, nearest(it, event), false));
  svg.addEventListener("pointerdown", (event) => point(it, nearest(it, event), false));
  svg.addEventListener("pointerleave", () => unpoint(it));
  svg.addEventListener("focus", () => point(it, Math.min(it.active ?? 0, it.spec.items.length - 1), true));
  svg.addEventListener("blur", () => unpoint(it));
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") unpoint(it);
    if (!/^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(event.key)) return;
    event.preventDefault();
    point(it, it.active === null ? 0 : neighbour(it.spec.items, it.active, event.key), true);
  });
}

/** A path through points [x, y]. */
function line(points, x, y) {
  return points.map(([a, b], k) => `${k ? "L" : "M"}${x(a).toFixed(2)},${y(b).toFixed(2)}`).join("");
}

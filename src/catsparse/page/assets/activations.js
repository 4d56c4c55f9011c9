// Histograms with the thresholds that the slider moves.

/** A layer's thresholds: at the slider, or as saved. */
function levelOf(layer, at = state.at) {
  const of = DATA.levels.sites[layer];
  return { scalar: of.scalar[at], low: of.low[at], middle: of.middle[at], high: of.high[at],
    sparsity: of.sparsity[at] };
}

const perNeuron = () => DATA.levels.sites.some(({ low, high }) => low.some((v, k) => v !== high[k]));
const ownThresholds = (layer) => DATA.levels.sites[layer].low.some((v, k) => v !== DATA.levels.sites[layer].high[k]);
const AXES = { gate: "|act(gate)|", product: "|g u| ‖w_down‖, foretold", input: "|x|" };
const axisWord = () => AXES[LAYERS[state.layer].axis];
const unitWord = (layer) => (LAYERS[layer].axis === "input" ? "inputs" : "neurons");

/** Share of neurons whose threshold lies above `value`: by the 10th, 50th and 90th percentile. */
function shareAbove(level, value) {
  if (level.middle === null) return 0;
  if (level.low === level.high) return value < level.middle ? 1 : 0;
  const at = Math.log2(value);
  const [low, middle, high] = [level.low, level.middle, level.high].map((v) => Math.log2(v));
  const share = at < middle ? 0.5 + (0.4 * (middle - at)) / (middle - low || 1)
    : 0.5 - (0.4 * (at - middle)) / (high - middle || 1);
  return clamp(share, 0, 1);
}

/** A layer's bars: {from, to, share, height}, height a share an octave, what a log axis shows. */
function barsOf(layer) {
  const { edges, shares } = DATA.histograms;
  const bars = shares[layer].map((share, k) => {
    const to = edges[k + 1];
    const from = Math.max(edges[k], to / 2);  // the first may begin at 0
    return { from, to, share, height: share / Math.log2(to / from) };
  });
  return bars;
}

function activations() {
  const section = byId("activations");
  if (DATA.histograms === null) {
    howTo(section, "The folder was saved without its calibration's statistics, so there are no " +
      "histograms. Calibrate the dense model again:", "catsparse sparsify MODEL -o FOLDER");
    return;
  }
  const words = paragraph("");
  section.append(words);
  const select = make("select", { id: "layer" },
    ...LAYERS.map((layer, k) => make("option", { value: k }, `${layer.short} · ${layer.name}`)));
  select.addEventListener("change", () => change({ layer: Number(select.value) }));
  section.append(make("div", { class: "pickers" }, make("label", {}, "Layer ", select)));
  const it = chart(section, "");
  legends(it, [
    [block("kept"), "kept"], [block("dropped"), perNeuron() ? "dropped, by the share of neurons" : "dropped"],
    [swatch("rule"), "threshold at the slider"],
    ...(perNeuron() ? [[block("band"), "10th to 90th percentile of neurons"]] : []),
    [swatch("saved"), "as saved"],
  ]);
  follow(() => {
    words.textContent = intro();
    select.value = state.layer;
    it.heading.textContent = headline();
    show(it, histogram(state.layer));
  });
  minis(section);
}

function intro() {
  const { tokens } = DATA.calibration ?? { tokens: null };
  const on = tokens ? ` over ${WHOLE.format(tokens)} calibration tokens` : "";
  const { axis, scalar } = LAYERS[state.layer];
  const one = axis === "input" ? "An input" : "A neuron";
  const many = ownThresholds(state.layer)
    ? `Each has a threshold of its own, all from one number in the file (${scalar}): ` +
      "the line is their median, the shade goes from the 10th to the 90th percentile."
    : `The line is the layer's one threshold, ${scalar}.`;
  return `How large ${axisWord()} is in one layer${on}. ${one} is dropped where it is at most its ` +
    `threshold. ${many}`;
}

function headline() {
  const level = levelOf(state.layer);
  const { short: name, method } = LAYERS[state.layer];
  if (level.middle === null) return `Layer ${name}: all ${unitWord(state.layer)} are kept`;
  const word = level.low === level.high ? "threshold" : "median threshold";
  const letter = { chess: "√T", energy: "T", wina: "T" }[method];
  return `Layer ${name}: ${percent(level.sparsity)} dropped, ${word} ${short(level.middle)}` +
    (letter ? `, ${letter} = ${short(level.scalar)}` : "");
}

function histogram(layer) {
  const bars = barsOf(layer);
  const level = levelOf(layer);
  const { saved } = LAYERS[layer];
  const highest = Math.max(...bars.map((bar) => bar.height));
  const [below, above] = [DATA.histograms.below[layer], DATA.histograms.above[layer]];
  let under = below;
  const items = bars.map((bar) => {
    under += bar.share;
    return { x: Math.sqrt(bar.from * bar.to), y: bar.height, series: 0, lines: [
      `${short(bar.from)} to ${short(bar.to)}`, `${percent(bar.share, 2)} of activations`,
      `${percent(Math.min(under, 1))} up to here`,
      `dropped in ${percent(shareAbove(level, Math.sqrt(bar.from * bar.to)), 0)} of ${unitWord(layer)}`] };
  });
  return {
    label: `Histogram of ${axisWord()} in layer ${LAYERS[layer].short}`,
    height: 320,
    columns: true,
    x: { kind: "log", domain: [bars[0].from, bars.at(-1).to], format: (v) => short(v, 2), title: `${axisWord()}, log scale` },
    y: { domain: [0, highest * 1.05], format: (v) => percent(v, 0), title: "share of activations, an octave" },
    items,
    draw: ({ x, y, inside, over, box }) => {
      for (const bar of bars) tint(inside, bar, level, x, y);
      if (level.middle !== null && level.low !== level.high) {
        inside.append(draw("rect", { x: x(level.low), width: Math.max(0, x(level.high) - x(level.low)),
          y: box.top, height: box.bottom - box.top, class: "band" }));
      }
      upright(inside, saved.middle, x, box, "saved");
      upright(inside, level.middle, x, box, "rule");
      if (level.middle === null) return;
      // Beside the shade, on the side where there is room.
      const right = x(level.high) < (box.left + 2 * box.right) / 3;
      const at = clamp(x(right ? level.high : level.low), box.left, box.right);
      over.append(draw("text", { x: at + (right ? 7 : -7), y: box.top + 10, class: "rule-label halo",
        "text-anchor": right ? "start" : "end", id: "threshold-label" }, short(level.middle)));
    },
    table: () => ({
      head: ["from", "to", "share", "up to here"],
      rows: [["0", short(bars[0].from, 4), percent(below, 3), percent(below, 3)],
        ...bars.map((bar, k) => [short(bar.from, 4), short(bar.to, 4), percent(bar.share, 3),
          percent(Math.min(1, below + sum(bars.slice(0, k + 1).map((b) => b.share))), 2)]),
        [short(bars.at(-1).to, 4), "", percent(above, 3), percent(1)]],
    }),
  };
}

function upright(parent, value, x, box, kind) {
  if (value === null) return;
  const at = clamp(x(value), box.left, box.right);
  parent.append(draw("line", { x1: at, x2: at, y1: box.top, y2: box.bottom, class: kind }));
}

/** A bar, and over it as much of the other colour as neurons drop there. */
function tint(parent, bar, level, x, y) {
  const rect = (from, to, kind, opacity = null) => draw("rect", { x: x(from), width: Math.max(0, x(to) - x(from) - 0.75),
    y: y(bar.height), height: y(0) - y(bar.height), class: kind, "fill-opacity": opacity });
  parent.append(rect(bar.from, bar.to, "kept"));
  if (level.middle === null) return;
  if (level.low === level.high) {
    if (level.middle > bar.from) parent.append(rect(bar.from, Math.min(bar.to, level.middle), "dropped"));
    return;
  }
  const share = shareAbove(level, Math.sqrt(bar.from * bar.to));
  if (share > 0) parent.append(rect(bar.from, bar.to, "dropped", share.toFixed(3)));
}

/** All layers small, to choose one from: one stop of the Tab key, arrows inside. */
function minis(section) {
  if (LAYERS.length < 2) return;
  const group = make("div", { class: "minis", role: "radiogroup", "aria-label": "Layer to show" });
  const buttons = LAYERS.map((layer, k) => {
    const button = make("button", { type: "button", role: "radio" });
    button.addEventListener("click", () => change({ layer: k }));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = (k + step + LAYERS.length) % LAYERS.length;
      change({ layer: next });
      buttons[next].focus();
    });
    return button;
  });
  group.append(...buttons);
  section.append(group);
  const bars = LAYERS.map((_, k) => barsOf(k));
  const domain = [bars[0][0].from, bars[0].at(-1).to];
  const x = scaleOf({ kind: "log", domain }, 0, 120);
  follow(() => buttons.forEach((button, k) => {
    const level = levelOf(k);
    const top = Math.max(...bars[k].map((bar) => bar.height));
    const y = scaleOf({ domain: [0, top] }, 40, 2);
    const svg = draw("svg", { viewBox: "0 0 120 40", preserveAspectRatio: "none", "aria-hidden": "true" });
    for (const bar of bars[k]) tint(svg, bar, level, x, y);
    upright(svg, level.middle, x, { left: 0, right: 120, top: 0, bottom: 40 }, "rule");
    button.replaceChildren(svg, make("span", {}, make("b", {}, LAYERS[k].short), short(level.middle, 2)));
    button.setAttribute("aria-checked", String(k === state.layer));
    button.setAttribute("aria-label", `Layer ${LAYERS[k].short}, threshold ${short(level.middle, 2)}`);
    button.tabIndex = k === state.layer ? 0 : -1;
  }));
}

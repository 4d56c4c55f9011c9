// Time of a call, or tokens/s, against sparsity, with what reading the bytes alone would take.

const DENSE = ["dense", "dense_compiled", "transformers"];
// Where each value stands in a point of the payload.
const P = { sparsity: 0, bytes: 1, p20: 2, p50: 3, p80: 4, limit: 5, faster: 6 };

const IMPL_WORDS = {
  catsparse: "catsparse", dense: "dense", dense_compiled: "dense, compiled",
  transformers: "transformers",
};

function implWords(name) {
  const preview = /^catsparse_(preview|product)(\d)$/.exec(name);
  if (preview) return `catsparse, ${preview[2]}-bit ${preview[1] === "product" ? "product" : "gate"} preview`;
  return IMPL_WORDS[name] ?? name.replaceAll("_", " ");
}

function panelWords(panel) {
  const what = panel.what === "op" ? "one MLP" : "decode";
  const batch = panel.what === "op" ? plural(panel.tokens, "token") : `batch ${panel.tokens}`;
  return [panel.name, what, panel.dtype, batch, ...(panel.context ? [`context ${panel.context}`] : [])].join(" · ");
}

function speed() {
  const section = byId("speed");
  if (!DATA.bench.length) {
    howTo(section, "No benchmark was given. Time one MLP or the whole model on this machine:",
      `catsparse bench op --shape llama-2-7b -o speed\ncatsparse bench decode ${DATA.folder} -o speed\n` +
      `catsparse report ${DATA.folder} --rows speed/rows.jsonl`);
    return;
  }
  section.append(paragraph("Medians over rounds, with whiskers from the 20th to the 80th percentile. The " +
    "byte limit is what reading the weights alone takes at the bandwidth measured in the same run; " +
    "speedups are over the best dense of that run."));
  const panels = make("select", { id: "panel" });
  const devices = Map.groupBy(DATA.bench.keys(), (k) => DATA.bench[k].device);
  for (const [device, indices] of devices) {
    panels.append(make("optgroup", { label: device },
      ...indices.map((k) => make("option", { value: k }, panelWords(DATA.bench[k])))));
  }
  const runs = make("select", { id: "run" });
  const runLabel = make("label", {}, "Run ", runs);
  section.append(make("div", { class: "pickers" }, make("label", {}, "Measured ", panels), runLabel));
  const where = paragraph("", "hint");
  section.append(where);
  const pair = make("div", { class: "pair" });
  section.append(pair);
  const [timed, faster] = [chart(pair, ""), chart(pair, "Speedup over the best dense: higher is better")];
  const refresh = () => {
    const panel = DATA.bench[panels.value];
    const run = panel.runs[runs.value];
    const previews = run.series.some(({ impl }) => /^catsparse_/.test(impl));
    where.textContent = `${panelWords(panel)}. ${panel.device}, ` + (panel.threads ? plural(panel.threads, "thread") : "GPU") +
      (run.commit ? `, commit ${run.commit}` : "") +
      (previews ? ". The dashed limit is that of the exact gate; a preview reads less, and its own limit is in the read-outs." : ".");
    const lines = styled(run.series);
    timed.heading.textContent = panel.what === "op" ? "Time of a call: lower is better" : "Rate: higher is better";
    measured(timed, panel, lines);
    speedup(faster, panel, lines);
  };
  const choose = () => {
    const { runs: all } = DATA.bench[panels.value];
    runs.replaceChildren(...all.map((_, k) => make("option", { value: k }, `${k + 1} of ${all.length}`)));
    runs.value = all.length - 1;
    runLabel.hidden = all.length < 2;
    refresh();
  };
  panels.addEventListener("change", choose);
  runs.addEventListener("change", refresh);
  choose();
}

function styled(series) {
  let next = 0;
  return series.map(({ impl, points }) => {
    const dense = DENSE.includes(impl);
    const look = impl === "catsparse" ? { kind: "sm", shape: "circle" }
      : dense ? { kind: "s4", shape: "square", dash: [null, "2 4", "9 4"][DENSE.indexOf(impl)] }
      : { kind: `s${[0, 2, 3, 1, 5][next % 5]}`, shape: ["triangle", "diamond", "down", "cross", "square"][next++ % 5] };
    return { impl, points, words: implWords(impl), dense, ...look };
  });
}

/** The byte limit by sparsity, where our own kernel was timed. */
function limitOf(lines) {
  const own = lines.find((one) => one.impl === "catsparse") ?? lines[0];
  return own.points.map((point) => [point[P.sparsity], point[P.limit]]);
}

function speedLegend(it, lines, limit) {
  legends(it, [...lines.map((one) => [swatch(one.kind, { ...one, shape: one.dense ? null : one.shape }), one.words]),
    [swatch("limit"), limit]]);
}

function wordsOf(one, point, unit) {
  return [`${one.words} at ${percent(point[P.sparsity], 0)}`,
    `${short(point[P.p50], 4)} ${unit}`, `20–80%: ${short(point[P.p20], 4)} to ${short(point[P.p80], 4)}`,
    `byte limit ${short(point[P.limit], 4)}`, `${point[P.faster].toFixed(2)} times the best dense`,
    `${percent(point[P.bytes])} of MLP bytes skipped`];
}

function speedTable(lines, unit) {
  return () => ({
    head: ["implementation", "sparsity", "bytes skipped", `${unit}, median`, "20%", "80%", "byte limit", "speedup"],
    rows: lines.flatMap((one) => one.points.map((point) => [one.words, percent(point[P.sparsity], 0), percent(point[P.bytes]),
      short(point[P.p50], 4), short(point[P.p20], 4), short(point[P.p80], 4), short(point[P.limit], 4),
      `${point[P.faster].toFixed(2)}×`])),
  });
}

function measured(it, panel, lines) {
  const unit = panel.what === "op" ? "µs" : "tokens/s";
  const limit = limitOf(lines);
  const most = Math.max(...lines.flatMap((one) => one.points.map((point) => point[P.p80])), ...limit.map(([, v]) => v));
  speedLegend(it, lines, "byte limit");
  show(it, {
    label: `${panelWords(panel)}: ${unit} against sparsity`,
    height: 320,
    left: 62,
    x: { domain: [-0.03, 1], format: (v) => percent(v, 0), title: "neurons dropped" },
    y: { domain: [0, most * 1.06], format: (v) => short(v, 4), title: panel.what === "op" ? "microseconds a call" : "tokens a second" },
    items: lines.flatMap((one) => one.points.map((point) => ({ x: point[P.sparsity], y: point[P.p50], series: one.impl,
      lines: wordsOf(one, point, unit) }))),
    draw: ({ x, y, inside, over, box }) => {
      inside.append(draw("path", { d: line(limit, x, y), class: "limit" }));
      for (const one of lines) {
        const path = one.points.map((point) => [point[P.sparsity], point[P.p50]]);
        if (one.dense) {  // it knows no sparsity: one line across
          across(inside, y(path[0][1]), box, one);
          continue;
        }
        over.append(draw("path", { d: line(path, x, y), class: `path ${one.kind}` }));
        for (const point of one.points) {
          whisker(over, x(point[P.sparsity]), y(point[P.p20]), y(point[P.p80]), one.kind);
          over.append(marker(one.shape, x(point[P.sparsity]), y(point[P.p50]), one.kind, 3.5));
        }
      }
    },
    table: speedTable(lines, unit),
  });
}

function across(parent, at, box, one) {
  parent.append(draw("line", { x1: box.left, x2: box.right, y1: at, y2: at, class: `path thin ${one.kind}`,
    "stroke-dasharray": one.dash }));
}

function speedup(it, panel, lines) {
  const limit = limitOf(lines);
  const bound = limit.map(([s, v]) => [s, panel.what === "op" ? limit[0][1] / v : v / limit[0][1]]);
  const most = Math.max(1, ...lines.flatMap((one) => one.points.map((point) => point[P.faster])), ...bound.map(([, v]) => v));
  speedLegend(it, lines, "the bytes allow");
  show(it, {
    label: `${panelWords(panel)}: speedup over the best dense against sparsity`,
    height: 320,
    x: { domain: [-0.03, 1], format: (v) => percent(v, 0), title: "neurons dropped" },
    y: { domain: [0, most * 1.06], format: (v) => `${Number(v.toFixed(2))}×`, title: "times as fast as the best dense" },
    items: lines.flatMap((one) => one.points.map((point) => ({ x: point[P.sparsity], y: point[P.faster], series: one.impl,
      lines: wordsOf(one, point, panel.what === "op" ? "µs" : "tokens/s") }))),
    draw: ({ x, y, inside, over, box }) => {
      inside.append(draw("line", { x1: box.left, x2: box.right, y1: y(1), y2: y(1), class: "base" }),
        draw("path", { d: line(bound, x, y), class: "limit" }));
      for (const one of lines) {
        const path = one.points.map((point) => [point[P.sparsity], point[P.faster]]);
        if (one.dense) {
          across(inside, y(path[0][1]), box, one);
          continue;
        }
        over.append(draw("path", { d: line(path, x, y), class: `path ${one.kind}` }));
        for (const [a, b] of path) over.append(marker(one.shape, x(a), y(b), one.kind, 3.5));
      }
    },
    table: speedTable(lines, panel.what === "op" ? "µs" : "tokens/s"),
  });
}

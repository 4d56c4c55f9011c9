// By layer: sensitivities and the allocation; achieved sparsity, by layer and by position.

const layerAxis = () => ({
  domain: [-0.6, LAYERS.length - 0.4],
  ticks: (wide) => {
    const letters = Math.max(...LAYERS.map((layer) => layer.short.length));
    const room = clamp(Math.floor(wide / (8 * letters + 14)), 1, 12);
    return LAYERS.map((_, k) => k).filter((k) => k % Math.ceil(LAYERS.length / room) === 0);
  },
  format: (k) => LAYERS[k].short,
  title: "layer",
});
const shareAxis = { domain: [0, 1], format: (v) => percent(v, 0), title: "share dropped" };

function layers() {
  const section = byId("layers");
  const table = DATA.sensitivities;
  if (table.why_not !== null) {
    howTo(section, `There is nothing to predict from: ${table.why_not}. Measure every layer's ` +
      "sensitivity, which costs as much as 30 evaluations:",
      "catsparse sparsify MODEL -o FOLDER --bytes-skipped 0.333 --allocation optimal");
  } else {
    section.append(paragraph("The loss of the whole model, KL(dense ‖ sparse) in nats a token, when " +
      "one layer alone is sparse. An allocation takes bytes where they cost least." +
      (table.saved === null ? "" : ` The saved one: ${short(table.saved)} in all, by the same sum.`)));
  }
  const pair = make("div", { class: "pair" });
  section.append(pair);
  if (table.why_not === null) curves(pair, table);
  allocation(pair, table);
}

function curves(parent, table) {
  const it = chart(parent, "Loss against sparsity, a line a layer");
  legends(it, [[make("span", { class: "ramp", "aria-hidden": "true" }), "first to last layer"],
    [swatch("rule"), "slider"], [swatch("s4", { shape: "circle", line: false }), "measured, chosen layer"]]);
  const { positions } = DATA.levels;
  const found = table.losses.flat().filter((v) => v > 0);
  const domain = [Math.max(Math.min(...found) / 4, Math.max(...found) / 1e6), Math.max(...found) * 1.3];
  follow(() => show(it, {
    label: "Loss of the whole model against the sparsity of one layer",
    height: 300,
    left: 56,
    x: { domain: [0, 1], format: (v) => percent(v, 0), title: "sparsity of that layer" },
    y: { kind: "log", domain, format: (v) => short(v, 1), title: "nats a token" },
    items: table.losses.flatMap((losses, k) => losses.map((loss, g) => ({
      x: table.grid[g], y: loss, series: k,
      lines: [`Layer ${LAYERS[k].short} at ${percent(table.grid[g], 0)}`, lossWords(loss)],
    }))).filter((item) => item.y > 0),
    draw: ({ x, y, inside, box }) => {
      const order = LAYERS.map((_, k) => k).sort((a, b) => (a === state.layer) - (b === state.layer));
      for (const k of order) {
        const curve = table.predicted[k].map((loss, at) => [positions[at], loss]).filter(([, v]) => v > 0);
        const chosen = k === state.layer;
        const path = draw("path", { d: line(curve, x, y), class: `path ${chosen ? "s4" : "thin depth"}` });
        path.style.setProperty("--deep", LAYERS.length > 1 ? k / (LAYERS.length - 1) : 0);
        inside.append(path);
        if (!chosen) continue;
        table.losses[k].forEach((loss, g) => {
          if (loss > 0) inside.append(marker("circle", x(table.grid[g]), y(loss), "s4", 3.5));
        });
      }
      upright(inside, positions[state.at], x, box, "rule");
    },
    table: () => ({
      head: ["layer", ...table.grid.map((s) => percent(s, 0))],
      rows: table.losses.map((losses, k) => [LAYERS[k].short, ...losses.map((v) => short(v))]),
    }),
  }));
}

/** Bars: each layer's part of the predicted loss, or without a table the sparsity it was given. */
function allocation(parent, table) {
  const it = chart(parent, "Sparsity given to each layer");
  const loss = (k) => (table.why_not === null ? table.predicted[k][state.at] : null);
  legends(it, [[block("bar"), "as saved"],
    ...(DATA.levels ? [[swatch("rule"), "slider, the same in all"]] : []),
    ...(table.why_not === null ? [[swatch("s3", { shape: "diamond" }), "its part of the slider's loss"]] : [])]);
  follow(() => {
    const parts = LAYERS.map((_, k) => loss(k));
    const total = parts.includes(null) ? null : sum(parts);
    const part = (k) => (total > 0 ? parts[k] / total : null);
    show(it, {
      label: "Sparsity given to each layer, and its part of the predicted loss",
      height: 300,
      columns: true,
      x: layerAxis(),
      y: { ...shareAxis, title: "share dropped; part of the loss" },
      items: LAYERS.map((layer, k) => ({ x: k, y: layer.saved.sparsity, series: 0, lines: [
        `Layer ${layer.short}`, `${percent(layer.saved.sparsity)} dropped as saved`,
        ...(parts[k] == null ? [] : [`at the slider ${lossWords(parts[k])}`, `${percent(part(k), 0)} of the sum`])] })),
      draw: ({ x, y, inside, over, box }) => {
        bars(inside, LAYERS.map((layer) => layer.saved.sparsity), x, y);
        if (DATA.levels) {
          const at = y(DATA.levels.positions[state.at]);
          inside.append(draw("line", { x1: box.left, x2: box.right, y1: at, y2: at, class: "rule" }));
        }
        if (total > 0) {
          const points = LAYERS.map((_, k) => [k, part(k)]);
          over.append(draw("path", { d: line(points, x, y), class: "path thin s3" }));
          for (const [k, v] of points) over.append(marker("diamond", x(k), y(v), "s3", 3));
        }
      },
      table: () => ({
        head: ["layer", "as saved", "scalar", "median threshold", "loss at the slider", "part"],
        rows: LAYERS.map((layer, k) => [layer.short, percent(layer.saved.sparsity),
          short(layer.saved.scalar, 4), short(layer.saved.middle, 4), short(parts[k]), percent(part(k))]),
      }),
    });
  });
}

function bars(parent, values, x, y) {
  const half = Math.min(18, 0.38 * (x(1) - x(0)));
  values.forEach((value, k) => {
    parent.append(draw("rect", { x: x(k) - half, width: 2 * half, y: y(value), height: Math.max(0, y(0) - y(value)),
      class: `bar${k === state.layer ? " chosen" : ""}` }));
  });
}

function achieved() {
  const section = byId("achieved");
  const own = ownRow();
  if (!own) {
    howTo(section, DATA.evaluate.length
      ? "The evaluations given are of this base model, but not of this folder's thresholds. Evaluate the folder and give its row:"
      : "What a text really drops is measured, not promised. Evaluate the folder and give its row:",
      `catsparse evaluate ${DATA.folder} --json > evaluate.json\ncatsparse report ${DATA.folder} --rows evaluate.json`);
    return;
  }
  section.append(paragraph(`Thresholds come from the calibration text; on ${WHOLE.format(own.tokens)} ` +
    `tokens of ${own.data} they dropped ${percent(own.sparsity)} of the neurons, where ` +
    `${percent(DATA.model.dropped)} were expected. Every token was thresholded.`));
  const pair = make("div", { class: "pair" });
  section.append(pair);
  achievedByLayer(pair, own);
  if (own.positions) achievedByPosition(pair, own.positions);
  else section.append(paragraph("The row has no sparsity by token position: no layer saw whole texts.", "hint"));
}

function achievedByLayer(parent, own) {
  const it = chart(parent, "By layer");
  legends(it, [[block("bar"), "expected, on the calibration text"],
    [swatch("s0", { shape: "circle", line: false }), `achieved on ${own.data}`]]);
  follow(() => show(it, {
    label: "Sparsity by layer, expected and achieved",
    height: 300,
    columns: true,
    x: layerAxis(),
    y: shareAxis,
    items: LAYERS.map((layer, k) => ({ x: k, y: own.sites[k] ?? layer.saved.sparsity, series: 0, lines: [
      `Layer ${layer.short}`, own.sites[k] === null ? "not measured" : `${percent(own.sites[k])} achieved`,
      `${percent(layer.saved.sparsity)} expected`] })),
    draw: ({ x, y, inside, over }) => {
      bars(inside, LAYERS.map((layer) => layer.saved.sparsity), x, y);
      own.sites.forEach((value, k) => value !== null && over.append(marker("circle", x(k), y(value), "s0", 4)));
    },
    table: () => ({
      head: ["layer", "expected", "achieved", "difference"],
      rows: LAYERS.map((layer, k) => [layer.name, percent(layer.saved.sparsity), percent(own.sites[k]),
        own.sites[k] === null ? "–" : rise(own.sites[k] - layer.saved.sparsity)]),
    }),
  }));
}

function achievedByPosition(parent, positions) {
  const { starts, length, sparsity, sites } = positions;
  const name = (k) => {
    const end = (starts[k + 1] ?? length) - 1;
    return end === starts[k] ? `${end}` : `${starts[k]}–${end}`;
  };
  const known = sites.filter((site) => site !== null);
  const edge = (pick) => starts.map((_, k) => pick(...known.map((site) => site[k])));
  const [low, high] = [edge(Math.min), edge(Math.max)];
  const it = chart(parent, "By token position");
  follow(() => {
    const chosen = sites[state.layer];
    const series = [["all layers", sparsity, "s0", "circle"],
      ...(chosen && LAYERS.length > 1 ? [[`layer ${LAYERS[state.layer].short}`, chosen, "s1", "square"]] : [])];
    legends(it, [...series.map(([word, , kind, shape]) => [swatch(kind, { shape }), word]),
      ...(known.length > 1 ? [[block("spread"), "lowest to highest layer"]] : [])]);
    show(it, {
      label: "Achieved sparsity by token position in the window",
      height: 300,
      x: { domain: [-0.4, starts.length - 0.6], ticks: starts.map((_, k) => k).filter((k) => k % Math.ceil(starts.length / 7) === 0),
        format: name, title: "position in the window, in doubling buckets" },
      y: shareAxis,
      items: series.flatMap(([word, values], s) => values.map((value, k) => ({ x: k, y: value, series: s,
        lines: [`${word}, position ${name(k)}`, `${percent(value)} dropped`] }))),
      draw: ({ x, y, inside, over }) => {
        const around = [...high.map((v, k) => [k, v]), ...low.map((v, k) => [k, v]).reverse()];
        inside.append(draw("path", { d: `${line(around, x, y)}Z`, class: "spread" }));
        for (const [, values, kind, shape] of series) {
          const points = values.map((v, k) => [k, v]);
          over.append(draw("path", { d: line(points, x, y), class: `path ${kind}` }));
          for (const [k, v] of points) over.append(marker(shape, x(k), y(v), kind, 3.5));
        }
      },
      table: () => ({
        head: ["layer", ...starts.map((_, k) => name(k))],
        rows: [["all", ...sparsity.map((v) => percent(v))],
          ...sites.map((site, k) => [LAYERS[k].short, ...starts.map((_, b) => percent(site?.[b]))])],
      }),
    });
  });
}

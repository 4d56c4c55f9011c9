// Rise of perplexity against bytes skipped, a line a method; accuracy on tasks stands below.

const RISES = [-0.1, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1000];

function settingWords(row) {
  const packed = ["int8", "fp8", "int4"].includes(row.weights) ? [row.weights] : [];
  if (row.method === "dense") return [...packed, "dense"].join(", ");
  return [...packed, row.method, row.compensate ? "compensated" : "uncompensated",
    ...(row.preview ? [`${row.preview}-bit preview`] : []),
    ...(row.allocation && row.allocation !== "uniform" ? [row.allocation] : [])].join(", ");
}

/** Lines of rows alike but for the budget, with colour by method, dash by compensation. */
function settings(rows) {
  const methods = [...new Set(rows.map((row) => row.method))];
  const found = new Map();
  for (const row of rows) {
    const words = settingWords(row);
    if (!found.has(words)) {
      const m = methods.indexOf(row.method);
      found.set(words, { words, rows: [], kind: `s${m % 6}`, shape: MARKER_NAMES[m % MARKER_NAMES.length],
        dash: row.compensate ? null : "5 4", hollow: !row.compensate, hidden: false });
    }
    found.get(words).rows.push(row);
  }
  for (const one of found.values()) one.rows.sort((a, b) => a.bytes_skipped - b.bytes_skipped);
  return [...found.values()];
}

function quality() {
  const section = byId("quality");
  perplexities(section);
  if (DATA.tasks.length) accuracies(section);
}

function perplexities(section) {
  if (!DATA.compare.length && !DATA.evaluate.length) {
    if (DATA.tasks.length) return;
    howTo(section, "No comparison was given. Measure every method on the same text at equal bytes skipped:",
      `catsparse compare ${DATA.model.name} -o methods\ncatsparse report ${DATA.folder} --rows methods/compare.jsonl`);
    return;
  }
  section.append(paragraph("How much perplexity rises over the dense model's on the same text, against " +
    "the share of weight bytes that a decoded token does not read. Lower is better. " +
    "Whiskers are standard errors, of paired windows."));
  const texts = [...new Set([...DATA.compare.map((row) => row.heldout), ...DATA.evaluate.map((row) => row.data)])];
  const select = make("select", { id: "text" }, ...texts.map((text) => make("option", { value: text }, text)));
  if (texts.length > 1) {
    section.append(make("div", { class: "pickers" }, make("label", {}, "Text ", select)));
  }
  const it = chart(section, "");
  const lines = settings(DATA.compare);
  const refresh = () => pareto(it, lines, select.value || texts[0]);
  select.addEventListener("change", refresh);
  toggles(it, lines, refresh);
  const extra = (icon, text) => it.legend.append(make("li", {}, icon, text));
  if (DATA.evaluate.some((row) => row.own)) extra(swatch("sm", { shape: "cross", line: false }), "this folder");
  if (DATA.levels) {
    extra(swatch("rule"), "slider");
    if (DATA.sensitivities.why_not === null) extra(swatch("limit"), "predicted for the slider");
  }
  follow(refresh);
}

/** The legend: each line can be switched off. */
function toggles(it, lines, refresh) {
  const entries = lines.map((one) => {
    const button = make("button", { type: "button", "aria-pressed": "true" },
      swatch(one.kind, one), one.words);
    button.addEventListener("click", () => {
      one.hidden = !one.hidden;
      button.setAttribute("aria-pressed", String(!one.hidden));
      refresh();
    });
    return make("li", {}, button);
  });
  it.legend.replaceChildren(...entries);
}

function pareto(it, lines, text) {
  const shown = lines.map((one) => ({ ...one, rows: one.rows.filter((row) => row.heldout === text) }))
    .filter((one) => one.rows.length && !one.hidden);
  const points = DATA.evaluate.filter((row) => row.data === text);
  const all = [...shown.flatMap((one) => one.rows), ...points];
  const tokens = [...new Set(all.map((row) => row.tokens))].sort((a, b) => a - b).map(WHOLE.format);
  it.heading.textContent = `${DATA.model.name} on ${text}` + (tokens.length ? `, ${tokens.join(" and ")} tokens` : "");
  const predicted = predictedCurve();
  const most = Math.max(0.02, ...all.map((row) => row.rise + (row.rise_se ?? 0)));
  const least = Math.min(0, ...all.map((row) => row.rise - (row.rise_se ?? 0)));
  const widest = Math.max(0.1, ...all.map((row) => row.bytes_skipped));
  const leftmost = Math.min(0, ...all.map((row) => row.bytes_skipped));
  const words = (row, name) => [name, `${rise(row.rise, 2)}` + (row.rise_se == null ? "" : ` ± ${percent(row.rise_se, 2)}`),
    `${percent(row.bytes_skipped)} of bytes, ${percent(row.sparsity)} of neurons`,
    `perplexity ${short(row.dense_perplexity, 4)} → ${short(row.perplexity, 4)}`];
  const named = (row) => (row.own ? "this folder" : `evaluated: ${settingWords(row)}`);
  show(it, {
    label: `Rise of perplexity against bytes skipped on ${text}`,
    height: 420,
    left: 56,
    x: { domain: [leftmost, Math.min(1, widest * 1.08)], format: (v) => percent(v, 0), title: DATA.model.weights === "the MLPs'" ? "MLP bytes skipped" : `bytes skipped of ${DATA.model.weights} weights` },
    y: { kind: "symlog", unit: 0.01, domain: [least * 1.2, most * 1.15], ticks: RISES, format: (v) => rise(v, 0), title: "rise of perplexity" },
    items: [...shown.flatMap((one) => one.rows.map((row) => ({ x: row.bytes_skipped, y: row.rise, series: one.words,
      lines: words(row, one.words) }))),
      ...points.map((row) => ({ x: row.bytes_skipped, y: row.rise, series: named(row), lines: words(row, named(row)) }))],
    draw: ({ x, y, inside, over, box }) => {
      if (predicted.length) inside.append(draw("path", { d: line(predicted, x, y), class: "limit" }));
      if (DATA.levels) upright(inside, DATA.levels.bytes[state.at], x, box, "rule");
      for (const one of shown) {
        const path = one.rows.map((row) => [row.bytes_skipped, row.rise]);
        over.append(draw("path", { d: line(path, x, y), class: `path ${one.kind}`, "stroke-dasharray": one.dash }));
        for (const row of one.rows) whisker(over, x(row.bytes_skipped), y(row.rise - (row.rise_se ?? 0)), y(row.rise + (row.rise_se ?? 0)), one.kind);
        for (const [a, b] of path) over.append(marker(one.shape, x(a), y(b), `${one.kind}${one.hollow ? " hollow" : ""}`, 3.5));
      }
      for (const row of points) {
        const at = [x(row.bytes_skipped), y(row.rise)];
        over.append(draw("circle", { cx: at[0], cy: at[1], r: 8, class: "halo-disc" }),
          marker("cross", ...at, `${row.own ? "sm" : "s5"} loud`, 5));
      }
    },
    table: () => ({
      head: ["setting", "asked", "bytes skipped", "neurons", "perplexity", "rise", "±", "tokens"],
      rows: [...shown.flatMap((one) => one.rows.map((row) => [one.words, row])), ...points.map((row) => [named(row), row])]
        .map(([name, row]) => [name, percent(row.target), percent(row.bytes_skipped), percent(row.sparsity),
          short(row.perplexity, 5), rise(row.rise, 2), percent(row.rise_se, 2), WHOLE.format(row.tokens)]),
    }),
  });
}

function predictedCurve() {
  if (DATA.levels === null || DATA.sensitivities.why_not !== null) return [];
  return DATA.levels.bytes.map((bytes, at) => [bytes, predictedLoss(at)])
    .filter(([, loss]) => loss !== null).map(([bytes, loss]) => [bytes, Math.expm1(loss)]);
}

function whisker(parent, x, low, high, kind) {
  parent.append(draw("line", { x1: x, x2: x, y1: low, y2: high, class: `whisker ${kind}` }));
}

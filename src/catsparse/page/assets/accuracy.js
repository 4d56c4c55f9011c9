// Accuracy on zero-shot tasks against bytes skipped, the dense model's across.

function accuracies(section) {
  section.append(paragraph("What the same settings score on zero-shot tasks, dense beside sparse on the same " +
    "examples. Higher is better. Whiskers are standard errors of the difference to the dense model."));
  const name = (row) => `${row.task}, ${plural(row.n, "example")}`;
  const tasks = [...new Set(DATA.tasks.map(name))];
  const select = make("select", { id: "task" }, ...tasks.map((task) => make("option", { value: task }, task)));
  if (tasks.length > 1) {
    section.append(make("div", { class: "pickers" }, make("label", {}, "Task ", select)));
  }
  const it = chart(section, "");
  // Of all rows, so that a method looks as it does above.
  const sparse = DATA.tasks.filter((row) => row.variant !== "dense");
  const lines = settings([...DATA.compare, ...sparse])
    .map((one) => ({ ...one, rows: one.rows.filter((row) => row.task) })).filter((one) => one.rows.length);
  const refresh = () => {
    const task = select.value || tasks[0];
    accuracy(it, lines, task, (row) => name(row) === task);
  };
  select.addEventListener("change", refresh);
  toggles(it, lines, refresh);
  it.legend.append(make("li", {}, swatch("limit"), "dense"));
  if (DATA.levels) it.legend.append(make("li", {}, swatch("rule"), "slider"));
  follow(refresh);
}

function accuracy(it, lines, task, chosen) {
  const dense = DATA.tasks.find((row) => row.variant === "dense" && chosen(row)) ?? null;
  const shown = lines.map((one) => ({ ...one, rows: one.rows.filter(chosen) }))
    .filter((one) => one.rows.length && !one.hidden);
  const points = shown.flatMap((one) => one.rows.map((row) => [one.words, row]));
  const all = [...(dense ? [dense] : []), ...points.map(([, row]) => row)];
  const share = !all.length || /^(acc|exact_match)/.test(all[0].metric);
  const value = (v) => (share ? percent(v) : short(v, 4));
  const change = (row) => (row.difference == null ? "–" : share ? rise(row.difference, 2) : short(row.difference, 3));
  const error = (row) => row.difference_stderr ?? 0;
  const most = Math.max(...all.map((row) => row.value + error(row)));
  const least = Math.min(...all.map((row) => row.value - error(row)));
  const room = Math.max(most - least, 0.01) * 0.1;
  const bytes = all.map((row) => row.bytes_skipped);
  const words = (row, series) => [series, `${value(row.value)}, ${change(row)} to dense` +
    (row.difference_stderr == null ? "" : ` ± ${percent(row.difference_stderr, 2)}`),
    `${percent(row.bytes_skipped)} of bytes, ${percent(row.sparsity)} of neurons`];
  it.heading.textContent = `${DATA.model.name} on ${task}`;
  show(it, {
    label: `${share ? "Accuracy" : "Score"} against bytes skipped on ${task}`,
    height: 360,
    left: 56,
    x: { domain: [Math.min(0, ...bytes), Math.min(1, Math.max(0.1, ...bytes) * 1.08)], format: (v) => percent(v, 0),
      title: DATA.model.weights === "the MLPs'" ? "MLP bytes skipped" : `bytes skipped of ${DATA.model.weights} weights` },
    y: { domain: all.length ? [least - room, most + room] : [0, 1], format: value, title: share ? "accuracy" : all[0].metric },
    items: [...(dense ? [{ x: 0, y: dense.value, series: "dense", lines: ["dense", `${value(dense.value)}` +
      (dense.stderr == null ? "" : ` ± ${percent(dense.stderr, 2)}`)] }] : []),
      ...points.map(([series, row]) => ({ x: row.bytes_skipped, y: row.value, series, lines: words(row, series) }))],
    draw: ({ x, y, inside, over, box }) => {
      if (DATA.levels) upright(inside, DATA.levels.bytes[state.at], x, box, "rule");
      if (dense) inside.append(draw("line", { x1: box.left, x2: box.right, y1: y(dense.value), y2: y(dense.value), class: "limit" }));
      for (const one of shown) {
        const path = one.rows.map((row) => [row.bytes_skipped, row.value]);
        over.append(draw("path", { d: line(path, x, y), class: `path ${one.kind}`, "stroke-dasharray": one.dash }));
        for (const row of one.rows) whisker(over, x(row.bytes_skipped), y(row.value - error(row)), y(row.value + error(row)), one.kind);
        for (const [a, b] of path) over.append(marker(one.shape, x(a), y(b), `${one.kind}${one.hollow ? " hollow" : ""}`, 3.5));
      }
    },
    table: () => ({
      head: ["setting", "asked", "bytes skipped", "neurons", share ? "accuracy" : all[0].metric, "to dense", "±"],
      rows: [...(dense ? [["dense", "–", "–", "–", value(dense.value), "–", "–"]] : []),
        ...points.map(([series, row]) => [series, percent(row.bytes_asked), percent(row.bytes_skipped),
          percent(row.sparsity), value(row.value), change(row), share ? percent(row.difference_stderr, 2) : short(row.difference_stderr, 3)])],
    }),
  });
}

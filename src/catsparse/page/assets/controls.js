// The summary, the slider, the theme.

function summary() {
  const { model, calibration } = DATA;
  byId("name").textContent = model.name;
  const down = model.down === null ? "" : `, ${percent(model.down)} of down rows unread`;
  byId("lede").textContent =
    `${sitesWords()} made sparse by ${model.described}: of every token's ` +
    `${unitWord(0)} ${percent(model.dropped)} are dropped${down}.`;
  const own = ownRow();
  const figures = [
    [unitWord(0) === "inputs" ? "Inputs dropped" : "Neurons dropped", percent(model.dropped), `asked for ${percent(model.asked)}, on the calibration text`],
    ["Bytes skipped", percent(model.bytes), `of ${model.weights} weights, for each decoded token`],
  ];
  if (own) {
    figures.push(["Rise of perplexity", rise(own.rise), (own.rise_se === null ? "" : `± ${percent(own.rise_se)} · `) +
      `${short(own.dense_perplexity, 4)} → ${short(own.perplexity, 4)}`]);
    figures.push(["Dropped when measured", percent(own.sparsity),
      `on ${WHOLE.format(own.tokens)} tokens of ${own.data}`]);
  }
  byId("figures").replaceChildren(...figures.map(([term, value, aside]) =>
    make("div", {}, make("dt", {}, term),
      make("dd", { class: "value" }, value), make("dd", { class: "aside" }, aside))));
  byId("facts").replaceChildren(...facts(model, calibration).map(([term, value]) =>
    make("div", {}, make("dt", {}, term), make("dd", {}, value))));
}

function sitesWords() {
  const inputs = LAYERS.filter((layer) => layer.axis === "input").length;
  const parts = [];
  if (LAYERS.length > inputs) parts.push(plural(LAYERS.length - inputs, "gated MLP"));
  if (inputs) parts.push(`${plural(inputs, "input")} of linear layers`);
  return parts.join(" and ");
}

function facts(model, calibration) {
  const revision = model.revision ? ` at ${model.revision.slice(0, 12)}` : "";
  const prefill = model.prefill === "masked" ? "masked: every token is thresholded"
    : "dense: only decode is sparse";
  const found = [
    ["Base model", `${model.name}${revision}${model.type ? `, ${model.type}` : ""}`],
    ["Method", model.described],
    ["Decided on", [...new Set(LAYERS.map((layer) => layer.axis))].map((axis) => ({
      product: "the product that a preview foretells",
      gate: model.preview ? "the gate, as a preview foretells it" : "the gate",
      input: "inputs of linear layers" })[axis]).join("; ")],
    ["Prefill", prefill],
  ];
  if (calibration) {
    const windows = calibration.seq_len ? ` in windows of ${calibration.seq_len}` : "";
    found.push(["Calibrated on", `${WHOLE.format(calibration.tokens)} tokens of ${calibration.data}${windows}, ` +
      `${calibration.dtype}, seed ${calibration.seed}`]);
  } else found.push(["Calibrated on", "not said"]);
  const neurons = [...new Set(LAYERS.map((layer) => layer.size))];
  const sizes = neurons.length === 1 ? WHOLE.format(neurons[0])
    : `${WHOLE.format(Math.min(...neurons))} to ${WHOLE.format(Math.max(...neurons))}`;
  const acts = [...new Set(LAYERS.map((layer) => layer.act).filter(Boolean))];
  found.push([unitWord(0) === "inputs" ? "Inputs" : "Neurons", [`${sizes} a layer`, ...acts].join(", ")]);
  found.push(["Folder", DATA.folder], ["Thresholds by", `catsparse ${model.version ?? "of unknown version"}`]);
  return found;
}

/** The last evaluation of this very folder. */
function ownRow() {
  return DATA.evaluate.findLast((row) => row.own) ?? null;
}

function lossWords(loss) {
  return `${short(loss)} nats a token`;
}

function sliderSetUp() {
  if (DATA.levels === null) {
    byId("slider-note").textContent = "The folder was saved without its calibration's statistics: " +
      "thresholds for other sparsities do not follow from it, so there is no slider.";
    return;
  }
  const slider = byId("sparsity");
  slider.max = DATA.levels.positions.length - 1;
  slider.value = state.at;
  slider.addEventListener("input", () => change({ at: Number(slider.value) }));
  byId("reset").addEventListener("click", () => {
    slider.value = DATA.start;
    change({ at: DATA.start });
  });
  byId("control").hidden = false;
  byId("slider-note").textContent = sliderNote();
  follow(() => {
    const { positions, bytes } = DATA.levels;
    const loss = predictedLoss(state.at);
    byId("at").textContent = percent(positions[state.at], 0);
    byId("at-bytes").textContent = percent(bytes[state.at]);
    byId("at-loss").textContent = loss === null ? beyond()
      : `${short(loss)} nats (perplexity ${rise(Math.expm1(loss))})`;
    slider.setAttribute("aria-valuetext", `${percent(positions[state.at], 0)} of ${unitWord(0)} dropped, ` +
      `${percent(bytes[state.at])} of bytes skipped` +
      (loss === null ? "" : `, predicted loss ${lossWords(loss)}`));
  });
}

function beyond() {
  const table = DATA.sensitivities;
  return table.why_not === null ? `not measured above ${percent(table.grid.at(-1), 0)}` : "not known";
}

function sliderNote() {
  const spread = LAYERS.some((layer) => Math.abs(layer.saved.sparsity - DATA.model.asked) > 0.01);
  const table = DATA.sensitivities;
  const parts = ["The slider gives every layer the same sparsity, with the thresholds that sparsify would choose for it."];
  if (spread) parts.push("The saved model does not: its sparsity differs by layer.");
  if (DATA.model.down_asked !== null) {
    parts.push("It leaves out the second decision, whose statistics belong to the saved sparsity alone.");
  }
  parts.push(table.why_not === null
    ? "The predicted loss is the sum of what each layer costs alone, KL(dense ‖ sparse) on " +
      `${WHOLE.format(table.tokens)} held-out tokens, in nats a token; very sparse layers disturb each ` +
      "other and together cost more. The perplexity beside it is that on text as the dense model " +
      "itself would write it, e to the loss."
    : `It predicts no loss: ${table.why_not}.`);
  return parts.join(" ");
}

function themeSetUp() {
  const root = document.documentElement;
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const name = () => {
    const dark = (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
    button.textContent = dark ? "Light theme" : "Dark theme";
    button.setAttribute("aria-pressed", String(dark));
    return dark;
  };
  button.addEventListener("click", () => {
    root.dataset.theme = name() ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  name();
}

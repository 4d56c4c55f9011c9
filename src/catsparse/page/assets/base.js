"use strict";
// The data, what is looked at, and the words for numbers.

const DATA = JSON.parse(document.getElementById("data").textContent);
const LAYERS = DATA.layers;
const state = { at: DATA.start, layer: 0 };
const listeners = [];

/** Call `draw` now and after every change of the slider or of the chosen layer. */
function follow(draw) {
  listeners.push(draw);
  draw();
}

let queued = false;
function change(values) {
  Object.assign(state, values);
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    for (const draw of listeners) draw();
  });
}

const byId = (id) => document.getElementById(id);

/** An element; text is only ever set as text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value != null) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function percent(value, digits = 1) {
  return value == null ? "–" : `${(100 * value).toFixed(digits)}%`;
}

function rise(value, digits = 1) {
  if (value === 0) return "0%";
  return value == null ? "–" : `${value < 0 ? "−" : "+"}${percent(Math.abs(value), digits)}`;
}

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** To so many significant digits, without an exponent where that is readable. */
function short(value, digits = 3) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e3 && size < 1e7) return WHOLE.format(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(digits - 1);
  return String(Number(value.toPrecision(digits)));
}

const plural = (n, word) => `${WHOLE.format(n)} ${word}${n === 1 ? "" : "s"}`;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** The predicted loss of the slider's sparsity in every layer; null beyond the table. */
function predictedLoss(at) {
  const table = DATA.sensitivities;
  if (table.why_not !== null) return null;
  const losses = table.predicted.map((curve) => curve[at]);
  return losses.includes(null) ? null : sum(losses);
}

/** A paragraph, or the section's stand-in for rows that were not given. */
function paragraph(text, kind = "") {
  return make("p", { class: kind || null }, text);
}

function howTo(parent, text, commands) {
  parent.append(paragraph(text, "notice"), make("code", { class: "commands" }, commands));
}

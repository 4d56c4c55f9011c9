"use strict";

// What the model writes is only ever set as text, never as markup. The key stays in this variable.
const at = (id) => document.getElementById(id);
let key = "";
let model = null;
let turns = [];
let running = null; // an AbortController while an answer comes

function headers() {
  const all = { "Content-Type": "application/json" };
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}

function made(tag, kind, parent, text = "") {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.textContent = text;
  parent.append(element);
  return element;
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function connect() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    at("facts").textContent = "the server cannot be reached";
    return;
  }
  at("key-form").hidden = response.status !== 401;
  if (!response.ok) {
    const asked = response.status === 401 && !key;
    at("facts").textContent = asked ? "this server asks for a key" : await problem(response);
    at("key").focus();
    return;
  }
  model = (await response.json()).data[0];
  at("model").textContent = model.id;
  document.title = `${model.id} – catsparse`;
  const room = model.context ? `, context ${model.context} tokens` : "";
  at("facts").textContent = (model.sparse ? "sparse" : "dense") + room;
  at("modes").hidden = !model.sparse;
  at("tokens").max = model.max_tokens;
  if (Number(at("tokens").value) > model.max_tokens) at("tokens").value = model.max_tokens;
  at("message").focus();
}

// The events of a response, each parsed.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function showSpeed(place, tokens, times) {
  place.replaceChildren();
  const seconds = (times.at(-1) - times[0]) / 1000;
  if (tokens > 2 && seconds > 0) {
    made("b", "", place, `${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    place.append(", ");
  }
  place.append(`${tokens} tokens, the first after ${(times.first / 1000).toFixed(2)} s`);
}

// One answer, into its place on the page; returns its text.
async function answer(mode, messages, place) {
  if (mode) made("h2", "", place, mode);
  const text = made("p", "text", place);
  const speed = made("p", "speed", place);
  const times = [];
  const start = performance.now();
  const body = {
    model: model.id,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: Number(at("tokens").value),
  };
  if (mode === "dense") body.dense = true;
  if (at("temperature").value !== "") body.temperature = Number(at("temperature").value);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta.content;
      if (piece) {
        times.push(performance.now());
        times.first ??= times[0] - start;
        text.textContent += piece;
        at("talk").parentElement.scrollTop = 1e9;
      }
      if (event.usage && times.length) showSpeed(speed, event.usage.completion_tokens, times);
    }
  } catch (error) {
    if (running.signal.aborted) speed.textContent = "stopped";
    else made("p", "wrong", place, error.message);
  }
  return text.textContent;
}

async function send() {
  const message = at("message").value;
  if (running || !model || !message.trim() || !at("form").reportValidity()) return;
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("empty").hidden = true;
  at("message").value = "";
  const item = made("li", "", at("talk"));
  made("div", "mine", item, message);
  const talk = turns; // Clear begins another one
  talk.push({ role: "user", content: message });
  const chosen = document.querySelector("input[name=mode]:checked").value;
  const modes = !model.sparse ? [""] : chosen === "both" ? ["sparse", "dense"] : [chosen];
  const answers = made("div", "answers", made("li", "", at("talk")));
  const places = modes.map((mode) => made("section", `answer ${mode}`, answers));
  let first = null;
  // One after the other, or each would slow the other down. The conversation goes on from the first.
  for (const [i, mode] of modes.entries()) {
    if (running.signal.aborted) break;
    const written = await answer(mode, talk, places[i]);
    first ??= written;
  }
  if (first) talk.push({ role: "assistant", content: first });
  else talk.pop();
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  at("message").focus();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  at("talk").replaceChildren();
  at("empty").hidden = false;
  at("message").focus();
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  at("key").value = "";
  connect();
});
connect();

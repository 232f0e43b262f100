// A small Mamba that writes: its weights load on a click, a beginning is read, and it goes on character by character.
import { buttons, el, OKABE_ITO, sentence, slider, svg } from "./core.js";
import { fetched, times } from "./weights.js";

const WEIGHTS = new URL("../../models/speak.bin", import.meta.url);
const SHOWN = 32, LENGTH = 400, PAUSE = 15; // characters in the strip; characters to write; milliseconds after each

const silu = (x) => x / (1 + Math.exp(-x));
const softplus = (x) => (x > 20 ? x : Math.log1p(Math.exp(x)));
const normed = (x, { data }) => { // divided by the root of the mean square
  const root = Math.sqrt(x.reduce((sum, a) => sum + a * a, 0) / x.length + 1e-5);
  return x.map((a, i) => (a / root) * data[i]);
};

/** The model and its state: `step(id)` reads one character and returns a score for each that may follow. */
export class Mamba {
  constructor({ metadata, weights }) {
    Object.assign(this, { alphabet: [...metadata.alphabet], weights });
    this.layers = Object.keys(weights).filter((name) => name.endsWith("A_log")).map((name) => {
      const part = (rest) => weights[name.replace("mixer.A_log", rest)];
      const mixer = Object.fromEntries(["in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
        "dt_proj.bias", "D", "out_proj.weight"].map((rest) => [rest.replace(".weight", ""), part(`mixer.${rest}`)]));
      return { norm: part("norm.weight"), A: weights[name].data.map((a) => -Math.exp(a)), states: weights[name].shape[1], ...mixer };
    });
    this.clear();
  }

  /** Forget all that was read. */
  clear() {
    for (const layer of this.layers) {
      const channels = layer.D.data.length;
      layer.h = new Float64Array(channels * layer.states);
      layer.window = Array.from({ length: layer.conv1d.shape[2] }, () => new Float64Array(channels));
    }
  }

  step(id) {
    const { shape: [, width], data } = this.weights["embeddings.weight"];
    let x = Float64Array.from(data.subarray(id * width, (id + 1) * width));
    for (const layer of this.layers) {
      const out = this.block(layer, normed(x, layer.norm));
      x = x.map((a, i) => a + out[i]);
    }
    return times(this.weights["embeddings.weight"], normed(x, this.weights["norm_f.weight"]));
  }

  block(layer, x) {
    const channels = layer.D.data.length, N = layer.states, both = times(layer.in_proj, x);
    layer.window = [...layer.window.slice(1), both.subarray(0, channels)];
    const taps = layer.window.length;
    const u = Float64Array.from({ length: channels }, (_, d) =>
      silu(layer.window.reduce((sum, was, k) => sum + was[d] * layer.conv1d.data[d * taps + k], layer["conv1d.bias"].data[d])));
    const chosen = times(layer.x_proj, u), rank = chosen.length - 2 * N;
    const B = chosen.subarray(rank, rank + N), C = chosen.subarray(rank + N);
    layer.delta = times(layer.dt_proj, chosen.subarray(0, rank)).map((a, d) => softplus(a + layer["dt_proj.bias"].data[d]));
    const y = u.map((input, d) => {
      let sum = layer.D.data[d] * input;
      for (let n = 0, at = d * N; n < N; n++, at++) {
        layer.h[at] = Math.exp(layer.delta[d] * layer.A[at]) * layer.h[at] + layer.delta[d] * B[n] * input;
        sum += C[n] * layer.h[at];
      }
      return sum * silu(both[channels + d]);
    });
    return times(layer.out_proj, y);
  }

  /** The mean step length of each layer at the character read last. */
  steps() {
    return this.layers.map(({ delta }) => delta.reduce((a, b) => a + b) / delta.length);
  }
}

/** Random numbers from 0 to 1 that a seed decides (mulberry32). */
export const random = (seed) => () => {
  seed = (seed + 0x6d2b79f5) | 0;
  let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
};

/** The character that is drawn: scores are divided by the temperature, and chance is a number from 0 to 1. */
export function draw(scores, temperature, chance) {
  const most = Math.max(...scores), odds = Array.from(scores, (s) => Math.exp((s - most) / temperature));
  let left = chance * odds.reduce((a, b) => a + b, 0);
  return Math.max(0, odds.findIndex((p) => (left -= p) < 0));
}

export default function begin(stage, { start, text, steps, kilobytes, temperature, seed }) {
  let model, scores, running = false, layer = steps.length - 1, heat = temperature;
  let track = [...text].slice(-SHOWN).map((character, i) => ({ character, steps: steps.map((each) => each[i]) }));

  const beginning = el("textarea", { id: "speak-beginning", rows: 2, maxlength: 300, spellcheck: "false" });
  beginning.value = start;
  const number = el("input", { id: "speak-seed", type: "number", min: 0, max: 9999, step: 1, value: seed });
  const load = el("button", { type: "button", onclick: fetchWeights }, `Load the model (${kilobytes} kB)`);
  const write = el("button", { type: "button", disabled: true, onclick: speak }, "Write");
  const stop = el("button", { type: "button", disabled: true, onclick: () => { running = false; } }, "Stop");
  const written = el("pre", { class: "written", role: "region", "aria-label": "What the model wrote" });
  const prompt = el("b", {}, start), after = el("span", {}, text.slice(start.length));
  written.append(prompt, after);
  const said = sentence();
  said.say("Written by this model beforehand. Load it to have it go on from a beginning of your own.");

  const bars = Array.from({ length: SHOWN }, (_, i) => ({
    bar: svg("rect", { x: i * 11 + 1.5, width: 8, fill: OKABE_ITO[0] }),
    letter: svg("text", { x: i * 11 + 5.5, y: 74, "text-anchor": "middle" }),
  }));
  const strip = svg("svg", { class: "speak-strip", viewBox: `0 0 ${SHOWN * 11} 80`, "aria-hidden": "true" },
    ...bars.flatMap(({ bar, letter }) => [bar, letter]));
  const height = (step) => Math.min(58, 550 * step);
  const redraw = () => bars.forEach(({ bar, letter }, i) => {
    const one = track[i - SHOWN + track.length];
    const tall = one ? height(one.steps[layer]) : 0;
    bar.setAttribute("y", 60 - tall);
    bar.setAttribute("height", tall);
    letter.textContent = !one ? "" : one.character === "\n" ? "↵" : one.character === " " ? "␣" : one.character;
  });
  const read = (id) => {
    scores = model.step(id);
    track = [...track, { character: model.alphabet[id], steps: model.steps() }].slice(-SHOWN);
  };

  async function fetchWeights() {
    model = await fetched(WEIGHTS, load, said, (file) => new Mamba(file));
    if (!model) return;
    write.disabled = false;
    write.focus();
    load.remove();
    said.say("The model is loaded. Type a beginning and press Write.");
  }

  /** Do something so many times, or until the reader stops it, and let the page answer in between. */
  async function each(count, pause, one) {
    let done = 0;
    while (done < count && running) {
      one(done++);
      redraw();
      await new Promise((resume) => setTimeout(resume, pause));
    }
    return done;
  }

  async function speak() {
    const given = [...beginning.value], ids = given.map((c) => model.alphabet.indexOf(c)).filter((id) => id >= 0);
    const left = given.length - ids.length;
    if (!ids.length) { said.say("Type a beginning of at least one letter first."); return; }
    running = true;
    write.disabled = true;
    stop.disabled = false;
    model.clear();
    track = [];
    prompt.textContent = ids.map((id) => model.alphabet[id]).join("");
    after.textContent = "";
    said.say("Writing…");
    await each(ids.length, 0, (i) => read(ids[i]));
    const chance = random(+number.value);
    const count = await each(LENGTH, PAUSE, () => {
      const id = draw(scores, heat, chance());
      after.textContent += model.alphabet[id];
      read(id);
    });
    running = false;
    write.disabled = false;
    stop.disabled = true;
    said.say(`${count} characters written${left ? `; ${left} of the beginning left out, which the model does not know` : ""}.`);
  }

  stage.append(
    el("div", { class: "speak-ask" }, el("label", { for: beginning.id }, "Beginning"), beginning),
    el("div", { class: "controls" },
      slider({ label: "Temperature", min: 0.2, max: 1.5, step: 0.1, value: heat, format: (x) => x.toFixed(1), oninput: (x) => { heat = x; } }),
      el("div", { class: "control" }, el("label", { for: number.id }, "Seed"), number),
      el("div", { class: "control buttons" }, load, write, stop)),
    written,
    el("div", { class: "controls" }, buttons({ label: "Layer whose steps are drawn", value: layer,
      options: steps.map((_, i) => `Layer ${i + 1}`), onchange: (i) => { layer = i; redraw(); } })),
    strip, said);
  redraw();
}

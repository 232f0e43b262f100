// A recording is told to N numbers, one sample after another (HiPPO-LegT): what they can tell of the last window.
import { buttons, el, OKABE_ITO, percent, sentence, svg } from "./core.js";

const zeros = (rows, columns) => Array.from({ length: rows }, () => new Float64Array(columns));

function multiply(a, b) {
  const out = zeros(a.length, b[0].length);
  a.forEach((row, i) => row.forEach((x, k) => { if (x) for (let j = 0; j < b[k].length; j++) out[i][j] += x * b[k][j]; }));
  return out;
}

/** exp of a square matrix: a Taylor polynomial of the matrix halved `times` times, then as many squarings. */
function exponential(matrix, times = 10, terms = 10) {
  const small = matrix.map((row) => row.map((x) => x / 2 ** times));
  let sum = matrix.map((row, i) => row.map((_, j) => +(i === j))), term = sum;
  for (let k = 1; k <= terms; k++) {
    term = multiply(term, small).map((row) => row.map((x) => x / k));
    sum = sum.map((row, i) => row.map((x, j) => x + term[i][j]));
  }
  for (let k = 0; k < times; k++) sum = multiply(sum, sum);
  return sum;
}

/** The state of n numbers after each sample, as nondual.efficient_attention.hippo.legt_states. */
export function states(signal, n, window) {
  const root = Array.from({ length: n }, (_, i) => Math.sqrt(2 * i + 1)), whole = zeros(n + 1, n + 1);
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < n; k++) whole[i][k] = (-root[i] * root[k] * (k <= i || (k - i) % 2 === 0 ? 1 : -1)) / window;
    whole[i][n] = root[i] / window;
  }
  const step = exponential(whole);
  let state = new Float64Array(n);
  return signal.map((sample) => (state = state.map((_, i) => {
    let sum = step[i][n] * sample;
    for (let k = 0; k < n; k++) sum += step[i][k] * state[k];
    return sum;
  })));
}

/** The past that a state stands for, at the middle of each sample of the window, the oldest first. */
export function reconstruct(state, window) {
  return Array.from({ length: window }, (_, j) => {
    const z = (2 * j + 1) / window - 1;
    let before = 1, now = z, sum = state[0];
    for (let n = 1; n < state.length; n++) {
      sum += state[n] * Math.sqrt(2 * n + 1) * now;
      [before, now] = [now, ((2 * n + 1) * z * now - n * before) / (n + 1)];
    }
    return sum;
  });
}

const power = (numbers) => numbers.reduce((sum, x) => sum + x * x, 0);
const line = (numbers, x = (i) => i) => "M" + numbers.map((y, i) => `${x(i).toFixed(2)} ${(-y).toFixed(3)}`).join("L");

export default function begin(stage, { signal, rate, window, sizes, start }) {
  const told = {}, length = signal.length, highest = (numbers) => Math.max(...numbers.map(Math.abs));
  let { now, size } = start;
  const plot = (...parts) => svg("svg", { preserveAspectRatio: "none", "aria-hidden": "true" }, ...parts);
  const fit = (node, width, most) => node.setAttribute("viewBox", `0 ${-most} ${width} ${2 * most}`);

  const most = highest(signal), span = svg("rect", { y: -most, width: window, height: 2 * most, class: "span" });
  const whole = plot(span, svg("path", { d: line(signal), class: "signal" }));
  fit(whole, length, most);
  const was = svg("path", { class: "signal" }), drawn = svg("path", { class: "drawn", stroke: OKABE_ITO[0] });
  const bars = svg("g", { fill: OKABE_ITO[0] });
  const past = plot(was, drawn), zero = svg("path", { class: "zero" }), kept = plot(zero, bars);
  const key = (name, word, stroke) => el("span", { class: "key" }, svg("svg", { viewBox: "0 -1 10 2" }, svg("path", { d: "M0 0H10", class: name, stroke })), word);
  const error = el("strong", { class: "error" }), count = el("span"), said = sentence();
  const seconds = (samples) => `${(samples / rate).toFixed(2)} s`;

  const draw = () => {
    told[size] ??= states(signal, size, window);
    const state = told[size][now - 1], heard = signal.slice(now - window, now), guess = reconstruct(state, window);
    const lost = Math.sqrt(power(heard.map((x, i) => x - guess[i])) / power(heard));
    span.setAttribute("x", now - window);
    was.setAttribute("d", line(heard, (i) => i + 0.5));
    drawn.setAttribute("d", line(guess, (i) => i + 0.5));
    fit(past, window, Math.max(highest(heard), highest(guess)));
    fit(kept, size, highest(state));
    zero.setAttribute("d", `M0 0H${size}`);
    bars.replaceChildren(...Array.from(state, (c, i) => svg("rect",
      { x: i + 0.1, width: 0.8, y: Math.min(0, -c), height: Math.abs(c) })));
    count.textContent = `the state: ${size} numbers, from slow swings to fast`;
    error.textContent = `${percent(lost)} of the signal lost`;
    range.setAttribute("aria-valuetext", seconds(now));
    output.textContent = seconds(now);
    said.say(`At ${seconds(now)} the state has been told ${now} samples. Drawn from its ${size} numbers alone, ` +
      `the last ${window / rate} seconds lose ${percent(lost)} of the signal (root mean square).`);
  };
  const pick = buttons({ label: "N, the numbers in the state", options: sizes.map(String), value: sizes.indexOf(size),
    onchange: (i) => { size = sizes[i]; draw(); } });
  const range = el("input", { type: "range", id: "remember-now", min: window, max: length, step: 4, "aria-label": "now",
    oninput: () => { now = +range.value; draw(); } });
  range.value = now;
  range.style.marginLeft = `${(100 * window) / length}%`; // so that the handle is under the end of the window
  range.style.width = `${100 - (100 * window) / length}%`;
  const output = el("output", { for: "remember-now" });
  const ends = (...words) => el("div", { class: "ends" }, ...words.map((word) => el("span", {}, word)));
  stage.append(
    el("div", { class: "controls" }, el("span", { class: "control", "aria-hidden": "true" }, "N"), pick),
    el("div", { class: "recording" }, whole, range, ends("0 s", el("span", {}, "now: ", output), `${length / rate} s`)),
    el("div", { class: "lately", "aria-hidden": "true" },
      ends(el("span", {}, key("signal", "the signal"), key("drawn", "drawn from the state", OKABE_ITO[0])), error),
      past, ends(`${window / rate} s before now`, "now")),
    el("div", { class: "held", "aria-hidden": "true" }, count, kept), said);
  draw();
}

// A Continuous Thought Machine looks at a picture tick by tick: where it looks, what it says, how sure it is, and when it
// would stop. Once its weights are loaded, parts of the picture can be hidden, and noise added.
import { decimal, el, OKABE_ITO, percent, sentence, slider, softmax, svg } from "./core.js";
import { random } from "./speak.js";
import { fetched, normed, plus, times } from "./weights.js";

const WEIGHTS = new URL("../../models/ctm.safetensors", import.meta.url);
const SIDE = 28, PLACES = 7, PATCH = SIDE / PLACES, HEADS = 4, PAUSE = 700; // milliseconds a tick while it plays
const [RIGHT, , , WRONG] = OKABE_ITO;

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const glu = (x) => x.slice(0, x.length / 2).map((a, i) => a * sigmoid(x[x.length / 2 + i]));
const best = (numbers) => numbers.indexOf(Math.max(...numbers));

/** The machine; its formulas are in the docstrings of src/nondual/recent/ctm.py and ctm_parts.py. */
export class Machine {
  constructor({ weights }) {
    this.weights = weights;
    this.kept = Object.fromEntries(["action", "output"].map((part) =>
      [part, Float64Array.from(weights[`${part}.decay`].data, (r) => Math.exp(-Math.min(Math.max(r, 0), 15)))]));
  }

  linear(part, x) {
    return plus(times(this.weights[`${part}.weight`], x), this.weights[`${part}.bias`].data);
  }

  norm(part, x) {
    return normed(x, { weight: this.weights[`${part}.weight`], bias: this.weights[`${part}.bias`] });
  }

  /** A 3 x 3 convolution that halves the side, batch norm and ReLU; x holds a square of numbers for each channel. */
  convolved(part, x, side) {
    const { shape: [channels], data } = this.weights[`${part}.0.weight`], half = side / 2;
    const [gain, shift, mean, variance] = ["weight", "bias", "running_mean", "running_var"].map((name) => this.weights[`${part}.1.${name}`].data);
    return Array.from({ length: channels }, (_, c) => Float64Array.from({ length: half * half }, (_, at) => {
      const top = 2 * Math.floor(at / half) - 1, left = 2 * (at % half) - 1; // -1 is the padding, of zeros
      let sum = 0;
      for (let i = 0; i < x.length; i++) for (let dy = 0; dy < 3; dy++) for (let dx = 0; dx < 3; dx++) {
        if (top + dy >= 0 && left + dx >= 0) sum += data[((c * x.length + i) * 3 + dy) * 3 + dx] * x[i][(top + dy) * side + left + dx];
      }
      return Math.max(0, ((sum - mean[c]) / Math.sqrt(variance[c] + 1e-5)) * gain[c] + shift[c]);
    }));
  }

  /** The sums of a synchronisation after one tick more, and what is read from them. */
  synchronised(part, z, { products, weights }) {
    const pairs = this.weights[`${part}.pairs`].data, kept = this.kept[part], size = kept.length;
    products = products.map((sum, p) => sum * kept[p] + z[pairs[p]] * z[pairs[size + p]]);
    weights = weights.map((sum, p) => sum * kept[p] + 1);
    return { found: products.map((sum, p) => sum / Math.sqrt(weights[p])), sums: { products, weights } };
  }

  /** The post-activation of neuron d, by a network of its own from its last pre-activations. */
  neuron(d, history) {
    const [w1, b1, w2, b2] = ["weight1", "bias1", "weight2", "bias2"].map((name) => this.weights[`neurons.${name}`]);
    const layer = ({ shape: [, wide, out], data }, bias, x) => Float64Array.from({ length: out }, (_, o) =>
      x.reduce((sum, a, i) => sum + a * data[(d * wide + i) * out + o], bias.data[d * out + o]));
    return glu(layer(w2, b2, glu(layer(w1, b1, history))))[0];
  }

  /** The state before the first tick; x holds the picture's numbers, row by row. */
  begin(x) {
    const { weights: w } = this, D = w.first_neurons.shape[0], M = w.first_history.shape[1], none = new Float64Array(this.kept.action.length);
    const channels = this.convolved("backbone.layers.1", this.convolved("backbone.layers.0", [x], SIDE), SIDE / 2);
    const features = Array.from({ length: PLACES ** 2 }, (_, n) => {
      const own = Float64Array.from(channels, (channel, c) => channel[n] + w["backbone.places"].data[n * channels.length + c]);
      return this.norm("to_features.1", this.linear("to_features.0", own));
    });
    const z = Float64Array.from(w.first_neurons.data), zero = { products: none, weights: none };
    return { z, keys: features.map((f) => this.linear("attention.k_proj", f)), values: features.map((f) => this.linear("attention.v_proj", f)),
      history: Array.from({ length: D }, (_, d) => w.first_history.data.slice(d * M, (d + 1) * M)),
      action: zero, output: this.synchronised("output", z, zero).sums };
  }

  /** One tick: the scores of the classes, the weight of each place (the mean of the heads), and the state after it. */
  tick({ z, keys, values, history, action, output }) {
    const asked = this.synchronised("action", z, action);
    const q = this.linear("attention.q_proj", this.linear("to_query", asked.found)), width = q.length / HEADS;
    const looks = new Float64Array(keys.length), seen = new Float64Array(q.length);
    for (let from = 0; from < q.length; from += width) {
      const own = (x) => x.subarray(from, from + width);
      softmax(keys.map((k) => own(k).reduce((sum, x, i) => sum + x * q[from + i], 0) / Math.sqrt(width))).forEach((weight, n) => {
        looks[n] += weight / HEADS;
        own(values[n]).forEach((x, i) => { seen[from + i] += weight * x; });
      });
    }
    const into = Float64Array.from([...this.linear("attention.out_proj", seen), ...z]);
    const next = this.norm("synapses.norm", glu(this.linear("synapses.linear", into)));
    history = history.map((own, d) => Float64Array.from([...own.slice(1), next[d]]));
    z = Float64Array.from(history, (own, d) => this.neuron(d, own));
    const answered = this.synchronised("output", z, output);
    return { scores: this.linear("to_prediction", answered.found), looks,
      state: { z, keys, values, history, action: asked.sums, output: answered.sums } };
  }

  /** All ticks: the chances of the classes, the certainty (1 for one answer alone, 0 for all alike), and the weights. */
  think(x, ticks) {
    let state = this.begin(x);
    return Array.from({ length: ticks }, () => {
      const found = this.tick(state), chances = [...softmax(found.scores)];
      state = found.state;
      const entropy = chances.reduce((sum, p) => sum - (p ? p * Math.log(p) : 0), 0);
      return { chances, sure: 1 - entropy / Math.log(chances.length), looks: found.looks };
    });
  }
}

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/** Numbers of mean 0 and deviation 1, the same at each visit: two for each pair of even ones (Box and Muller). */
export function noiseOf(count) {
  const chance = random(5);
  return Float64Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(1 - chance())) * Math.cos(2 * Math.PI * chance()));
}

export default function begin(stage, { names, pictures, mean, deviation, trained, ticks, threshold, kilobytes, start }) {
  let model, timer, { picture, tick } = start, hidden = new Set(), noise = 0, focus = 0;
  const grain = noiseOf(SIDE * SIDE), said = sentence();
  const plain = pictures.map(({ pixels }) => Float64Array.from(bytes(pixels), (grey) => (grey - mean) / deviation));
  /** What torch computed of the pictures as they are; the weights of a tick are shares of its largest. */
  const stored = pictures.map(({ chances, sure, most, looks }) => {
    const shares = bytes(looks), places = PLACES ** 2;
    return sure.map((each, t) => ({ chances: chances[t], sure: each,
      looks: [...shares.subarray(t * places, (t + 1) * places)].map((share) => (share / 255) * most[t]) }));
  });
  let thoughts = stored[picture];

  const placeOf = (pixel) => PLACES * Math.floor(pixel / SIDE / PATCH) + Math.floor((pixel % SIDE) / PATCH);
  /** The picture as the machine gets it: with noise, and what is hidden at the mean of all pictures. */
  const given = () => plain[picture].map((x, i) => (hidden.has(placeOf(i)) ? 0 : x + noise * grain[i]));
  const changed = () => hidden.size > 0 || noise > 0;

  function painted(canvas, x) {
    const image = new ImageData(SIDE, SIDE);
    x.forEach((value, i) => {
      image.data.fill(255 - (value * deviation + mean), 4 * i, 4 * i + 3); // clamped; what is worn is dark
      image.data[4 * i + 3] = 255;
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }
  const canvas = () => el("canvas", { width: SIDE, height: SIDE, "aria-hidden": "true" });

  // --- the pictures to choose from, with how each is named at this tick ---
  const thumbs = pictures.map((_, i) => el("button", { type: "button", role: "radio", onclick: () => choose(i) }, painted(canvas(), plain[i])));
  const gallery = el("div", { class: "ctm-pictures", role: "radiogroup", "aria-label": "A picture" }, ...thumbs);
  gallery.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key], end = { Home: 0, End: pictures.length - 1 }[event.key];
    if (step === undefined && end === undefined) return;
    event.preventDefault();
    choose(end ?? (picture + step + pictures.length) % pictures.length);
    thumbs[picture].focus();
  });

  // --- the picture, under a table of places that can be hidden ---
  const large = canvas();
  const cells = Array.from({ length: PLACES ** 2 }, (_, i) => el("td", { role: "gridcell" }));
  const grid = el("table", { role: "grid", "aria-multiselectable": "true", "aria-label": "The places of the picture; a selected one is hidden" },
    el("tbody", {}, ...Array.from({ length: PLACES }, (_, row) => el("tr", { role: "row" }, ...cells.slice(row * PLACES, (row + 1) * PLACES)))));
  const cellOf = (event) => cells.indexOf(event.target.closest("td"));
  let brush; // while a mouse button is held over the picture: whether it hides or shows
  const hide = (i, on) => {
    if (!model) { say("To hide parts of the picture, load the machine first. "); return; }
    if (i < 0 || hidden.has(i) === on) return;
    hidden[on ? "add" : "delete"](i);
    think();
  };
  const at = (i) => { focus = i; cells.forEach((cell, j) => { cell.tabIndex = j === focus ? 0 : -1; }); };
  grid.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button || cellOf(event) < 0) return;
    brush = !hidden.has(cellOf(event));
    hide(cellOf(event), brush);
  });
  grid.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && event.buttons & 1 && brush !== undefined && model) hide(cellOf(event), brush);
  });
  grid.addEventListener("click", (event) => { // a mouse has hidden it already; a finger or a pen has not
    const i = cellOf(event);
    if (i >= 0) at(i);
    if (brush === undefined && i >= 0) hide(i, !hidden.has(i));
    brush = undefined;
  });
  grid.addEventListener("keydown", (event) => {
    const row = Math.floor(focus / PLACES), column = focus % PLACES, last = PLACES - 1;
    const to = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], Home: [row, 0], End: [row, last] }[event.key];
    if (to) {
      const [y, x] = to.map((k) => Math.min(Math.max(k, 0), last));
      at(y * PLACES + x);
      cells[focus].focus();
    } else if (event.key === " " || event.key === "Enter") hide(focus, !hidden.has(focus));
    else return;
    event.preventDefault();
  });

  // --- what it says, and how sure it is ---
  const bars = names.map((name) => {
    const bar = el("span", { class: "bar" }), share = el("span", { class: "share" });
    return { node: el("li", {}, el("span", { class: "name" }, name), el("span", { class: "track", "aria-hidden": "true" }, bar), share), bar, share };
  });
  const X = (t) => 28 + ((t - 1) * 290) / (ticks - 1), Y = (c) => 178 - 150 * c;
  const label = (x, y, text, anchor = "start") => svg("text", { x, y, "text-anchor": anchor }, text);
  const line = svg("path", { class: "curve" }), ring = svg("circle", { r: 9, class: "now" }), end = X(trained + 0.5);
  const stop = svg("path", { class: "stop", fill: "currentColor" }), stops = label(0, 13, "");
  const dots = Array.from({ length: ticks }, () => svg("circle", { r: 4.5, "stroke-width": 2 }));
  const curve = svg("svg", { viewBox: "0 0 330 202", "aria-hidden": "true", onclick: (event) => {
    const { left, width } = curve.getBoundingClientRect(), x = ((event.clientX - left) / width) * 330;
    pause();
    move(Math.min(Math.max(Math.round(1 + ((x - X(1)) / (X(ticks) - X(1))) * (ticks - 1)), 1), ticks));
  } },
    svg("path", { class: "axis", d: `M${X(1) - 9} ${Y(1)}V${Y(0)}H${X(ticks) + 9}` }),
    ...[0, 0.5, 1].map((c) => label(X(1) - 13, Y(c) + 4, c, "end")), label(0, Y(0) + 18, "tick"),
    ...[1, 4, 8, 12, 16].map((t) => label(X(t), Y(0) + 18, t, "middle")),
    svg("path", { class: "guide", d: `M${X(1) - 9} ${Y(threshold)}H${X(ticks) + 9}` }), label(X(1) - 4, Y(threshold) - 5, `enough: ${threshold}`),
    svg("path", { class: "guide", d: `M${end} ${Y(1)}V${Y(0)}` }), label(end + 5, Y(0) - 6, "training ended here"),
    line, ...dots, ring, stop, stops);

  // --- the controls ---
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const play = el("button", { type: "button", onclick: () => (timer ? pause() : run()) }, "Play");
  const back = el("button", { type: "button", onclick: () => { pause(); move(tick - 1); } }, "Back");
  const next = el("button", { type: "button", onclick: () => { pause(); move(tick + 1); } }, "Next");
  const scrub = slider({ label: "Tick", min: 1, max: ticks, step: 1, value: tick, format: (t) => `${t} of ${ticks}`, oninput: (t) => { pause(); move(t); } });
  const load = el("button", { type: "button", onclick: fetchWeights }, `Load the machine (${kilobytes} kB)`);
  const rough = slider({ label: "Noise", min: 0, max: 2, step: 0.1, value: 0, format: (x) => x.toFixed(1), oninput: (x) => { noise = x; think(); } });
  const restore = el("button", { type: "button", onclick: () => { clear(); think(); } }, "Reset");
  rough.hidden = restore.hidden = true;
  const how = el("p", { class: "ask" }, "It can also think about a changed picture:");

  function pause() {
    if (!timer) return;
    clearInterval(timer);
    timer = undefined;
    play.textContent = "Play";
    draw();
  }
  function run() {
    play.textContent = "Pause";
    timer = setInterval(() => { if (tick < ticks) move(tick + 1); if (tick === ticks) pause(); }, PAUSE);
    move(tick === ticks ? 1 : tick);
  }
  const move = (t) => { tick = Math.min(Math.max(t, 1), ticks); scrub.set(tick); draw(); };
  const clear = () => { hidden = new Set(); noise = 0; rough.set(0); };
  const choose = (i) => { picture = i; clear(); think(); };

  /** Think about the picture as it now is, from what was stored or by the machine. */
  function think() {
    thoughts = changed() ? model.think(given(), ticks) : stored[picture];
    painted(large, given());
    draw();
  }

  async function fetchWeights() {
    model = await fetched(WEIGHTS, load, said, (file) => new Machine(file));
    if (!model) return;
    load.remove();
    rough.hidden = restore.hidden = false;
    how.textContent = "Press places to hide them, or add noise:";
    say("The machine is loaded. ");
  }

  /** The sentence; while the machine plays, it is not spoken. */
  function say(first = "") {
    const { chances, sure } = thoughts[tick - 1], says = best(chances), right = pictures[picture].label;
    const stopped = thoughts.findIndex((each) => each.sure >= threshold) + 1;
    const count = stored.filter((each, i) => best(each[tick - 1].chances) === pictures[i].label).length;
    const before = stored[picture][tick - 1];
    said.say(`${first}Tick ${tick}${tick > trained ? `, ${tick - trained} past its training` : ""}: it says ${names[says]} (${percent(chances[says])}), ` +
      `${says === right ? "and is right" : `but the right answer is ${names[right]}`}. Certainty ${decimal(sure)}. ` +
      (!stopped ? "It is never sure enough to stop. "
        : `${stopped > trained ? `Not sure enough by tick ${trained}; going on, it would stop` : "Sure enough to stop"} at tick ${stopped}, saying ${names[best(thoughts[stopped - 1].chances)]}. `) +
      (changed() ? `Of the picture as it was it says ${names[best(before.chances)]} here, certainty ${decimal(before.sure)}.`
        : `At this tick it is right on ${count} of the ${pictures.length} pictures.`), { aloud: !timer });
  }

  function draw() {
    const { chances, looks } = thoughts[tick - 1], right = pictures[picture].label;
    thumbs.forEach((thumb, i) => {
      const named = best((i === picture ? thoughts : stored[i])[tick - 1].chances); // the chosen one as it now is
      thumb.className = named === pictures[i].label ? "right" : "wrong";
      thumb.setAttribute("aria-checked", i === picture);
      thumb.tabIndex = i === picture ? 0 : -1;
      thumb.setAttribute("aria-label", `${i + 1}: ${names[pictures[i].label]}, here named ${names[named]}`);
    });
    const most = Math.max(...thoughts.flatMap((each) => [...each.looks]));
    cells.forEach((cell, i) => {
      const off = hidden.has(i);
      cell.style.setProperty("--glow", (0.8 * looks[i]) / most);
      cell.setAttribute("aria-selected", off);
      cell.setAttribute("aria-label", `Row ${Math.floor(i / PLACES) + 1}, column ${(i % PLACES) + 1}: ${percent(looks[i])} of the attention`);
    });
    bars.forEach(({ node, bar, share }, k) => {
      node.className = [k === right ? "right" : "", k === best(chances) ? "answer" : ""].join(" ").trim();
      bar.style.width = `${100 * chances[k]}%`;
      share.textContent = percent(chances[k]);
    });
    line.setAttribute("d", `M${thoughts.map(({ sure }, t) => `${X(t + 1)} ${Y(sure)}`).join("L")}`);
    dots.forEach((dot, t) => {
      const good = best(thoughts[t].chances) === right;
      dot.setAttribute("class", good ? "right" : "wrong");
      dot.setAttribute("cx", X(t + 1));
      dot.setAttribute("cy", Y(thoughts[t].sure));
    });
    ring.setAttribute("cx", X(tick));
    ring.setAttribute("cy", Y(thoughts[tick - 1].sure));
    const stopped = thoughts.findIndex(({ sure }) => sure >= threshold) + 1, x = X(stopped || 1), late = stopped > ticks / 2;
    stop.setAttribute("d", stopped ? `M${x - 5} 4h10l-5 9z` : "");
    stops.textContent = !stopped ? "never sure enough" : stopped > trained ? "would stop, if it went on" : "would stop";
    stops.setAttribute("x", !stopped ? x - 4 : late ? x - 9 : x + 9);
    stops.setAttribute("text-anchor", late ? "end" : "start");
    say();
  }

  stage.append(
    el("p", { class: "ask" }, "Choose a picture: those it is sure of soonest first, unsure ones last. Under each: ",
      el("span", { class: "ctm-key right" }, "named rightly"), " or ", el("span", { class: "ctm-key wrong" }, "wrongly"), " at this tick."), gallery,
    el("div", { class: "ctm" },
      el("div", { class: "ctm-picture" }, large, grid),
      el("div", { class: "ctm-change" }, how, el("div", { class: "controls" }, load, rough, restore)),
      el("div", { class: "ctm-side" },
        el("div", { class: "controls" }, el("div", { class: "control buttons" }, back, ...(still ? [] : [play]), next), scrub), said,
        el("div", { class: "ctm-panels" },
          el("div", {}, el("p", { class: "ask" }, "It says:"), el("ol", {}, ...bars.map(({ node }) => node))),
          el("div", {}, el("p", { class: "ask" }, "Certainty at each tick; filled where it is right:"), curve)))));
  at(24); // the place in the middle
  think();
}

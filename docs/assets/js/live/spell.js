// A network that spells a word in phonemes: for each it asks which letters to look at, and the figure shows where it looks.
import { choice, cividis, el, percent, sentence, slider, softmax, toggle } from "./core.js";
import { fetched, normed, plus, times } from "./weights.js";

const WEIGHTS = new URL("../../models/spell.bin", import.meta.url);
const MOST_LETTERS = 20, MOST_STEPS = 32, PULL = 0.1;

/** How a reader of English may hear the phonemes that the network writes most. */
const AS_IN = { ɑ: "father", æ: "cat", ʌ: "cut", ə: "about", ɔ: "law", aʊ: "now", aɪ: "my", ɛ: "bed", ɝ: "bird", eɪ: "say", ɪ: "sit", i: "see",
  oʊ: "go", ɔɪ: "boy", ʊ: "book", u: "too", b: "be", d: "do", f: "few", g: "go", h: "he", j: "yes", k: "key", l: "low", m: "me", n: "no", ŋ: "sing",
  p: "pay", ɹ: "red", s: "so", t: "to", v: "van", w: "we", z: "zoo", ʃ: "she", ʒ: "measure", θ: "think", ð: "this", t͡ʃ: "chin", d͡ʒ: "joy" };

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const joined = (...parts) => Float64Array.from(parts.flatMap((part) => [...part]));

/** One step of a GRU: how much of its state h it replaces by something new, and what, depends on the input x and on h. */
function gated({ weight_ih, weight_hh, bias_ih, bias_hh }, x, h) {
  const given = plus(times(weight_ih, x), bias_ih.data), kept = plus(times(weight_hh, h), bias_hh.data), H = h.length;
  return h.map((was, i) => {
    const r = sigmoid(given[i] + kept[i]), z = sigmoid(given[H + i] + kept[H + i]);
    return (1 - z) * Math.tanh(given[2 * H + i] + r * kept[2 * H + i]) + z * was;
  });
}

/** The network; its formulas, with the names of its weights, are at the top of src/nondual/pretrained/hama.py. */
export class Speller {
  constructor({ metadata, weights }) {
    this.weights = weights;
    this.letters = [...metadata.letters];
    this.phonemes = JSON.parse(metadata.phonemes);
    this.start = this.phonemes.indexOf("<sos>");
    this.end = this.phonemes.indexOf("<eos>");
    this.encoder = [0, 1].map((layer) => ["", "_reverse"].map((way) => this.gru("encoder", `l${layer}${way}`)));
    this.decoder = [0, 1].map((layer) => this.gru("decoder", `l${layer}`));
  }

  gru(part, layer) {
    return Object.fromEntries(["weight_ih", "weight_hh", "bias_ih", "bias_hh"].map((name) => [name, this.weights[`${part}.${name}_${layer}`]]));
  }

  norm(part, x) {
    return normed(x, { weight: this.weights[`${part}.weight`], bias: this.weights[`${part}.bias`] });
  }

  row(table, i) {
    const { shape: [, width], data } = this.weights[`${table}.weight`];
    return Float64Array.from(data.subarray(i * width, (i + 1) * width));
  }

  /** Read the letters of a word, given by number: a state for each, made from those before it and those after it. */
  read(letters) {
    const { weights: w } = this, e = letters.map((letter) => this.row("embedding", letter));
    const taps = w["frontend.0.weight"].data, size = w["frontend.0.weight"].shape[2], reach = (size - 1) / 2;
    const l = e.map((own, j) => {
      const near = own.map((_, c) => {
        let sum = 0;
        for (let t = 0; t < size; t++) sum += taps[c * size + t] * (e[j + t - reach]?.[c] ?? 0);
        return sum;
      });
      return this.norm("frontend_norm", plus(own, times(w["frontend.1.weight"], near)));
    });
    let x = l;
    const state = this.encoder.map((ways) => {
      const last = [];
      const both = ways.map((layer, way) => {
        const states = [];
        let h = new Float64Array(layer.weight_hh.shape[1]);
        for (let k = 0; k < x.length; k++) {
          const j = way ? x.length - 1 - k : k;
          states[j] = h = gated(layer, x[j], h);
        }
        last.push(h);
        return states;
      });
      x = x.map((_, j) => joined(both[0][j], both[1][j]));
      return plus(times(w["bridge.weight"], joined(...last)), w["bridge.bias"].data).map(Math.tanh);
    });
    const h = x.map((g, j) => this.norm("encoder_norm", plus(g, times(w["encoder_skip.weight"], l[j]))));
    return { h, projected: h.map((each) => times(w["attention.w_h.weight"], each)), state, weights: h.map(() => 1 / h.length) };
  }

  /** Write one phoneme: its number, the state, and the weights of the letters, from those of the step before. */
  step(phoneme, { h, projected, state, weights: before }, { location, pull }) {
    const { weights: w } = this, y = this.row("decoder_embedding", phoneme);
    const first = gated(this.decoder[0], y, state[0]), second = gated(this.decoder[1], first, state[1]);
    const s = this.norm("decoder_norm", plus(second, times(w["decoder_skip.weight"], y)));
    const asked = times(w["attention.w_s.weight"], s), { data: v } = w["attention.v"];
    const { shape: [, , size], data: taps } = w["attention.filters.weight"], channels = taps.length / size, reach = (size - 1) / 2;
    const middle = before.reduce((sum, a, k) => sum + k * a, 0);
    const scores = projected.map((found, j) => {
      let sum = 0, compared = plus(asked, found);
      if (location) {
        const f = Float64Array.from({ length: channels }, (_, c) =>
          Array.from({ length: size }, (_, t) => taps[c * size + t] * (before[j + t - reach] ?? 0)).reduce((a, b) => a + b, 0));
        compared = plus(compared, times(w["attention.w_f.weight"], f));
      }
      compared.forEach((x, i) => { sum += v[i] * Math.tanh(x); });
      return sum - (pull ? PULL * Math.abs(j - middle) : 0);
    });
    const weights = softmax(scores);
    const context = this.norm("context_norm", h[0].map((_, i) => weights.reduce((sum, a, j) => sum + a * h[j][i], 0)));
    const x = this.norm("fusion_norm", plus(times(w["fusion.weight"], joined(s, context)), w["fusion.bias"].data).map(Math.tanh));
    const odds = times(w["output.1.weight"], plus(times(w["output.0.weight"], x), w["output.0.bias"].data));
    return { phoneme: odds.indexOf(Math.max(...odds)), memory: { h, projected, state: [first, second], weights } };
  }

  /** Spell a word of letters that it knows: the phonemes, and for each a row with the weights of the letters. */
  spell(word, { location = true, pull = true } = {}) {
    let memory = this.read([...word].map((letter) => this.letters.indexOf(letter))), phoneme = this.start;
    const sounds = [], rows = [];
    while (rows.length < MOST_STEPS) {
      ({ phoneme, memory } = this.step(phoneme, memory, { location, pull }));
      if (phoneme === this.end) break;
      sounds.push(this.phonemes[phoneme]);
      rows.push(memory.weights);
    }
    return { sounds, rows };
  }
}

/** A phoneme as it is shown: without the tie of a double letter, which few fonts can set; a space is a pause. */
const shown = (sound) => (sound === " " ? "␣" : sound.replace("͡", ""));

export default function begin(stage, { words, kilobytes, start }) {
  const all = words.map((each) => each.word); // and later those that the reader typed
  let model, word = words[start.word].word, step = start.step, terms = { location: true, pull: true }, notice = "";
  const stored = ({ runs }) => runs[2 * terms.location + 1 * terms.pull];
  let spelled = stored(words[start.word]);

  const typed = el("input", { id: "spell-word", type: "text", maxlength: MOST_LETTERS, spellcheck: "false", autocapitalize: "none", autocomplete: "off", disabled: true });
  const load = el("button", { type: "button", onclick: fetchWeights }, `Load the model (${kilobytes.toLocaleString("en")} kB)`);
  const go = el("button", { type: "submit", disabled: true }, "Spell it in sounds");
  const form = el("form", { class: "control buttons", onsubmit: (event) => { event.preventDefault(); read(); } },
    el("label", { for: typed.id }, "A word of your own"), typed, load, go);
  const said = sentence();
  const heading = el("thead"), body = el("tbody");
  const table = el("table", { class: "spell", "aria-hidden": "true" }, heading, body);
  const holder = el("div", { class: "spell-table" }, table);

  /** Each row is one question: the phoneme that followed, and how the weights fell on the letters. */
  function draw() {
    const { sounds, rows } = spelled, letters = [...word];
    step = Math.max(0, Math.min(step, rows.length - 1));
    const asked = rows[step] ?? letters.map(() => 0);
    table.style.setProperty("--letters", letters.length);
    table.style.setProperty("--rows", rows.length);
    table.classList.toggle("many", rows.length > 13);
    heading.replaceChildren(
      el("tr", { class: "letters" }, el("th"), ...letters.map((letter, j) =>
        el("th", {}, asked[j] < 0.005 ? "" : el("span", { class: "lit", style: `--share: ${asked[j]}` }), el("b", {}, letter)))),
      el("tr", { class: "shares" }, el("th", {}, "%"), ...asked.map((a) => el("td", {}, a < 0.005 ? "" : `${Math.round(100 * a)}`))));
    body.replaceChildren(...rows.map((row, i) =>
      el("tr", { class: i === step ? "asked" : "", onclick: () => move(i) },
        el("th", {}, shown(sounds[i])), ...row.map((a) => el("td", { style: `background: ${cividis(a)}`, title: percent(a) })))));
    how.querySelector("input").max = Math.max(0, rows.length - 1);
    how.set(step);
    if (!rows.length) { said.say(`${notice}The network writes no sound for this.`); return; }
    const ranked = asked.map((a, j) => [a, j]).sort(([a], [b]) => b - a).slice(0, 2).filter(([a]) => a >= 0.005);
    const place = (j) => `“${letters[j]}”${letters.indexOf(letters[j]) === letters.lastIndexOf(letters[j]) ? "" : ` (letter ${j + 1})`}`;
    const shares = ranked.map(([a, j], rank) => `${percent(a)} ${rank ? "" : "of the attention "}on ${place(j)}`).join(" and ");
    const sound = sounds[step], like = AS_IN[sound] ? `, as in “${AS_IN[sound]}”` : sound === " " ? ", a pause" : "";
    said.say(`${notice}Sound ${step + 1} of ${sounds.length}: ${shown(sound)}${like}, with ${shares}.`);
  }
  const move = (i) => { step = i; notice = ""; draw(); };

  /** The chosen word anew, from what was computed beforehand or by the model. */
  function spell(given, at = 0) {
    word = given;
    const known = words.find((each) => each.word === word);
    spelled = known ? stored(known) : model.spell(word, terms);
    step = at;
    draw();
  }

  function read() {
    const given = [...typed.value.normalize("NFC").toLowerCase()].filter((letter) => letter.trim());
    const kept = given.filter((letter) => model.letters.includes(letter)), strange = given.filter((letter) => !kept.includes(letter));
    notice = "";
    if (!kept.length) { said.say("Type a word of at least one letter that the model knows first."); return; }
    if (strange.length) notice = `Left out, because the model does not know it: ${[...new Set(strange)].join(" ")}. `;
    spell(kept.join(""));
    if (!all.includes(word)) {
      all.push(word);
      chosen.querySelector("select").append(el("option", {}, word));
    }
    chosen.set(all.indexOf(word));
  }

  async function fetchWeights() {
    model = await fetched(WEIGHTS, load, said, (file) => new Speller(file));
    if (!model) return;
    typed.disabled = go.disabled = false;
    typed.focus();
    load.remove();
    said.say("The model is loaded. Type a word and press Spell it in sounds.");
  }

  const chosen = choice({ label: "Word", options: all, value: start.word, onchange: (i) => { notice = ""; spell(all[i]); } });
  const how = slider({ label: "Sound", min: 0, max: spelled.rows.length - 1, step: 1, value: step,
    format: (i) => shown(spelled.sounds[i] ?? " "), oninput: move });
  const term = (label, name) => toggle({ label, checked: true, onchange: (on) => { terms = { ...terms, [name]: on }; notice = ""; spell(word, step); } });
  stage.append(
    el("div", { class: "controls" }, chosen, how),
    el("div", { class: "spell-pair" }, holder, el("div", { class: "spell-side" }, said,
      term("Tell it where it looked before (location term)", "location"), term("Pull it back there (fixed pull)", "pull"), form)));
  draw();
}

// Choose a word of a sentence and a head of the model: arcs and percentages show which words it attends to.
import { buttons, choice, el, named, sentence, slider, svg } from "./core.js";

export default function begin(stage, { digits, layers, heads, sentences, presets }) {
  const at = { sentence: 0, word: 0, layer: 0, head: 0, ...presets[0] };
  const said = sentence(), arcs = svg("svg", { "aria-hidden": "true" });
  const line = el("div", { class: "ask-line" });
  let tokens, places, shares;

  /** The percentages that the chosen word gives to every token; the data has no rows for the two markers. */
  const row = () => {
    const n = tokens.length, start = ((at.layer * heads + at.head) * (n - 2) + at.word - 1) * n;
    return [...sentences[at.sentence].rows.slice(start, start + n)].map((digit) => digits.indexOf(digit));
  };

  /** The sentence anew, as a row of buttons between its two markers. */
  const write = () => {
    tokens = sentences[at.sentence].tokens;
    const words = buttons({ label: "A word of the sentence", options: tokens.slice(1, -1), value: at.word - 1,
      onchange: (i) => { at.word = i + 1; draw(); } });
    const [first, last] = [tokens[0], tokens.at(-1)].map((token) => el("span", { class: "marker" }, token));
    words.prepend(first);
    words.append(last);
    places = [...words.children];
    shares = places.map((place) => place.appendChild(el("span", { class: "share" })));
    line.replaceChildren(arcs, words);
  };

  /** Arcs above the sentence where it fits on one line; beside it, as a column, where it does not. */
  const draw = () => {
    const weights = row();
    places.forEach((place, i) => { shares[i].textContent = ` ${weights[i]}%`; place.classList.toggle("asked", i === at.word); });
    line.classList.remove("column");
    const column = line.scrollWidth > line.clientWidth;
    line.classList.toggle("column", column);
    const [width, height] = [arcs.clientWidth, arcs.clientHeight];
    const middle = places.map((place) => column ? place.offsetTop + place.offsetHeight / 2 : place.offsetLeft + place.offsetWidth / 2);
    const span = middle.at(-1) - middle[0], depth = (column ? width : height) - 8;
    const point = (along, across) => (column ? `${across} ${along}` : `${along} ${height - across}`);
    arcs.setAttribute("viewBox", `0 0 ${width} ${height}`);
    arcs.replaceChildren(...weights.flatMap((weight, i) => {
      if (!weight) return [];
      const loop = i === at.word ? 5 : 0; // a word's arc to itself
      const [a, b] = [middle[at.word] - loop, middle[i] + loop], [p, q] = [a - 2 * loop, b + 2 * loop];
      const rise = (4 / 3) * depth * (0.22 + 0.78 * (Math.abs(b - a) / span));
      return svg("path", { d: `M${point(a, 0)} C${point(p, rise)} ${point(q, rise)} ${point(b, 0)}`, class: "arc",
        "stroke-width": 1 + 0.11 * weight, "stroke-opacity": 0.25 + 0.0075 * weight });
    }));
    const most = weights.map((weight, i) => [weight, i]).sort(([a], [b]) => b - a).slice(0, 3).filter(([weight]) => weight);
    const given = most.map(([weight, i], rank) =>
      `${weight}%${rank ? "" : " of its attention"} to ${i === at.word ? "itself" : named(tokens, i)}`);
    const list = given.length > 1 ? `${given.slice(0, -1).join(", ")} and ${given.at(-1)}` : given[0];
    said.say(`In layer ${at.layer}, head ${at.head}, ${named(tokens, at.word)} gives ${list}.`);
    found.set(presets.findIndex((preset) => Object.entries(preset).every(([key, value]) => key === "label" || at[key] === value)));
  };

  const text = choice({ label: "Sentence", options: sentences.map((given) => given.text), value: at.sentence,
    onchange: (i) => { at.sentence = i; at.word = sentences[i].start; write(); draw(); } });
  const [layer, head] = [["layer", layers], ["head", heads]].map(([name, count]) => slider({
    label: name[0].toUpperCase() + name.slice(1), min: 0, max: count - 1, step: 1, value: at[name],
    oninput: (value) => { at[name] = value; draw(); } }));
  const found = buttons({ label: "Heads that we found", options: presets.map((preset) => preset.label), onchange: (i) => {
    const before = at.sentence;
    Object.assign(at, presets[i]);
    text.set(at.sentence);
    layer.set(at.layer);
    head.set(at.head);
    if (at.sentence !== before || presets[i].word) write();
    draw();
  } });
  stage.append(el("div", { class: "controls" }, text, layer, head),
    el("p", { class: "ask" }, "Choose a word, and see what it attends to:"), line, said,
    el("p", { class: "ask" }, "Heads that we found:"), found);
  write();
  let seen = 0;
  new ResizeObserver(() => {
    if (line.clientWidth !== seen) { seen = line.clientWidth; draw(); }
  }).observe(line);
}

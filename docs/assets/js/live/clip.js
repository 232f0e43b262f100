// A small CLIP: a word is compared with pictures of things that it never met in training, and the nearest are shown.
import { buttons, choice, decimal, el, sentence } from "./core.js";
import { fetched } from "./weights.js";

const HERE = new URL("../../models/", import.meta.url);
const WEIGHTS = new URL("clip.bin", HERE), SPRITE = new URL("clip.webp", HERE);
const SHOWN = 10;

/** The words that were stored and the pictures, as unit vectors; what belongs together has a high cosine. */
export class Finder {
  constructor({ metadata, weights }) {
    this.words = JSON.parse(metadata.words);
    this.place = new Map(this.words.map((word, i) => [word, i]));
    this.vectors = weights.words;
    this.pictures = weights.pictures;
  }

  row({ shape: [, width], data }, i) {
    const row = data.subarray(i * width, (i + 1) * width), length = Math.hypot(...row);
    return row.map((x) => x / length);
  }

  /** The cosine of a stored word with each of the pictures of one style. */
  cosines(word, style, count) {
    const given = this.row(this.vectors, this.place.get(word));
    return Array.from({ length: count }, (_, i) =>
      this.row(this.pictures, style * count + i).reduce((sum, x, j) => sum + x * given[j], 0));
  }

  /** Stored words that begin like this one, or hold it: the shortest first. */
  like(typed, most) {
    const rank = (word) => (word.startsWith(typed) ? 0 : 1000) + word.length;
    const root = typed.slice(0, Math.max(3, typed.length - 2));
    const near = (text) => this.words.filter((word) => word.includes(text)).sort((a, b) => rank(a) - rank(b)).slice(0, most);
    const found = near(typed);
    return found.length ? found : near(root);
  }
}

const spelled = (text) => text.normalize("NFC").trim().replace(/\s+/g, " ").replace(/'/g, "’").toLowerCase();
const listed = (names) => names.map((name) => `“${name}”`).join(", ");

export default function begin(stage, { names, styles, nearest, words, kilobytes, known, columns, start }) {
  const all = words.map((each) => each.word), typedOnes = new Map();
  let finder, { word, style } = start, said = sentence();
  const stored = (i) => (i < words.length ? words[i].cosines : typedOnes.get(all[i]));

  const pictures = el("ol", { class: "clip-found" });
  const typed = el("input", { id: "clip-word", type: "text", maxlength: 60, list: "clip-words", spellcheck: "false", autocapitalize: "none", autocomplete: "off", disabled: true });
  const offered = el("datalist", { id: "clip-words" });
  const load = el("button", { type: "button", onclick: fetchWords }, `Load ${known.toLocaleString("en")} words (${kilobytes.toLocaleString("en")} kB)`);
  const go = el("button", { type: "submit", disabled: true }, "Find pictures");
  const form = el("form", { class: "control buttons", onsubmit: (event) => { event.preventDefault(); read(); } },
    el("label", { for: typed.id }, "A word of your own"), typed, offered, load, go);

  /** A picture is a part of one file that holds them all, a row of pictures for each line of it. */
  function picture(i) {
    const rows = Math.ceil(names.length / columns) * styles.length, row = Math.floor(i / columns) + (style * rows) / styles.length;
    const at = (k, count) => `${(100 * k) / (count - 1)}%`;
    const look = `background-image: url(${SPRITE.href}); background-size: ${100 * columns}% ${100 * rows}%; background-position: ${at(i % columns, columns)} ${at(row, rows)}`;
    return el("span", { class: "clip-picture", style: look });
  }

  function draw() {
    const cosines = stored(word)[style];
    const order = names.map((_, i) => i).sort((a, b) => cosines[b] - cosines[a]);
    pictures.replaceChildren(...order.slice(0, SHOWN).map((i) =>
      el("li", {}, el("button", { type: "button", title: "Which names does this picture choose?", class: names[i].toLowerCase() === all[word] ? "own" : "", onclick: () => ask(i) },
        picture(i), el("span", { class: "clip-name" }, names[i]), el("span", { class: "clip-cosine" }, decimal(cosines[i]))))));
    const own = names.findIndex((name) => name.toLowerCase() === all[word]);
    const place = own < 0 ? "" : ` Its own picture is in place ${order.indexOf(own) + 1} of ${names.length}.`;
    said.say(`“${all[word]}” is nearest to ${order.slice(0, 3).map((i) => names[i]).join(", ")}: cosines ${order.slice(0, 3).map((i) => decimal(cosines[i])).join(", ")}.${place}`);
  }

  function ask(i) {
    said.say(`The picture of “${names[i]}” is nearest to these of the ${names.length} names: ${listed(nearest[style][i].map((j) => names[j]))}.`);
  }

  function read() {
    const given = spelled(typed.value);
    if (!given) { said.say("Type a word first."); return; }
    if (!finder.place.has(given)) {
      const near = finder.like(given, 4);
      said.say(`“${given}” is not among the ${known.toLocaleString("en")} words that were stored.${near.length ? ` Some that are: ${listed(near)}.` : ""}`);
      return;
    }
    if (!all.includes(given)) {
      all.push(given);
      typedOnes.set(given, styles.map((_, s) => finder.cosines(given, s, names.length)));
      chosen.querySelector("select").append(el("option", {}, given));
    }
    word = all.indexOf(given);
    chosen.set(word);
    draw();
  }

  async function fetchWords() {
    finder = await fetched(WEIGHTS, load, said, (file) => new Finder(file));
    if (!finder) return;
    typed.disabled = go.disabled = false;
    offered.append(...finder.words.map((each) => el("option", { value: each })));
    typed.focus();
    load.remove();
    said.say("The words are loaded. Type one and press Find pictures.");
  }

  const chosen = choice({ label: "Word", options: all, value: word, onchange: (i) => { word = i; draw(); } });
  stage.append(
    el("div", { class: "controls" }, chosen,
      buttons({ label: "Drawn by", options: styles, value: style, onchange: (i) => { style = i; draw(); } })),
    pictures, said, form);
  draw();
}

// The map of all heads: a cell for each head, coloured by one measure. Choose a cell to see whom its words attend to.
import { buttons, choice, cividis, decimal, el, named, percent, sentence } from "./core.js";

export default function begin(stage, { digits, layers, heads, measures, sentences, start }) {
  let { measure, layer, head, sentence: text } = start;
  const said = sentence(), at = () => layer * heads + head;
  const show = ({ share }, value) => (share ? percent(value) : decimal(value, 1));

  /** The map: a table of which one cell has the focus, as the pattern for grids asks. */
  const cells = Array.from({ length: layers * heads }, (_, i) => el("td", { role: "gridcell",
    onclick: () => choose(Math.floor(i / heads), i % heads) }));
  const line = (name, ...rest) => el("tr", { role: "row" }, el("th", { role: "rowheader" }, name), ...rest);
  const map = el("table", { class: "heads-map", role: "grid", "aria-label": "All heads: a row for each layer, a column for each head" },
    el("thead", {}, el("tr", { role: "row" }, el("th", { role: "columnheader" }, el("span", { class: "spoken" }, "layer")),
      ...Array.from({ length: heads }, (_, j) => el("th", { role: "columnheader" }, String(j))))),
    el("tbody", {}, ...Array.from({ length: layers }, (_, i) => line(String(i), ...cells.slice(i * heads, (i + 1) * heads)))));
  map.addEventListener("keydown", (event) => {
    const row = { ArrowUp: -1, ArrowDown: 1 }[event.key] ?? 0, column = { ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0;
    const ends = { Home: 0, End: heads - 1 }[event.key];
    if (!row && !column && ends === undefined) return;
    event.preventDefault();
    const within = (x, count) => Math.min(Math.max(x, 0), count - 1);
    choose(within(layer + row, layers), ends ?? within(head + column, heads));
    cells[at()].focus();
  });

  const heading = el("p", { class: "ask" });
  const paint = () => {
    const { label, title, values } = measures[measure], most = Math.max(...values);
    heading.textContent = `${title} (rows: layers, columns: heads)`;
    cells.forEach((cell, i) => {
      const bright = values[i] / most;
      cell.textContent = show(measures[measure], values[i]).replace("%", "");
      cell.style.background = cividis(bright);
      cell.style.color = bright > 0.47 ? "#000" : "#fff"; // either stands out by 4.5 to 1
      cell.setAttribute("aria-label", `Layer ${Math.floor(i / heads)}, head ${i % heads}: ${label} ${show(measures[measure], values[i])}`);
    });
  };

  /** The chosen head's weights over the sentence in percent: a row for each word; the data has no rows for the markers. */
  const matrix = el("table", { class: "heads-matrix", "aria-hidden": "true" });
  const weights = () => {
    const { tokens, rows } = sentences[text], n = tokens.length, from = at() * (n - 2) * n;
    return tokens.slice(1, -1).map((_, i) =>
      [...rows.slice(from + i * n, from + (i + 1) * n)].map((digit) => digits.indexOf(digit)));
  };

  const draw = () => {
    cells.forEach((cell, i) => {
      cell.setAttribute("aria-selected", i === at());
      cell.tabIndex = i === at() ? 0 : -1;
    });
    const { tokens } = sentences[text], table = weights(), most = Math.max(...table.flat());
    matrix.replaceChildren(
      el("thead", {}, el("tr", {}, el("th", {}), ...tokens.map((token) => el("th", { class: "weight" }, el("span", {}, token))))),
      el("tbody", {}, ...table.map((row, i) => el("tr", {}, el("th", {}, tokens[i + 1]),
        ...row.map((weight) => el("td", { class: "weight", style: `background: ${cividis(weight / most)}`, title: `${weight}%` }))))));
    const i = table.findIndex((row) => row.includes(most)), j = table[i].indexOf(most);
    const all = measures.map((each) => each.said.replace("#", show(each, each.values[at()])));
    said.say(`Layer ${layer}, head ${head}. On average a word ${all.join(", ")}. In this sentence the largest weight is ${most}%, ` +
      `from ${named(tokens, i + 1)} to ${i + 1 === j ? "itself" : named(tokens, j)}.`);
  };
  const choose = (row, column) => { [layer, head] = [row, column]; draw(); };

  const pick = buttons({ label: "Colour the map by", options: measures.map(({ label }) => label), value: measure, onchange: (i) => {
    measure = i;
    const best = measures[i].values.indexOf(Math.max(...measures[i].values));
    paint();
    choose(Math.floor(best / heads), best % heads);
  } });
  const read = choice({ label: "Sentence", options: sentences.map((given) => given.text), value: text,
    onchange: (i) => { text = i; draw(); } });
  stage.append(
    el("p", { class: "ask" }, "Colour the map by:"), pick,
    el("div", { class: "heads-pair" }, el("div", {}, heading, map, said), el("div", {}, el("div", { class: "controls" }, read),
      el("p", { class: "ask" }, "Rows: the words that ask. Columns: what they attend to."), matrix)));
  paint();
  draw();
}

// Sparse attention: which words can have reached a word after some layers, when each layer computes only some pairs.
import { buttons, cividis, el, percent, sentence, slider, svg, toggle } from "./core.js";

const DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz";

export default function begin(stage, { words, target, most, patterns, start }) {
  let { pattern, layers, word, causal } = start;
  const n = words.length, said = sentence(), bare = (i) => words[i].replace(/[,.]/, "");

  /** For each pair the fewest layers after which column j can have reached row i; 0 where no number is enough. */
  const needed = patterns.map(({ tables }) => tables.map((table) =>
    words.map((_, i) => words.map((_, j) => Math.max(0, DIGITS.indexOf(table[i * n + j]))))));
  const bright = (count) => 1 - (0.9 * (count - 1)) / (most - 1), colour = (count) => cividis(bright(count));

  const shown = words.map((text, i) => el("span", { onclick: () => choose(i) }, text));
  const cells = words.map((_, i) => words.map((_, j) => svg("rect", { x: j, y: i, width: 1.02, height: 1.02 })));
  const shade = svg("path", { fill: "currentColor", "fill-opacity": 0.09 }); // pairs that a mask allows to meet at all
  const row = svg("rect", { width: n, height: 1, class: "chosen" });
  const matrix = svg("svg", { viewBox: `-0.2 -0.2 ${n + 0.4} ${n + 0.4}`, "aria-hidden": "true", onclick: (event) => {
    const { top, height } = matrix.getBoundingClientRect(), at = ((event.clientY - top) / height) * (n + 0.4) - 0.2;
    choose(Math.min(Math.max(Math.floor(at), 0), n - 1));
  } }, shade, ...cells.flat(), row);

  const allowed = (i, j) => !causal || j <= i;
  const reached = (count) => count > 0 && count <= layers;
  const draw = () => {
    const table = needed[pattern][causal ? 1 : 0], mine = table[word];
    cells.forEach((line, i) => line.forEach((cell, j) => {
      cell.setAttribute("fill", reached(table[i][j]) ? colour(table[i][j]) : "none");
    }));
    shade.setAttribute("d", causal ? `M0 0${words.map((_, i) => `V${i}H${i + 1}`).join("")}V${n}H0Z` : `M0 0H${n}V${n}H0Z`);
    row.setAttribute("y", word);
    shown.forEach((node, j) => {
      const hit = reached(mine[j]);
      node.className = j === word ? "chosen" : hit ? "" : "apart";
      node.style.background = hit ? colour(mine[j]) : "";
      node.style.color = hit ? (bright(mine[j]) > 0.47 ? "#000" : "#fff") : ""; // either stands out by 4.5 to 1
    });

    const within = words.map((_, j) => j).filter((j) => allowed(word, j)), near = within.filter((j) => reached(mine[j]));
    const pairs = table.flatMap((line, i) => line.filter((_, j) => allowed(i, j)));
    const enough = (counts) => (counts.includes(0) ? 0 : Math.max(...counts));
    const own = enough(within.map((j) => mine[j])), all = enough(pairs);
    const after = (count) => (count === 1 ? "one layer" : `${count} layers`);
    const others = causal ? "all before it" : "all others";
    said.say(`${percent(pairs.filter((count) => count === 1).length / pairs.length)} of the pairs are computed. ` +
      `After ${after(layers)}, ${near.length} of the ${within.length} words ` +
      `${causal ? `up to “${bare(word)}” can have reached it` : `can have reached “${bare(word)}”`}` +
      (target === word || !allowed(word, target) ? ". "
        : `, “${words[target]}” ${reached(mine[target]) ? "" : "not "}among them. `) +
      (!own ? "Some never reach it, however many layers there are."
        : `All of them can after ${after(own)}; ` + (all ? `after ${after(all)} every word can have been reached by ${others}.`
          : `some other word is never reached by ${others}.`)));
  };
  const choose = (i) => { word = i; which.set(i); draw(); };

  const pick = buttons({ label: "Pattern", options: patterns.map(({ label }) => label), value: pattern,
    onchange: (i) => { pattern = i; note.textContent = patterns[i].note; draw(); } });
  const note = el("p", { class: "ask" }, patterns[pattern].note);
  const depth = slider({ label: "Layers", min: 1, max: most, step: 1, value: layers,
    oninput: (given) => { layers = given; draw(); } });
  const which = slider({ label: "Word", min: 0, max: n - 1, step: 1, value: word,
    format: bare, oninput: (given) => { word = given; draw(); } });
  const before = toggle({ label: "only words before it (causal)", checked: causal,
    onchange: (given) => { causal = given; draw(); } });
  stage.append(pick, note, el("div", { class: "controls" }, depth, which, before),
    el("div", { class: "reach-pair" },
      el("div", {}, el("p", { class: "reach-words", "aria-hidden": "true" }, ...shown.flatMap((node) => [node, " "])), said),
      matrix));
  draw();
}

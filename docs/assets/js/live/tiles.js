// Keys pass in tiles; each query keeps a maximum m, a sum l and an output. Scrub, choose a query, forget to rescale.
import { choice, cividis, decimal, el, OKABE_ITO, sentence, slider, svg, toggle } from "./core.js";

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

/** What one query holds after each tile, and by how much its output is off from the softmax over the keys so far. */
function pass(row, values, tile, rescale) {
  const steps = [];
  let m = -Infinity, l = 0, a = values[0].map(() => 0), weights = [];
  for (let start = 0; start < row.length; start += tile) {
    const before = { m, l }, scores = row.slice(start, start + tile);
    m = Math.max(m, ...scores);
    const factor = rescale ? Math.exp(before.m - m) : 1;
    const added = scores.map((s) => Math.exp(s - m));
    l = factor * l + sum(added);
    a = a.map((x, d) => factor * x + sum(added.map((p, j) => p * values[start + j][d])));
    weights = [...weights.map((p) => factor * p), ...added];
    const exact = row.slice(0, weights.length).map((s) => Math.exp(s - m)), total = sum(exact);
    const out = a.map((x) => x / l);
    const error = Math.max(...out.map((x, d) => Math.abs(x - sum(exact.map((p, j) => p * values[j][d])) / total)));
    steps.push({ before, m, factor, added: sum(added), l, out, weights, error });
  }
  return steps;
}

export default function begin(stage, { tokens, scores, values, tile, start }) {
  const tiles = scores[0].length / tile;
  const runs = [false, true].map((forget) => scores.map((row) => pass(row, values, tile, !forget)));
  const most = Math.max(...runs[0].map((steps) => Math.max(...steps.at(-1).out.map(Math.abs))));
  let at = 1, query = start, forget = false;

  const rows = tokens.map((token, i) => {
    const cells = scores[i].map(() => el("td", { class: "weight" }));
    const [m, l, error] = ["m", "l", "error"].map((name) => el("td", { class: `number ${name}` }));
    const bars = values[0].map((_, d) => svg("rect", { x: d, width: 1.05, height: 1 }));
    const strip = svg("svg", { viewBox: `0 0 ${bars.length} 1`, preserveAspectRatio: "none" }, ...bars);
    const node = el("tr", { onclick: () => { query = i; pick.set(i); draw(); } },
      el("th", {}, token), ...cells, m, l, el("td", { class: "output" }, strip), error);
    return { node, cells, m, l, error, bars };
  });
  const heads = [...tokens.map((token) => el("th", { class: "weight" }, el("span", {}, token))),
    ...["m", "ℓ", "output", "off by"].map((word) => el("th", {}, word))];
  const table = el("table", { class: "tiles", "aria-hidden": "true" },
    el("thead", {}, el("tr", {}, el("th", {}), ...heads)), el("tbody", {}, ...rows.map(({ node }) => node)));
  const working = el("p", { class: "working" }), said = sentence();

  const draw = () => {
    rows.forEach(({ node, cells, m, l, error, bars }, i) => {
      const step = runs[+forget][i][at - 1];
      node.className = i === query ? "chosen" : "";
      cells.forEach((cell, j) => {
        const of = Math.floor(j / tile) + 1;
        const side = j % tile === 0 ? "first" : j % tile === tile - 1 ? "last" : "";
        cell.className = `weight ${of < at ? "dropped" : of === at ? `here ${side}` : ""}`;
        cell.style.background = of > at ? "" : cividis(step.weights[j]);
      });
      [m.textContent, l.textContent, error.textContent] = [step.m, step.l, step.error].map((x) => decimal(x));
      bars.forEach((bar, d) => {
        bar.setAttribute("fill", OKABE_ITO[step.out[d] < 0 ? 0 : 3]);
        bar.setAttribute("fill-opacity", Math.min(1, Math.abs(step.out[d]) / most));
      });
    });
    const all = runs[+forget].map((steps) => steps[at - 1].error), worst = all.indexOf(Math.max(...all));
    const { before, m, factor, added, l, out, error } = runs[+forget][query][at - 1];
    const rise = at === 1 ? "the first tile sets" : m > before.m ? `it rose from ${decimal(before.m, 3)}, so` : "it stayed, so";
    working.textContent = `“${tokens[query]}”: m = ${decimal(m, 3)}; ${rise} ` + (at === 1 ? `ℓ = ${decimal(l, 3)}` :
      `ℓ = ${decimal(factor, 3)} × ${decimal(before.l, 3)} + ${decimal(added, 3)} = ${decimal(l, 3)}`) +
      `. The output begins ${out.slice(0, 3).map((x) => decimal(x, 3)).join(", ")}.`;
    const wrong = all.filter((x) => x >= 0.005).length;
    said.say(`After tile ${at} of ${tiles}, “${tokens[query]}” has read ${at * tile} of ${tokens.length} keys. ` +
      (error < 0.005 ? "Its output is exact for these keys" : `Its output is off by ${decimal(error)}`) + (!wrong ?
      ", like every other." : `; ${wrong} of ${tokens.length} outputs are wrong, that of “${tokens[worst]}” most, by ${decimal(all[worst])}.`));
  };
  const pick = choice({ label: "Query", options: tokens, value: query, onchange: (i) => { query = i; draw(); } });
  const scrub = slider({ label: "Tile", min: 1, max: tiles, step: 1, value: at,
    format: (x) => `${x} of ${tiles}`, oninput: (x) => { at = x; draw(); } });
  const mode = toggle({ label: "forget the rescaling", onchange: (on) => { forget = on; draw(); } });
  stage.append(el("div", { class: "controls" }, scrub, pick, mode), table, working, said);
  draw();
}

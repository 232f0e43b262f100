// Ring attention: which tiles of the table of queries and keys each rank computes in each step, and who waits.
import { buttons, el, OKABE_ITO, percent, sentence, slider, svg, toggle } from "./core.js";

const LAYOUTS = ["contiguous", "zig-zag"];
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const whole = (x) => x.toLocaleString("en", { maximumFractionDigits: 0 });

/** "rank 0", "ranks 0 and 1", "ranks 0, 1 and 2". */
const naming = (some) => (some.length === 1 ? `rank ${some[0]}` : `ranks ${some.slice(0, -1).join(", ")} and ${some.at(-1)}`);

export default function begin(stage, { length, least, most, start }) {
  let { ranks, step, layout, causal } = start;
  const said = sentence();

  /** The sequence is cut in 2 P pieces, of which each rank holds two. */
  const holder = (piece) => (layout === 0 ? Math.floor(piece / 2) : Math.min(piece, 2 * ranks - 1 - piece));
  const seen = (i, j) => !causal || j <= i;
  const pairs = (i, j) => {
    const rows = length / (2 * ranks);
    return !seen(i, j) ? 0 : causal && i === j ? (rows * (rows + 1)) / 2 : rows * rows;
  };
  const stepOf = (i, j) => ((holder(i) - holder(j) + ranks) % ranks) + 1; // blocks are passed on to the next rank
  const pieces = () => Array.from({ length: 2 * ranks }, (_, i) => i);
  const work = (given) => {
    const done = Array(ranks).fill(0);
    for (const i of pieces()) for (const j of pieces()) if (stepOf(i, j) === given) done[holder(i)] += pairs(i, j);
    return done;
  };

  const picture = svg("svg", { "aria-hidden": "true", class: "ranks-tiles" });
  const rows = el("tbody");
  const table = el("table", { class: "ranks-table" },
    el("thead", {}, el("tr", {}, ...["rank", "its keys come from", "pairs in this step"].map((word) => el("th", { scope: "col" }, word)))), rows);

  const tiles = () => {
    const all = 2 * ranks, font = 0.05 * (all + 1.1), text = (x, y, words, colour) =>
      svg("text", { x, y: y + 0.36 * font, "font-size": font, "text-anchor": "middle", fill: colour }, String(words));
    picture.setAttribute("viewBox", `-1.05 -1.05 ${all + 1.1} ${all + 1.1}`);
    picture.replaceChildren(...pieces().flatMap((i) => [
      text(-0.5, i + 0.5, holder(i), "currentColor"), text(i + 0.5, -0.5, holder(i), "currentColor"),
      ...pieces().filter((j) => seen(i, j)).flatMap((j) => {
        const at = stepOf(i, j), now = at === step, colour = OKABE_ITO[holder(i)];
        return [svg("rect", { x: j + 0.04, y: i + 0.04, width: 0.92, height: 0.92, fill: colour, stroke: colour, "stroke-width": 0.03,
          "fill-opacity": now ? 1 : at < step ? 0.3 : 0, class: now ? "now" : at < step ? "done" : "later" }),
        text(j + 0.5, i + 0.5, at, !now ? "currentColor" : holder(i) === 0 ? "#fff" : "#000")];
      })]));
  };
  const draw = () => {
    tiles();
    const now = work(step), steps = Array.from({ length: ranks }, (_, t) => work(t + 1)), busiest = Math.max(...now);
    rows.replaceChildren(...now.map((count, rank) => el("tr", {},
      el("th", { scope: "row" }, el("span", { class: "swatch", style: `background: ${OKABE_ITO[rank]}` }), String(rank)),
      el("td", {}, step === 1 ? "its own" : `rank ${(rank - step + 1 + ranks) % ranks}`),
      el("td", {}, count ? whole(count) : "waits"))));
    const idle = now.flatMap((count, rank) => (count ? [] : [rank]));
    const lasts = sum(steps.map((done) => Math.max(...done))), even = sum(steps.flat()) / ranks;
    said.say(`Step ${step} of ${ranks}, ${LAYOUTS[layout]}${causal ? ", causal" : ""}: ` +
      (idle.length ? `${naming(idle)} ${idle.length === 1 ? "waits" : "wait"} for the others, who compute up to ${whole(busiest)} pairs.`
        : Math.min(...now) === busiest ? `every rank computes ${whole(busiest)} pairs.`
          : `each rank computes ${whole(Math.min(...now))} to ${whole(busiest)} pairs.`) +
      ` All ${ranks} steps last as long as ${whole(lasts)} pairs; on average a rank is busy for ${percent(even / lasts)} of that.`);
  };

  const which = slider({ label: "Step", min: 1, max: ranks, step: 1, value: step, format: (x) => `${x} of ${ranks}`,
    oninput: (x) => { step = x; draw(); } });
  const many = slider({ label: "Ranks", min: least, max: most, step: 1, value: ranks, oninput: (x) => {
    ranks = x;
    step = Math.min(step, ranks);
    which.querySelector("input").max = ranks;
    which.set(step);
    draw();
  } });
  const pick = buttons({ label: "Pieces", options: LAYOUTS, value: layout, onchange: (i) => { layout = i; draw(); } });
  const before = toggle({ label: "only keys before it (causal)", checked: causal, onchange: (on) => { causal = on; draw(); } });
  stage.append(pick, el("div", { class: "controls" }, which, many, before),
    el("div", { class: "ranks-pair" }, picture, el("div", {}, table, said)));
  draw();
}

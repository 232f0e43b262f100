// Three players, each of whom should look at the one it beats. Choose the scores and see how many can.
import { decimal, el, percent, sentence, slider, softmax, svg, toggle } from "./core.js";

const WHERE = [[160, 40], [280, 232], [40, 232]], RADIUS = 36;
const upper = (text) => text[0].toUpperCase() + text.slice(1);

/** An arrow from one player to another, drawn by `set(weight)`; the two arrows of a pair bend away from each other. */
function arrow(from, to, right) {
  const [[x, y], [u, v]] = [WHERE[from], WHERE[to]], length = Math.hypot(u - x, v - y);
  const across = [(y - v) / length, (u - x) / length];
  const bend = [(x + u) / 2 + 28 * across[0], (y + v) / 2 + 28 * across[1]];
  const towards = ([a, b], [c, d], far) => {
    const whole = Math.hypot(c - a, d - b);
    return [a + (far * (c - a)) / whole, b + (far * (d - b)) / whole];
  };
  const start = towards([x, y], bend, RADIUS), tip = towards([u, v], bend, RADIUS + 2), neck = towards(tip, bend, 11);
  const side = [(tip[1] - neck[1]) / 11, (neck[0] - tip[0]) / 11];
  const corner = (sign, size) => [neck[0] + sign * size * side[0], neck[1] + sign * size * side[1]];
  const line = svg("path", { d: `M${start} Q${bend} ${neck}`, class: "line" }), head = svg("path", { class: "head" });
  const [a, b] = [0, 1].map((i) => (start[i] + 2 * bend[i] + neck[i]) / 4 + (i ? 16 : 23) * across[i]);
  const text = svg("text", { x: a, y: b + 5, "text-anchor": "middle" });
  const node = svg("g", { class: right ? "right" : "wrong" }, line, head, text);
  node.set = (weight) => {
    line.setAttribute("stroke-width", 1 + 9 * weight);
    head.setAttribute("d", `M${tip} L${corner(1, 4 + 6 * weight)} L${corner(-1, 4 + 6 * weight)}Z`);
    for (const part of [line, head]) part.setAttribute("opacity", 0.35 + 0.65 * weight);
    text.textContent = percent(weight);
  };
  return node;
}

export default function begin(stage, { names, beats, scores: given, cards }) {
  const scores = given.map((row) => [...row]), most = { symmetric: 0, free: 0 };
  let free = false;
  const others = (i) => [beats[i], beats.indexOf(i)]; // the one that i beats, and the one that beats i

  const arrows = names.map((_, i) => others(i).map((j, k) => arrow(i, j, k === 0)));
  const players = names.map((name, i) => svg("g", {}, svg("circle", { cx: WHERE[i][0], cy: WHERE[i][1], r: RADIUS - 3 }),
    svg("text", { x: WHERE[i][0], y: WHERE[i][1] + 5, "text-anchor": "middle" }, name)));
  const picture = svg("svg", { viewBox: "0 0 320 274", class: "ring-picture", "aria-hidden": "true" }, ...arrows.flat(), ...players);
  const looks = names.map(() => el("li", {})), said = sentence(), record = el("p", { class: "record" });

  const draw = () => {
    const gaps = names.map((_, i) => scores[i][others(i)[0]] - scores[i][others(i)[1]]);
    names.forEach((name, i) => {
      const [prey, hunter] = others(i), weights = softmax([scores[i][prey], scores[i][hunter]]);
      weights.forEach((weight, k) => arrows[i][k].set(weight));
      const [one, other] = weights.map(percent);
      looks[i].textContent = `${upper(name)} gives ${one} to ${names[prey]} and ${other} to ${names[hunter]}: ` +
        (gaps[i] > 0 ? "right." : gaps[i] < 0 ? "wrong." : "both alike.");
    });
    const right = gaps.filter((gap) => gap > 0).length, alike = gaps.filter((gap) => gap === 0).length;
    // Who looks wrongly still holds the right card once in `cards`; who looks at both alike names one of two cards.
    const luck = 1 / cards, named = (right + (3 - right - alike) * luck + alike * (luck + (1 - luck) / 2)) / 3;
    const mode = free ? "free" : "symmetric";
    most[mode] = Math.max(most[mode], right);
    said.say(`With these ${mode} scores, ${right} of 3 look at the one that they beat. ` +
      `If each holds one of ${cards} cards, ${percent(named)} of the cards are named rightly.`);
    record.textContent = `Your best so far: ${most.symmetric} of 3 with symmetric scores` +
      (most.free ? `, ${most.free} of 3 with free ones.` : ".");
  };

  // Along the ring first: these three are the sliders of a symmetric score. The three in the other direction follow them.
  const along = names.map((_, i) => [i, beats[i]]), back = along.map(([i, j]) => [j, i]);
  const sliders = [...along, ...back].map(([i, j]) => slider({ label: "", min: -3, max: 3, step: 0.1, value: scores[i][j],
    format: (x) => decimal(x, 1), oninput: (value) => {
      scores[i][j] = value;
      if (!free) scores[j][i] = value;
      draw();
    } }));
  const arrange = () => {
    [...along, ...back].forEach(([i, j], k) => {
      sliders[k].hidden = !free && k >= 3;
      sliders[k].querySelector("label").textContent = `${upper(names[i])} ${free ? "to" : "and"} ${names[j]}`;
      sliders[k].set(scores[i][j]);
    });
    draw();
  };
  const freedom = toggle({ label: "free: each direction has its own score", onchange: (on) => {
    free = on;
    if (!free) along.forEach(([i, j]) => { scores[j][i] = scores[i][j]; });
    arrange();
  } });
  const again = el("button", { type: "button", onclick: () => {
    given.forEach((row, i) => { scores[i] = [...row]; });
    free = false;
    freedom.set(false);
    arrange();
  } }, "Start again");

  stage.append(
    el("p", { class: "ask" }, `${names.map((name, i) => `${i ? name : upper(name)} beats ${names[beats[i]]}`).join(", ")}. ` +
      "A score says how much one looks at another. Can all three look more at the one that they beat?"),
    el("div", { class: "ring" }, el("div", { class: "controls" }, ...sliders, freedom, again), picture),
    el("ul", { class: "looks" }, ...looks), said, record);
  arrange();
}

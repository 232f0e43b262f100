// One state told one number after another, h = (1 - g) h + g x: gates that the reader opens, beside one step for all.
import { buttons, cividis, decimal, el, OKABE_ITO, percent, sentence, slider, svg } from "./core.js";

const isLetter = (token) => token >= "a" && token <= "z";

/** The state after each step, and what each step has left of each input. */
function scan(x, gates) {
  const states = [], left = [];
  let h = 0, row = x.map(() => 0);
  x.forEach((input, t) => {
    h = (1 - gates[t]) * h + gates[t] * input;
    row = row.map((weight, s) => (s === t ? gates[t] : (1 - gates[t]) * weight));
    states.push(h);
    left.push(row);
  });
  return { states, left };
}

/** The step from 0.01 to 1 that comes nearest to these weights at the end, and where and by how much it is off. */
function nearest(last) {
  let best = { off: Infinity };
  for (let i = 1; i <= 100; i++) {
    const gaps = last.map((weight, s) => Math.abs((i / 100) * (1 - i / 100) ** (last.length - 1 - s) - weight));
    const off = Math.max(...gaps);
    if (off < best.off) best = { step: i / 100, off, at: gaps.indexOf(off) };
  }
  return best;
}

export default function begin(stage, { x, text, presets, step: first }) {
  const size = x.length, tall = Math.max(...x.map(Math.abs));
  let gates, step = first, read, moved; // read: the gates are the trained model's, which has read the text

  const bar = (colour, at) => svg("rect", { x: at + 0.12, width: 0.76, fill: colour });
  const grow = (node, value) => {
    node.setAttribute("y", Math.min(0, -value / tall));
    node.setAttribute("height", Math.abs(value / tall));
  };
  const panel = (title, colour) => {
    const bars = x.map((_, t) => bar(colour, t));
    const cells = x.map((_, t) => x.map((_, s) => svg("rect", { x: s, y: t, width: 1.02, height: 1.02 })));
    const end = el("span", { class: "end" });
    const states = svg("svg", { viewBox: `0 -1.05 ${size} 2.1`, preserveAspectRatio: "none", class: "states" },
      svg("path", { d: `M0 0H${size}`, class: "zero" }), ...bars);
    const matrix = svg("svg", { viewBox: `-0.1 -0.1 ${size + 0.2} ${size + 0.2}`, class: "matrix" }, ...cells.flat(),
      svg("rect", { y: size - 1, width: size, height: 1, class: "chosen" }));
    const node = el("div", { class: "panel", "aria-hidden": "true" }, el("strong", {}, title),
      el("span", {}, "state h after each step"), states, el("span", {}, "left at each step of each input"), matrix, end);
    return { node, draw: ({ states: h, left }) => {
      h.forEach((value, t) => grow(bars[t], value));
      left.forEach((row, t) => row.forEach((weight, s) => cells[t][s].setAttribute("fill", s > t ? "none" : cividis(weight))));
      end.textContent = `at the end h = ${decimal(h.at(-1))}`;
    } };
  };

  const columns = x.map((input, t) => {
    const name = el("span", { class: "spoken" }), token = el("span", { class: "token", "aria-hidden": "true" }), opening = svg("rect", { width: 1, fill: OKABE_ITO[0] });
    const told = bar("currentColor", 0);
    grow(told, input);
    const node = el("button", { type: "button", onclick: () => { gates[t] = gates[t] < 0.5 ? 1 : 0; moved = true; pick.set(-1); draw(); } },
      name, token, svg("svg", { viewBox: "0 -1.05 1 2.1", preserveAspectRatio: "none", class: "input" }, 
        svg("path", { d: "M0 0H1", class: "zero" }), told),
      svg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", class: "opening" }, opening), el("span", { class: "gate", "aria-hidden": "true" }));
    return { node, name, token, opening, gate: node.lastChild };
  });
  const gated = panel("With gates", OKABE_ITO[0]), fixed = panel("One step for all", OKABE_ITO[3]), said = sentence();

  const draw = () => {
    const mine = scan(x, gates), twin = scan(x, x.map(() => step));
    gated.draw(mine);
    fixed.draw(twin);
    columns.forEach(({ node, name, token, opening, gate }, t) => {
      node.setAttribute("aria-pressed", gates[t] >= 0.5);
      name.textContent = node.title = `Input ${t + 1}: ${decimal(x[t])}; gate ${decimal(gates[t])}; ` +
        `state ${decimal(mine.states[t])}; the twin's ${decimal(twin.states[t])}`;
      token.textContent = read ? text[t] : t + 1;
      opening.setAttribute("y", 1 - gates[t]);
      opening.setAttribute("height", gates[t]);
      gate.textContent = gates[t] === 0 || gates[t] === 1 ? gates[t] : decimal(gates[t]).slice(1);
    });
    head.textContent = read ? "text" : "step";
    const last = mine.left.at(-1), top = last.indexOf(Math.max(...last)), best = nearest(last);
    const mean = (behind) => gates.filter((_, t) => behind === isLetter(text[t - 1])).reduce((a, b, _, all) => a + b / all.length, 0);
    const opens = !read || moved ? "" :
      `Its gate is ${decimal(mean(true))} on average just after a letter, and ${decimal(mean(false))} elsewhere. `;
    said.say(last[top] === 0 ? "All gates are closed: no input has entered, and the state stays zero." :
      opens + `At the end the gates have left ${percent(last[top])} of input ${top + 1}, more than of any other. ` +
      `The twin, with g = ${decimal(step)}, has left ${percent(twin.left.at(-1)[top])} of it. ` + (best.off < 0.005 ?
        `With g = ${decimal(best.step)} it weighs every input as the gates do.` :
        `No single step weighs the inputs as the gates do: the nearest, g = ${decimal(best.step)}, is off by ` +
        `${Math.round(100 * best.off)} percentage points for input ${best.at + 1}.`));
  };
  const choose = (i) => { gates = [...presets[i].gates]; read = presets[i].read; moved = false; draw(); };
  const pick = buttons({ label: "Gates to begin with", options: presets.map(({ name }) => name), onchange: choose });
  const range = slider({ label: "Twin's step g", min: 0.01, max: 1, step: 0.01, value: step, format: decimal,
    oninput: (given) => { step = given; draw(); } });
  const head = el("span", { class: "token" });
  stage.append(el("div", { class: "controls" }, pick), el("p", { class: "ask" }, "Press a position to open or close its gate:"),
    el("div", { class: "hold-strip" },
      el("div", { "aria-hidden": "true" }, head, el("span", { class: "input" }, "input"), el("span", { class: "opening" }, "gate")),
      ...columns.map(({ node }) => node)),
    range, el("div", { class: "hold-pair" }, gated.node, fixed.node), said);
  choose(0);
}

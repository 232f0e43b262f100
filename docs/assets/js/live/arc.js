// One sentence through six mechanisms: choose a word, and see what it takes from the others in each.
import { buttons, cividis, el, percent, sentence, svg } from "./core.js";

export default function begin(stage, { tokens, start, panels }) {
  const said = sentence({ shown: false }), size = tokens.length;

  const drawn = panels.map(({ title, note, rows }) => {
    const most = Math.max(...rows.flat());
    const picture = svg("svg", { viewBox: `-0.2 -0.2 ${size + 0.4} ${size + 0.4}`, "aria-hidden": "true" });
    rows.forEach((row, i) => row.forEach((weight, j) => picture.append(
      svg("rect", { x: j, y: i, width: 1.02, height: 1.02, fill: cividis(weight / most) }))));
    if (title.includes("flash")) for (let edge = 4; edge < size; edge += 4) {
      picture.append(svg("path", { d: `M${edge} 0V${size}M0 ${edge}H${size}`, class: "tile" }));
    }
    const frame = svg("rect", { x: 0, width: size, height: 1, class: "chosen" });
    picture.append(frame);
    const reading = el("span", { class: "reading" });
    const node = el("div", { class: "panel" }, el("strong", {}, title), picture, el("span", {}, note), reading);
    return { node, frame, reading, rows, title };
  });

  const show = (chosen) => {
    const heard = [];
    for (const { frame, reading, rows, title } of drawn) {
      const own = rows.length === size; // a decoder's rows are no words of this sentence
      frame.setAttribute("visibility", own ? "visible" : "hidden");
      if (!own) { reading.textContent = "none of these words asks"; continue; }
      frame.setAttribute("y", chosen);
      const row = rows[chosen], sum = row.reduce((a, b) => a + b, 0);
      const top = row.indexOf(Math.max(...row)), share = percent(row[top] / sum);
      reading.textContent = `most from ${tokens[top]}: ${share}`;
      heard.push(`${title.slice(6)}: ${tokens[top]}, ${share}`);
    }
    said.say(`What “${tokens[chosen]}” takes most from. ${heard.join("; ")}.`);
  };

  stage.append(
    el("p", { class: "ask" }, "Choose a word:"),
    buttons({ label: "A word of the sentence", options: tokens, value: start, onchange: show }),
    el("div", { class: "arc-panels" }, ...drawn.map(({ node }) => node)), said);
  show(start);
}

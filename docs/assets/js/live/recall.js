// A list of names and digits is read pair by pair. The figure shows what is still known of each pair after each step.
import { buttons, choice, cividis, el, sentence, slider } from "./core.js";

export default function begin(stage, { lists, models, start }) {
  let { list, model, read } = start;
  const said = sentence(), heading = el("thead"), body = el("tbody");
  const table = el("table", { class: "recall", "aria-hidden": "true" }, heading, body);

  function draw() {
    const { names, digits } = lists[list], { answers, sure } = models[model].lists[list], now = answers[read - 1];
    heading.replaceChildren(el("tr", {}, el("th", {}, "after"), ...names.map((_, t) =>
      el("th", { class: t === read - 1 ? "now" : "", onclick: () => move(t + 1) }, String(t + 1))), el("th", {}, "asked")));
    body.replaceChildren(...names.map((name, i) => el("tr", {}, el("th", {}, `${name} ${digits[i]}`),
      ...names.map((_, t) => (i > t ? el("td")
        : el("td", { class: t === read - 1 ? "now" : "", style: `background: ${cividis(sure[t][i] / 100)}`, title: `${sure[t][i]}%`, onclick: () => move(t + 1) }))),
      el("td", { class: "answer" }, i < read ? `${now[i]} ${+now[i] === digits[i] ? "✓" : "✗"}` : ""))));
    const right = [...now].filter((digit, i) => +digit === digits[i]).length;
    const wrong = [...now].findIndex((digit, i) => +digit !== digits[i]);
    const example = wrong < 0 ? "" : ` Asked for ${names[wrong]}, ${digits[wrong]}, it says ${now[wrong]}.`;
    said.say(`With ${models[model].kept}, after ${read === 1 ? "one pair" : `${read} pairs`}: ${right} of ${read} right.${example}`);
  }
  const move = (to) => { read = to; pairs.set(to); draw(); };

  const pairs = slider({ label: "Pairs read", min: 1, max: lists[0].names.length, step: 1, value: read, oninput: move });
  stage.append(
    el("p", { class: "ask" }, "What is kept of the pairs that were read:"),
    buttons({ label: "What is kept", options: models.map(({ label }) => label), value: model, onchange: (i) => { model = i; draw(); } }),
    el("div", { class: "controls" }, pairs,
      choice({ label: "List", options: lists.map((_, i) => String(i + 1)), value: list, onchange: (i) => { list = i; draw(); } })),
    table, said);
  draw();
}

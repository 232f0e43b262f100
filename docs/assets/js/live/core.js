// What the interactive figures share: elements, native controls, one spoken sentence, and colours of the page.

const make = (create) => (tag, attributes = {}, ...children) => {
  const node = create(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};

/** An HTML element: el("p", {class: "x", onclick: f}, "text", child). */
export const el = make((tag) => document.createElement(tag));

/** An SVG element, in the same way. */
export const svg = make((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));

let controls = 0;

/** A labelled range whose value is written beside it; its node carries `set(value)`. */
export function slider({ label, min, max, step = "any", value, format = String, oninput }) {
  const id = `live-${++controls}`;
  const output = el("output", { for: id, "aria-live": "off" }); // the range itself speaks its value
  const input = el("input", { type: "range", id, min, max, step });
  const show = () => {
    output.textContent = format(+input.value);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => { show(); oninput(+input.value); });
  const node = el("div", { class: "control" }, el("label", { for: id }, label), input, output);
  node.set = (given) => { input.value = given; show(); };
  node.set(value);
  return node;
}

/** A labelled check box. */
export function toggle({ label, checked = false, onchange }) {
  const input = el("input", { type: "checkbox", onchange: () => onchange(input.checked) });
  input.checked = checked;
  const node = el("label", { class: "control toggle" }, input, " ", label);
  node.set = (given) => { input.checked = given; };
  return node;
}

/** A labelled list to choose one of; `onchange` gets its index. */
export function choice({ label, options, value = 0, onchange }) {
  const id = `live-${++controls}`;
  const select = el("select", { id, onchange: () => onchange(select.selectedIndex) },
    ...options.map((text) => el("option", {}, text)));
  select.selectedIndex = value;
  const node = el("div", { class: "control" }, el("label", { for: id }, label), select);
  node.set = (given) => { select.selectedIndex = given; };
  return node;
}

/** A row of buttons of which one is pressed; `onchange` gets its index. */
export function buttons({ label, options, value = 0, onchange }) {
  const press = (index) => all.forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  const all = options.map((text, i) => el("button", { type: "button", onclick: () => { press(i); onchange(i); } }, text));
  const node = el("div", { class: "control buttons", role: "group", "aria-label": label }, ...all);
  node.set = press;
  press(value);
  return node;
}

/** A sentence that a screen reader speaks once the reader has stopped moving things: node.say(text). What follows too fast
 * to be spoken is only shown: node.say(text, { aloud: false }). */
export function sentence({ shown: visible = true } = {}) {
  const node = el("p", { class: "said", "aria-live": "polite" });
  const shown = el("span", { "aria-hidden": "true" }), spoken = el("span", { class: "spoken" });
  let waiting;
  node.append(...(visible ? [shown] : []), spoken);
  node.say = (text, { aloud = true } = {}) => {
    shown.textContent = text;
    clearTimeout(waiting);
    if (aloud) waiting = setTimeout(() => { spoken.textContent = text; }, 400);
  };
  return node;
}

const ORDER = ["first", "second", "third"];

/** A token as a sentence names it: “bank”, or the second “bank” where there are several; the first and last are markers. */
export function named(tokens, i) {
  if (i === 0 || i === tokens.length - 1) return `the ${tokens[i]} marker`;
  const alike = tokens.flatMap((token, j) => (token === tokens[i] ? [j] : []));
  return `${alike.length > 1 ? `the ${ORDER[alike.indexOf(i)]} ` : ""}“${tokens[i]}”`;
}

/** A number with so many decimals, and a minus sign that is as wide as a plus. */
export const decimal = (x, digits = 2) => x.toFixed(digits).replace("-", "−");

/** A share from 0 to 1 in whole percents. */
export const percent = (x) => `${Math.round(100 * x)}%`;

/** Weights of scores, which sum to 1; -Infinity gets 0. */
export function softmax(scores) {
  const most = Math.max(...scores);
  if (most === -Infinity) return scores.map(() => 0);
  const e = scores.map((s) => Math.exp(s - most));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map((x) => x / sum);
}

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** The colour of a magnitude from 0 to 1 in cividis. */
export function cividis(x) {
  const at = Math.min(Math.max(x, 0), 1) * (CIVIDIS.length - 1), low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const a = rgb(CIVIDIS[low]), b = rgb(CIVIDIS[low + 1]);
  return `rgb(${a.map((c, i) => Math.round(c + (at - low) * (b[i] - c))).join(" ")})`;
}

/** Okabe and Ito's colours for categories, in the order in which the drawn figures take them. */
export const OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999"];

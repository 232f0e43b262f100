// A table of results to sort by any column and to filter by kind of row.
import { buttons, el, sentence } from "./core.js";

const MARKS = { better: "▲", worse: "▼", equivalent: "=", undecided: "·", control: "" };

/** What is read first goes first; a cell without a value goes last whichever way the column is sorted. */
function ordered(rows, at, lowest) {
  const value = (row) => row.cells[at]?.value ?? null;
  return [...rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return lowest ? x - y : y - x;
  });
}

export default function begin(stage, { corner, columns, groups, rows }) {
  const said = sentence();
  let group = 0, sorted = -1; // -1: the order in which the rows are given

  const heads = [corner, ...columns.map((column) => column.name)].map((name, i) => {
    const button = el("button", { type: "button", onclick: () => { sorted = i - 1; show(); } }, name);
    return el("th", { scope: "col" }, button);
  });
  const body = el("tbody");
  const table = el("div", { class: "results", tabindex: 0, role: "region", "aria-label": "Results, to scroll sideways" },
    el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body));

  const line = (row) => el("tr", {}, el("th", { scope: "row" }, row.name), ...row.cells.map((cell) => {
    if (!cell) return el("td", {}, "–");
    const look = cell.is === "control" ? {} : { class: cell.is }; // `.control` is a control of a figure
    return el("td", { ...look, title: cell.more }, cell.text,
      el("span", { "aria-hidden": "true" }, ` ${MARKS[cell.is]}`), el("span", { class: "spoken" }, ` ${cell.is}`));
  }));

  const show = () => {
    const kept = rows.filter((row) => !group || row.group === groups[group]);
    const lowest = sorted >= 0 && columns[sorted].lowest;
    const shown = sorted < 0 ? kept : ordered(kept, sorted, lowest);
    body.replaceChildren(...shown.map(line));
    heads.forEach((head, i) => head.setAttribute("aria-sort",
      i - 1 !== sorted ? "none" : sorted < 0 || lowest ? "ascending" : "descending"));
    const count = `${shown.length} of ${rows.length} rows`;
    if (sorted < 0) { said.say(`${count}, in the order of the history.`); return; }
    const known = shown.filter((row) => row.cells[sorted]);
    const name = (row) => `${row.name} (${row.cells[sorted].text})`;
    said.say(known.length ? `${count}, by ${columns[sorted].name}: first ${name(known[0])}, last ${name(known.at(-1))}.`
      : `${count}; none was tried on ${columns[sorted].name}.`);
  };

  stage.append(
    buttons({ label: "Which rows", options: groups, onchange: (index) => { group = index; show(); } }), table, said);
  show();
}

// Turn the clock: a position as the hands of several dials. An offset k turns each hand by an angle that does not depend on p.
import { buttons, decimal, el, OKABE_ITO, sentence, slider, svg } from "./core.js";

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const FAR = 40; // offsets from -FAR to FAR are drawn

/** Each pair (x, y) turned by its own angle. The sinusoidal code of p is (1, 0) turned by p: (cos, sin). */
const turned = (pairs, angles) => pairs.map(([x, y], i) => {
  const [c, s] = [Math.cos(angles[i]), Math.sin(angles[i])];
  return [c * x - s * y, s * x + c * y];
});

export default function begin(stage, { wavelengths, query, key, last, start, places }) {
  const speeds = wavelengths.map((length) => (2 * Math.PI) / length), angles = (steps) => speeds.map((speed) => speed * steps);
  const code = (p) => speeds.map((speed) => [Math.cos(p * speed), Math.sin(p * speed)]);
  let { p, k } = start, rotary = false;
  const [from, to] = [OKABE_ITO[0], OKABE_ITO[3]], said = sentence();

  /** One dial: the first number of a pair points up, the second to the right, so that hands turn as on a clock. */
  const dials = wavelengths.map((length) => {
    const hand = (stroke, width) => svg("line", { x1: 0, y1: 0, stroke, "stroke-width": width, class: "hand" });
    const arc = svg("path", { class: "arc" }), ring = svg("circle", { r: 0.14, class: "ring" });
    const [first, second] = [hand(from, 0.13), hand(to, 0.07)], size = el("span", { class: "angle" });
    const face = svg("svg", { viewBox: "-1.2 -1.2 2.4 2.4" }, svg("circle", { r: 1.12, class: "face" }),
      svg("path", { d: "M0 -1.12V-0.98", class: "tick" }), arc, first, second, ring);
    const node = el("div", { class: "dial" }, face,
      el("span", {}, `λ = ${length < 100 ? decimal(length, 1) : Math.round(length).toLocaleString("en")}`), size);
    return { node, first, second, arc, ring, size };
  });

  /** The curve over all offsets, and where the chosen offset stands on it. */
  const plot = { width: 2 * FAR, height: 30 };
  const curve = svg("path", { class: "curve", stroke: to }), zero = svg("path", { class: "zero" }), mark = svg("path", { class: "mark" });
  const picture = svg("svg", { viewBox: `${-FAR} 0 ${plot.width} ${plot.height}`, preserveAspectRatio: "none" }, zero, mark, curve);
  const title = el("span"), value = el("strong", { class: "value" });

  const place = (line, [up, right]) => { line.setAttribute("x2", right); line.setAttribute("y2", -up); };
  const draw = () => {
    const a = rotary ? turned(query, angles(p)) : code(p), b = rotary ? turned(key, angles(p + k)) : code(p + k);
    const onward = turned(a, angles(k)); // R_k applied to what stands at p
    const longest = rotary ? Math.max(...[...a, ...b].map(([x, y]) => Math.hypot(x, y))) : 1;
    const shrink = (pair) => pair.map((x) => x / longest);
    dials.forEach(({ first, second, arc, ring, size }, i) => {
      place(first, shrink(a[i]));
      place(second, shrink(b[i]));
      ring.setAttribute("visibility", rotary ? "hidden" : "visible");
      ring.setAttribute("cx", onward[i][1]);
      ring.setAttribute("cy", -onward[i][0]);
      const begin = Math.atan2(a[i][1], a[i][0]);
      let turn = k * speeds[i];
      if (rotary) { // the angle from the query to the key, the short way round
        turn = Math.atan2(b[i][1], b[i][0]) - begin;
        turn -= 2 * Math.PI * Math.round(turn / (2 * Math.PI));
      }
      const drawn = Math.sign(turn) * Math.min(Math.abs(turn), 2 * Math.PI - 1e-3), end = begin + drawn;
      arc.setAttribute("d", `M${0.55 * Math.sin(begin)} ${-0.55 * Math.cos(begin)}A0.55 0.55 0 ` +
        `${+(Math.abs(drawn) > Math.PI)} ${+(drawn > 0)} ${0.55 * Math.sin(end)} ${-0.55 * Math.cos(end)}`);
      const degrees = (180 / Math.PI) * turn;
      size.textContent = `${decimal(degrees, Math.abs(degrees) < 10 ? 1 : 0)}°`;
    });

    const score = (offset) => (rotary ? dot(query.flat(), turned(key, angles(offset)).flat())
      : speeds.reduce((sum, speed) => sum + Math.cos(offset * speed), 0));
    const offsets = Array.from({ length: 4 * FAR + 1 }, (_, i) => i / 2 - FAR), scores = offsets.map(score);
    const [low, high] = [Math.min(0, ...scores), Math.max(...scores)];
    const y = (x) => 1 + ((plot.height - 2) * (high - x)) / (high - low);
    curve.setAttribute("d", "M" + offsets.map((x, i) => `${x} ${y(scores[i]).toFixed(3)}`).join("L"));
    zero.setAttribute("d", `M${-FAR} ${y(0)}H${FAR}`);
    mark.setAttribute("d", `M${k} 0V${plot.height}`);
    const here = dot(a.flat(), b.flat());
    title.textContent = rotary ? "turned query · turned key, for each offset k" : "PE(p) · PE(p + k), for each offset k";
    value.textContent = `k = ${decimal(k, 0)}: ${decimal(here)}`;

    const off = Math.max(...onward.flat().map((x, i) => Math.abs(x - b.flat()[i])));
    const same = Math.abs(here - score(k)) < 1e-9 ? ", the same as at every other p" : "";
    const far = k === 0 ? "The offset is 0" : `From p = ${p} to p + k = ${decimal(p + k, 0)}`;
    said.say(rotary
      ? `Query at ${p}, key at ${decimal(p + k, 0)}. Their score is ${decimal(here)}${same}.`
      : `${far}: turned by the angles of k, the hands of p ${off < 1e-9 ? "meet" : "miss"} those of p + k on all ${dials.length} dials. ` +
        `The dot product is ${decimal(here)}${same}.`);
    found.set(places.findIndex((given) => given.p === p && given.k === k));
  };

  const whole = (x) => decimal(x, 0);
  const [where, offset] = [
    slider({ label: "Position p", min: 0, max: last, step: 1, value: p, format: whole, oninput: (x) => { p = x; draw(); } }),
    slider({ label: "Offset k", min: -FAR, max: FAR, step: 1, value: k, format: whole, oninput: (x) => { k = x; draw(); } })];
  const mode = buttons({ label: "What is turned", options: ["added: a code for each position", "rotary: a query and a key are turned"],
    onchange: (i) => { rotary = i === 1; stage.classList.toggle("rotary", rotary); draw(); } });
  const found = buttons({ label: "Two places", options: places.map(({ label }) => label), onchange: (i) => {
    ({ p, k } = places[i]);
    where.set(p);
    offset.set(k);
    draw();
  } });
  const name = (stroke, ...words) => el("span", { class: "key" },
    svg("svg", { viewBox: "0 -1 10 2" }, svg("path", { d: "M0 0H10", stroke, "stroke-width": 2 })), ...words);
  stage.append(mode, el("div", { class: "controls" }, where, offset), found,
    el("div", { class: "turn-keys", "aria-hidden": "true" },
      name(from, el("span", { class: "added" }, "p"), el("span", { class: "turns" }, "query at p")),
      name(to, el("span", { class: "added" }, "p + k"), el("span", { class: "turns" }, "key at p + k")),
      el("span", { class: "added" }, "ring: the hand of p, turned by k")),
    el("div", { class: "dials", "aria-hidden": "true" }, ...dials.map(({ node }) => node)),
    el("div", { class: "turn-plot", "aria-hidden": "true" },
      el("div", { class: "ends" }, title, value), picture,
      el("div", { class: "ends" }, ...[`k = −${FAR}`, "0", String(FAR)].map((word) => el("span", {}, word)))), said);
  draw();
}

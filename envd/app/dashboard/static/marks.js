// What a step did, drawn over the picture of the screen that it was done on.

import { svg } from "./dom.js";

const SHOWN = 120; // characters of a caption
const TURNS = { up: 0, right: 90, down: 180, left: 270 };

/** An SVG as large as the screen. `scale` makes lines thicker, for pictures that are shown small. */
export function overlay(marks, [width, height], scale = 1) {
  const unit = (width / 480) * scale;
  const shapes = marks.flatMap((mark, place) => drawn(mark, unit, marks.length > 1 ? place + 1 : null));
  return svg("svg", { class: "overlay", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, ...shapes);
}

function drawn(mark, unit, number) {
  const { kind, at, to } = mark;
  if (!at) return [];
  const [x, y] = at;
  const label = number === null ? [] : [svg("text", { class: "mark-number", x: x + 9 * unit, y: y - 7 * unit, "font-size": 10 * unit }, String(number))];
  const ring = (radius) => twice("circle", { cx: x, cy: y, r: radius * unit }, unit);
  const spot = svg("circle", { class: "mark-spot", cx: x, cy: y, r: 1.8 * unit });
  switch (kind) {
    case "click":
      return [...ring(7), spot, ...label];
    case "double":
      return [...ring(5), ...ring(9), spot, ...label];
    case "hover":
      return [...twice("circle", { cx: x, cy: y, r: 7 * unit, "stroke-dasharray": `${3 * unit}` }, unit), ...label];
    case "drag":
      return [...twice("path", { d: arrow(at, to ?? at, unit) }, unit), spot, ...label];
    case "scroll": {
      const head = `M${-6 * unit},${2 * unit}L0,${-4 * unit}L${6 * unit},${2 * unit}M${-6 * unit},${9 * unit}L0,${3 * unit}L${6 * unit},${9 * unit}`;
      return [...twice("path", { d: head, transform: `translate(${x} ${y}) rotate(${TURNS[mark.text] ?? 0})` }, unit), ...label];
    }
    default:
      return [];
  }
}

/** The shape with a light edge below it, so that it is seen on any picture. */
function twice(tag, shape, unit) {
  return [svg(tag, { class: "mark-edge", "stroke-width": 4.5 * unit, ...shape }), svg(tag, { class: "mark", "stroke-width": 2 * unit, ...shape })];
}

function arrow([x1, y1], [x2, y2], unit) {
  const angle = Math.atan2(y2 - y1, x2 - x1);
  const barb = (turn) => `${x2 - 9 * unit * Math.cos(angle + turn)},${y2 - 9 * unit * Math.sin(angle + turn)}`;
  return `M${x1},${y1}L${x2},${y2}M${barb(0.5)}L${x2},${y2}L${barb(-0.5)}`;
}

/** What was done nowhere in particular, such as what was typed: words to lay over the picture. */
export const spoken = (marks) => marks.filter((mark) => !mark.at).map(caption).join(" · ");

/** "click", "type “hello”", … */
export function caption(mark) {
  const text = mark.text.length > SHOWN ? `${mark.text.slice(0, SHOWN)}…` : mark.text;
  const where = mark.at ? ` at ${Math.round(mark.at[0])}, ${Math.round(mark.at[1])}` : "";
  switch (mark.kind) {
    case "type":
      return `type “${text.replace(/\n$/, " ⏎")}”`;
    case "drag":
      return `drag${where} to ${mark.to.map(Math.round).join(", ")}`;
    case "double":
      return `double click${where}`;
    case "keys":
      return `keys ${text}`;
    case "program":
    case "end":
      return text;
    default:
      return [mark.kind, text].filter(Boolean).join(" ") + where;
  }
}

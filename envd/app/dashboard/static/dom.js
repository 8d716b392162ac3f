// Making and changing elements. Whatever a guest or a task may have written goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** An element. `class`, `text`, `on` ({event: listener}) and `data` are what they say; other properties are attributes,
 * of which `false`, `null` and `undefined` leave nothing. */
export function el(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

export function svg(tag, properties = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "class") node.setAttribute("class", value);
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "data") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Touch the page only where something is different. */
export function setText(node, text) {
  const words = String(text ?? "");
  if (node.textContent !== words) node.textContent = words;
}

export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

/** The children of `parent`, one for each item and kept while its key is there: `make(item)` gives an object with the
 * element as `node` and with `update(item)`. */
export class Keyed {
  #parent;
  #make;
  #key;
  #parts = new Map();

  constructor(parent, key, make) {
    this.#parent = parent;
    this.#key = key;
    this.#make = make;
  }

  render(items) {
    const wanted = new Set(items.map(this.#key));
    for (const [key, part] of this.#parts) {
      if (wanted.has(key)) continue;
      part.node.remove();
      part.gone?.();
      this.#parts.delete(key);
    }
    let place = this.#parent.firstElementChild;
    for (const item of items) {
      const key = this.#key(item);
      let part = this.#parts.get(key);
      if (part === undefined) {
        part = this.#make(item);
        this.#parts.set(key, part);
      }
      if (part.node === place) place = place.nextElementSibling;
      else this.#parent.insertBefore(part.node, place);
      part.update(item);
    }
  }

  get parts() {
    return this.#parts.values();
  }
}

const toasts = () => byId("toasts");

/** A word to whoever looks, for some seconds. */
export function say(words, isTrouble = false) {
  const toast = el("p", { class: isTrouble ? "toast trouble" : "toast", text: words });
  toasts().append(toast);
  setTimeout(() => toast.remove(), isTrouble ? 12_000 : 5_000);
}

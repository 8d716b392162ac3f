// Pictures of screens: fetched with the caller's token, a few at once, and only where somebody looks. One that cannot be
// had leaves the reason in its place.

import { request } from "./api.js";

const AT_ONCE = 3;
const GAP_MS = 900; // between two pictures of one screen
const GENTLY_MS = 15_000; // a screen also changes without a step
const waiting = [];
let running = 0;

/** Show the picture at `path` in `image`. Raises Problem; an image that is gone meanwhile is no error. */
export function show(image, path, signal) {
  return new Promise((resolve, reject) => {
    waiting.push({ image, path, signal, resolve, reject });
    pump();
  });
}

function pump() {
  while (running < AT_ONCE && waiting.length) {
    const { image, path, signal, resolve, reject } = waiting.shift();
    running += 1;
    load(image, path, signal)
      .then(resolve, reject)
      .finally(() => {
        running -= 1;
        pump();
      });
  }
}

async function load(image, path, signal) {
  if (signal?.aborted) return;
  const blob = await (await request(path, { signal, cache: "default" })).blob();
  if (signal?.aborted) return;
  const url = URL.createObjectURL(blob);
  const before = image.dataset.blob;
  image.src = url;
  image.dataset.blob = url;
  try {
    await image.decode();
  } catch {
    // replaced by a newer one, or no picture: the image then shows its alternative text
  }
  if (before) URL.revokeObjectURL(before);
}

export function release(image) {
  if (image.dataset.blob) URL.revokeObjectURL(image.dataset.blob);
  delete image.dataset.blob;
  image.removeAttribute("src");
}

/** Keeps the picture of one screen, at `path()`, fresh while it is seen. `said(words)` is told why there is none, or "". */
export class Live {
  #image;
  #path;
  #said;
  #seen = false;
  #wanted = false;
  #loading = false;
  #stale = true;
  #last = 0;
  #timer = null;

  constructor(image, path, said) {
    this.#image = image;
    this.#path = path;
    this.#said = said;
  }

  /** Whether there is a screen to be seen at all. */
  want(wanted) {
    if (wanted === this.#wanted) return;
    this.#wanted = wanted;
    this.#stale = true;
    if (!wanted) release(this.#image);
    this.#plan();
  }

  see(seen) {
    this.#seen = seen;
    this.#plan();
  }

  /** It will have changed. */
  refresh() {
    this.#stale = true;
    this.#plan();
  }

  end() {
    this.#wanted = false;
    clearTimeout(this.#timer);
    release(this.#image);
  }

  #plan() {
    clearTimeout(this.#timer);
    if (!this.#wanted || !this.#seen || this.#loading || document.hidden) return;
    const wait = this.#last + (this.#stale ? GAP_MS : GENTLY_MS) - Date.now();
    this.#timer = setTimeout(() => this.#load(), Math.max(0, wait));
  }

  async #load() {
    this.#loading = true;
    this.#stale = false;
    try {
      await show(this.#image, this.#path());
      this.#said("");
    } catch (error) {
      release(this.#image);
      this.#said(error.message);
    }
    this.#last = Date.now();
    this.#loading = false;
    this.#plan();
  }
}

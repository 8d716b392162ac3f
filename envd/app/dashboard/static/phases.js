// A job's phases as a bar, as long as they lasted beside each other, and both of its probes.

import { Keyed, el, setAttribute, setText } from "./dom.js";
import { duration } from "./format.js";

const PORTS = { screenshot: "5000", chrome_cdp: "9222" };
const NAMES = { screenshot: "guest", chrome_cdp: "Chrome" };
const LEAST = 0.02; // share of the bar that a short phase still has

const lasted = (phase, now) => phase.seconds ?? Math.max(0, now - phase.started_at);
const worded = (name) => name.replaceAll("_", " ");

export class Phases {
  node = el("div", { class: "phases" });
  #bar = el("div", { class: "phase-bar", role: "img" });
  #list = el("ol", { class: "phase-list" });
  #segments = new Keyed(this.#bar, byPlace, () => new Segment());
  #names = new Keyed(this.#list, byPlace, () => new Name());

  constructor() {
    this.node.append(this.#bar, this.#list);
  }

  update(job, now) {
    const shown = job.phases.map((phase, place) => ({ place, name: worded(phase.name), seconds: lasted(phase, now), lasts: phase.seconds === null }));
    const all = shown.reduce((sum, phase) => sum + phase.seconds, 0) || 1;
    for (const phase of shown) phase.share = Math.max(LEAST, phase.seconds / all);
    this.#segments.render(shown);
    this.#names.render(shown);
    const told = shown.map((phase) => `${phase.name} ${duration(phase.seconds)}${phase.lasts ? " so far" : ""}`);
    setAttribute(this.#bar, "aria-label", `Phases: ${told.join(", ")}`);
  }
}

const byPlace = (phase) => phase.place;

class Segment {
  node = el("span", { class: "segment" });

  update({ place, share, lasts }) {
    this.node.style.flexGrow = share.toFixed(4);
    setAttribute(this.node, "data-hue", place % 6);
    setAttribute(this.node, "data-lasts", lasts ? "" : null);
  }
}

class Name {
  #name = el("span");
  #seconds = el("span", { class: "number" });
  node = el("li", {}, el("i", { class: "swatch", "aria-hidden": "true" }), this.#name, this.#seconds);

  update({ place, name, seconds, lasts }) {
    setText(this.#name, name);
    setText(this.#seconds, duration(seconds));
    setAttribute(this.node, "data-hue", place % 6);
    setAttribute(this.node, "data-lasts", lasts ? "" : null);
  }
}

export class Probes {
  node = el("ul", { class: "probes" });
  #rows = new Keyed(this.node, (probe) => probe.name, () => new ProbeRow());

  update(job) {
    const known = new Map(job.probes.map((probe) => [probe.name, probe]));
    const untried = { result: "unknown", passed: false, detail: "not tried yet", attempts: 0, seconds: null };
    this.#rows.render(Object.keys(PORTS).map((name) => ({ ...untried, ...known.get(name), name })));
  }
}

class ProbeRow {
  #result = el("span", { class: "pill" });
  #detail = el("span", { class: "probe-detail" });
  #count = el("span", { class: "number muted" });
  #name = el("span", { class: "probe-name" });
  node = el("li", {}, this.#name, this.#result, this.#detail, this.#count);

  update(probe) {
    setText(this.#name, `${PORTS[probe.name]} ${NAMES[probe.name]}`);
    setText(this.#result, probe.passed ? "passed" : probe.attempts ? probe.result : "waits");
    setAttribute(this.#result, "data-tone", probe.passed ? "good" : probe.result === "fail" ? "bad" : "idle");
    setText(this.#detail, probe.detail.replace(/^https?:\/\/\S+ /, "")); // which address it was is seen on hovering
    setAttribute(this.#detail, "title", probe.detail);
    setText(this.#count, probe.passed ? duration(probe.seconds) : probe.attempts ? `try ${probe.attempts}` : "");
  }
}

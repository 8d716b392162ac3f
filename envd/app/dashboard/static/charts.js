// Three small charts. Each says in words what it shows; what is behind it is beside it as numbers.

import { byId, el, setAttribute, setText, svg } from "./dom.js";
import { bytes, clock, duration, percent, plural } from "./format.js";

const PATHS = ["spare", "restore", "cold"];
const FAULTS = ["infra", "capacity", "task", "agent", "client"];
const RESETS = { height: 132, left: 40, right: 8, top: 8, bottom: 20 };
const SCALE = [0.1, 1, 10, 60, 600, 3600]; // seconds that are named on the axis
const SPARK = { width: 240, height: 34 };
const SHORTEST = 120; // seconds that the host's charts show at least

/** How wide `node` is, told whenever that changes. */
function onWidth(node, tell) {
  new ResizeObserver(([entry]) => tell(Math.floor(entry.contentRect.width))).observe(node);
}

export class Resets {
  #store;
  #width = 0;
  #drawn = null;
  #plot = svg("svg", { role: "img", class: "plot", height: RESETS.height });
  #cells = new Map();

  constructor(store) {
    this.#store = store;
    const head = ["Path", "Resets", "Median", "Slowest"].map((name) => el("th", { scope: "col", text: name }));
    const rows = PATHS.map((path) => {
      const cells = [0, 1, 2].map(() => el("td", { text: "–" }));
      this.#cells.set(path, cells);
      const mark = svg("svg", { width: 12, height: 12, "aria-hidden": "true" }, dot(path, 6, 6));
      return el("tr", {}, el("th", { scope: "row" }, mark, ` ${path}`), ...cells);
    });
    const table = el("table", { class: "table tight" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
    byId("resets").append(this.#plot, table);
    onWidth(byId("resets"), (width) => {
      this.#width = width;
      this.#drawn = null;
      this.render();
    });
  }

  render() {
    const { ended } = this.#store;
    if (!this.#width || ended === this.#drawn) return;
    this.#drawn = ended;
    const resets = ended
      .filter((job) => job.state === "succeeded" && job.kind === "reset" && job.reset_path && job.started_at)
      .map((job) => ({ at: job.ended_at, seconds: Math.max(0.01, job.ended_at - job.started_at), path: job.reset_path }));
    setText(byId("resets-count"), resets.length ? `${resets.length} latest` : "none yet");
    for (const [path, cells] of this.#cells) {
      const took = resets.filter((reset) => reset.path === path).map((reset) => reset.seconds).sort((a, b) => a - b);
      const shown = took.length ? [took.length, duration(took[took.length >> 1]), duration(took.at(-1))] : ["0", "–", "–"];
      cells.forEach((cell, place) => setText(cell, shown[place]));
    }
    this.#draw(resets);
  }

  #draw(resets) {
    const { height, left, right, top, bottom } = RESETS;
    const times = resets.map((reset) => reset.at);
    const from = times.length ? Math.min(...times) : this.#store.now - 60;
    const to = Math.max(times.length ? Math.max(...times) : this.#store.now, from + 1);
    const seconds = resets.map((reset) => reset.seconds);
    const low = Math.log10(Math.min(0.1, ...seconds));
    const high = Math.log10(Math.max(10, ...seconds) * 1.3);
    const x = (at) => left + ((at - from) / (to - from)) * (this.#width - left - right);
    const y = (value) => top + (1 - (Math.log10(value) - low) / (high - low)) * (height - top - bottom);
    const lines = SCALE.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high).flatMap((value) => [
      svg("line", { class: "grid", x1: left, x2: this.#width - right, y1: y(value), y2: y(value) }),
      svg("text", { class: "axis", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, SHORT[value]),
    ]);
    const ends = [
      svg("text", { class: "axis", x: left, y: height - 5 }, clock(from)),
      svg("text", { class: "axis", x: this.#width - right, y: height - 5, "text-anchor": "end" }, clock(to)),
    ];
    this.#plot.replaceChildren(...lines, ...ends, ...resets.map((reset) => dot(reset.path, x(reset.at), y(reset.seconds))));
    setAttribute(this.#plot, "width", this.#width);
    const told = PATHS.map((path) => plural(resets.filter((reset) => reset.path === path).length, `${path} reset`));
    setAttribute(this.#plot, "aria-label", `How long resets took, over time: ${told.join(", ")}. The table below has the figures.`);
  }
}

const SHORT = { 0.1: "0.1 s", 1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h" };

/** The mark of a path: of another shape each, so that no colour is needed to tell them apart. */
function dot(path, x, y) {
  const r = 3.5;
  if (path === "spare") return svg("circle", { class: "dot", "data-path": path, cx: x, cy: y, r });
  const points = path === "restore" ? [[x, y - r - 0.5], [x + r + 0.5, y + r], [x - r - 0.5, y + r]] : [[x - r, y - r], [x + r, y - r], [x + r, y + r], [x - r, y + r]];
  return svg("polygon", { class: "dot", "data-path": path, points: points.map((point) => point.join(",")).join(" ") });
}

export class Failures {
  #store;
  #drawn = [];
  #rows = new Map();

  constructor(store) {
    this.#store = store;
    for (const fault of FAULTS) {
      const row = { bar: el("span"), count: el("span", { class: "number" }), codes: el("span", { class: "muted codes" }) };
      this.#rows.set(fault, row);
      byId("failures").append(
        el("div", { class: "fault" }, el("span", { class: "fault-name", text: fault }), el("span", { class: "fault-bar", "data-fault": fault }, row.bar), row.count, row.codes),
      );
    }
  }

  render() {
    const { ended, verdicts } = this.#store;
    if (this.#drawn[0] === ended && this.#drawn[1] === verdicts) return;
    this.#drawn = [ended, verdicts];
    const failures = [...ended.filter((job) => job.state === "failed" || job.state === "expired").map((job) => job.error), ...verdicts.filter((verdict) => verdict.score === null)].filter(Boolean);
    const most = Math.max(1, ...FAULTS.map((fault) => failures.filter((one) => one.fault === fault).length));
    for (const [fault, row] of this.#rows) {
      const of = failures.filter((one) => one.fault === fault);
      row.bar.style.width = `${(100 * of.length) / most}%`;
      setText(row.count, of.length);
      setText(row.codes, of.length ? commonest(of.map((one) => one.code)) : "none");
      setAttribute(row.codes, "title", of.at(-1)?.detail);
    }
    setText(byId("failures-count"), `of ${plural(ended.length, "job")} and ${plural(verdicts.length, "verdict")}`);
  }
}

/** "boot_timeout 3, instance_died" */
function commonest(codes) {
  const counts = new Map();
  for (const code of codes) counts.set(code, (counts.get(code) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([code, count]) => (count > 1 ? `${code} ${count}` : code)).join(", ");
}

export class HostCharts {
  #store;
  #lines = [
    new Spark("CPU", (one) => one.cpu, (one) => `${percent(one.cpu)} of ${one.cores}`),
    new Spark("Memory", (one) => 1 - one.memory_available / one.memory_total, (one) => `${bytes(one.memory_available)} free`),
    new Spark("Disk", (one) => 1 - one.disk_free / one.disk_total, (one) => `${bytes(one.disk_free)} free`),
  ];

  constructor(store) {
    this.#store = store;
    byId("host").append(...this.#lines.map((line) => line.node));
  }

  render() {
    const { host, stats, now } = this.#store;
    if (!stats?.host) return;
    const samples = [...host.filter((one) => one.at < stats.host.at), stats.host];
    const span = Math.max(SHORTEST, now - samples[0].at);
    for (const line of this.#lines) line.update(samples, now, span);
    setText(byId("host-count"), `last ${plural(Math.round(span / 60), "minute")}`);
  }
}

class Spark {
  #name;
  #share;
  #words;
  #area = svg("path", { class: "spark-area" });
  #line = svg("path", { class: "spark-line" });
  #plot = svg("svg", { class: "spark", role: "img", viewBox: `0 0 ${SPARK.width} ${SPARK.height}`, preserveAspectRatio: "none" }, this.#area, this.#line);
  #value = el("span", { class: "number host-value", text: "–" });
  node;

  constructor(name, share, words) {
    this.#name = name;
    this.#share = share;
    this.#words = words;
    this.node = el("div", { class: "host-row" }, el("span", { class: "host-name", text: name }), this.#plot, this.#value);
  }

  update(samples, now, span) {
    const { width, height } = SPARK;
    const latest = samples.at(-1);
    const points = samples.map((one) => {
      const x = Math.max(0, width * (1 - (now - one.at) / span));
      return `${x.toFixed(1)},${(1 + (height - 2) * (1 - Math.min(1, Math.max(0, this.#share(one))))).toFixed(1)}`;
    });
    const first = points[0].split(",")[0];
    const end = points.at(-1).split(",")[0];
    setAttribute(this.#line, "d", `M${points.join("L")}`);
    setAttribute(this.#area, "d", `M${first},${height}L${points.join("L")}L${end},${height}Z`);
    setText(this.#value, this.#words(latest));
    const most = Math.max(...samples.map(this.#share));
    setAttribute(this.#plot, "aria-label", `${this.#name}: ${percent(this.#share(latest))} in use now, ${percent(most)} at most in the last ${plural(Math.round(span / 60), "minute")}`);
    // Processors that are all busy do what they are for.
    setAttribute(this.node, "data-tone", this.#name !== "CPU" && this.#share(latest) > 0.95 ? "bad" : null);
  }
}

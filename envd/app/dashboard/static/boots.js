// The boots and set-ups that are under way, and the queue behind them.

import { cancel, allow, isAllowed } from "./commands.js";
import { Keyed, byId, el, setAttribute, setHidden, setText } from "./dom.js";
import { clock, counting, duration, plural } from "./format.js";
import { Phases, Probes } from "./phases.js";

const ROW = 38; // px, as in the style
const BESIDE = 8; // rows that are there beyond those seen

const about = (job) => (job.env === null ? job.kind : `env ${job.env}`);

/** How long it still takes, from what earlier jobs took. */
function expected(job) {
  if (job.eta_s === null) return "no estimate yet";
  if (job.eta_s >= 1) return `about ${counting(job.eta_s)} left`;
  return job.eta_s > 0 ? "any moment" : "longer than earlier ones took";
}

export class Boots {
  #store;
  #list = new Keyed(byId("boots"), (job) => job.id, (job) => new Boot(job, this.#store));

  constructor(store) {
    this.#store = store;
  }

  render() {
    const running = this.#store.running;
    this.#list.render(running);
    setHidden(byId("no-boots"), running.length > 0);
    setText(byId("boots-count"), running.length ? plural(running.length, "job") : "");
  }

  /** What counts up. */
  tick() {
    for (const boot of this.#list.parts) boot.tick();
  }
}

class Boot {
  #store;
  #job;
  #title = el("h3");
  #facts = el("p", { class: "muted boot-facts" });
  #cancel = el("button", { type: "button", class: "button small", text: "Cancel" });
  #phases = new Phases();
  #probes = new Probes();
  #lines = el("ol", { class: "lines" });
  #said = new Keyed(this.#lines, (line) => `${line.at} ${line.message}`, () => new Line());
  #warnings = el("p", { class: "notes" });
  node;

  constructor(job, store) {
    this.#store = store;
    this.#job = job;
    this.#cancel.addEventListener("click", () => isAllowed(this.#cancel) && cancel(this.#job));
    this.node = el(
      "li",
      { class: "boot" },
      el("div", { class: "boot-head" }, this.#title, this.#cancel),
      this.#facts,
      this.#phases.node,
      this.#probes.node,
      this.#warnings,
      this.#lines,
    );
  }

  update(job) {
    this.#job = job;
    const doing = job.state === "booting" ? "boots" : "is set up";
    setText(this.#title, job.env === null ? `${job.kind} ${doing}` : `Env ${job.env} ${doing}`);
    setAttribute(this.#cancel, "aria-label", `Cancel the ${job.kind} of ${about(job)}`);
    allow(this.#cancel, "play", job.cancel_requested ? "It is being cancelled." : "");
    this.#probes.update(job);
    setText(this.#warnings, job.warnings.join("\n"));
    setHidden(this.#warnings, job.warnings.length === 0);
    this.#said.render((this.#store.lines.get(job.id) ?? []).slice(-6));
    this.tick();
  }

  tick() {
    const job = this.#job;
    this.#phases.update(job, this.#store.now);
    const facts = [
      job.task_id ? `task ${job.task_id}` : "no task",
      `${counting(this.#store.now - (job.started_at ?? job.created_at))} so far`,
      expected(job),
      job.reset_path,
      job.attempts > 1 ? `try ${job.attempts} of the set-up` : null,
      job.joined ? `${plural(job.joined, "other")} joined` : null,
      job.cancel_requested ? "being cancelled" : null,
    ];
    setText(this.#facts, facts.filter(Boolean).join(" · "));
  }
}

class Line {
  #at = el("time", { class: "number muted" });
  #words = el("span");
  node = el("li", {}, this.#at, this.#words);

  update(line) {
    setText(this.#at, clock(line.at));
    setText(this.#words, line.message);
    setAttribute(this.node, "data-kind", line.kind);
  }
}

/** A thousand jobs may wait: there are elements for those alone that are seen. */
export class Queue {
  #store;
  #scroll = byId("queue-scroll");
  #list = byId("queue");
  #rows = new Keyed(this.#list, (job) => job.id, (job) => new Row(job));
  #waiting = [];

  constructor(store) {
    this.#store = store;
    this.#scroll.addEventListener("scroll", () => this.#show(), { passive: true });
  }

  render() {
    this.#waiting = this.#store.waiting;
    this.#show();
    setHidden(byId("no-queue"), this.#waiting.length > 0);
    setText(byId("queue-count"), `${this.#waiting.length} of at most ${this.#store.limit}`);
  }

  #show() {
    const first = Math.max(0, Math.floor(this.#scroll.scrollTop / ROW) - BESIDE);
    const count = Math.ceil(this.#scroll.clientHeight / ROW) + 2 * BESIDE;
    const seen = this.#waiting.slice(first, first + count);
    this.#list.style.paddingTop = `${first * ROW}px`;
    this.#list.style.paddingBottom = `${Math.max(0, this.#waiting.length - first - seen.length) * ROW}px`;
    this.#rows.render(seen.map((job) => ({ ...job, of: this.#waiting.length })));
  }
}

class Row {
  #job;
  #place = el("span", { class: "place-in-line number" });
  #what = el("span", { class: "queue-what" });
  #eta = el("span", { class: "number muted" });
  #cancel = el("button", { type: "button", class: "button small", text: "Cancel" });
  node = el("li", { class: "queue-row" }, this.#place, this.#what, this.#eta, this.#cancel);

  constructor(job) {
    this.#job = job;
    this.#cancel.addEventListener("click", () => isAllowed(this.#cancel) && cancel(this.#job));
  }

  update(job) {
    this.#job = job;
    setText(this.#place, job.position ?? "–");
    setText(this.#what, [about(job), job.task_id].filter(Boolean).join(" · "));
    setAttribute(this.#what, "title", job.task_id);
    setText(this.#eta, job.eta_s === null ? "no estimate" : `in ${duration(job.eta_s)}`);
    setAttribute(this.#cancel, "aria-label", `Cancel the ${job.kind} of ${about(job)}, number ${job.position} in the queue`);
    setAttribute(this.node, "aria-setsize", job.of);
    setAttribute(this.node, "aria-posinset", job.position);
    allow(this.#cancel, "play", job.cancel_requested ? "It is being cancelled." : "");
  }
}

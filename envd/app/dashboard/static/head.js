// The top of the page: which daemon this is, whether it lives, whether a reset can be served, and what it has in hand.

import { byId, el, setAttribute, setHidden, setText } from "./dom.js";
import { clock, counting } from "./format.js";
import { may } from "./api.js";

const FAILED = "Failed, 1 h";
const FIGURES = {
  Playing: "",
  Resetting: "",
  Queue: "",
  Spares: "",
  [FAILED]: "Resets that failed, and episodes that ended without a score, in the last hour",
  Up: "",
}; // and what a name that is short stands for

export class Head {
  #store;
  #connection = { state: "connecting", until: 0, why: "" };
  #since = null; // when what is shown was last true, in Unix seconds of this browser; null while it is true
  #values = new Map();

  constructor(store) {
    this.#store = store;
    for (const [name, meaning] of Object.entries(FIGURES)) {
      const value = el("dd", { text: "–" });
      this.#values.set(name, value);
      byId("figures").append(el("div", { title: meaning || null }, el("dt", { text: name }), value));
    }
  }

  connected(state, facts) {
    this.#connection = { state, until: Date.now() + (facts.waitMs ?? 0), why: facts.why ?? "" };
    this.#since = state === "live" ? null : (this.#since ?? Date.now() / 1000);
    this.render();
    this.tick();
  }

  /** Whether what is shown is as it is now. */
  get live() {
    return this.#connection.state === "live";
  }

  render() {
    const { daemon, stats } = this.#store;
    if (!daemon) return;
    setText(byId("place"), `host ${daemon.name} · ${daemon.provider} · ${daemon.version}`);
    const facts = [`host ${daemon.name}`, `desktops of ${daemon.provider}: ${daemon.image}`, `screen ${daemon.screen.join("×")}`, `envd ${daemon.version}`, `daemon ${daemon.daemon_id}`];
    setAttribute(byId("place"), "title", facts.join("; "));
    if (document.title !== `${daemon.name} · envd`) document.title = `${daemon.name} · envd`;
    this.#readiness(stats);
    this.#figures();
    this.#age();
    const drain = byId("drain");
    setHidden(drain, !may("admin"));
    setText(drain, stats.draining ? "Drain again…" : "Drain…");
    this.tick();
  }

  /** What the daemon said last holds only while it is heard. */
  #readiness(stats) {
    if (!this.live) {
      const refused = this.#connection.state === "refused";
      const since = `since ${clock(this.#since)}; ${refused ? "a token is asked for" : "trying again"}`;
      this.#ready(refused ? "No access" : "Not reachable", "bad", since);
      return;
    }
    const { ready, reasons, warnings } = stats.readiness;
    const draining = stats.draining ? ["draining: no new work is taken"] : [];
    const state = stats.draining ? "Draining" : ready ? "Ready" : "Not ready";
    const words = [...new Set([...draining, ...reasons, ...warnings])];
    const left = stats.draining && stats.drain_left_s !== null ? ` (${counting(stats.drain_left_s)} left for episodes)` : "";
    const told = words.length ? words.join(" · ") + left : "A reset can be served now.";
    this.#ready(state, stats.draining ? "warn" : ready ? "good" : "bad", told);
  }

  #ready(state, tone, told) {
    setText(byId("ready"), state);
    setAttribute(byId("ready"), "data-tone", tone);
    setText(byId("reasons"), told);
    setAttribute(byId("reasons"), "title", told);
  }

  /** What is no longer told is grey, and says of when it is. */
  #age() {
    const asOf = this.live ? null : `as of ${clock(this.#since)}, no longer told`;
    setAttribute(byId("figures"), "aria-label", asOf ? `At a glance, ${asOf}` : "At a glance");
    setAttribute(byId("columns"), "role", asOf && "group");
    setAttribute(byId("columns"), "aria-label", asOf && `Envs, boots and lists, ${asOf}`);
  }

  #figures() {
    const { envs, stats, waiting, ended, verdicts, now } = this.#store;
    const all = [...envs.values()];
    const playing = all.filter((env) => env.state === "playing" && !env.episode?.done).length;
    const set = (name, text) => setText(this.#values.get(name), text);
    set("Playing", `${playing} of ${all.length}`);
    set("Resetting", all.filter((env) => env.state === "resetting").length);
    set("Queue", waiting.length);
    set("Spares", stats.spares_wanted ? `${stats.spares} of ${stats.spares_wanted}` : "off");
    const lately = (at) => at > now - 3600;
    const failed = ended.filter((job) => job.state === "failed" && lately(job.ended_at)).length;
    const unscored = verdicts.filter((verdict) => verdict.score === null && lately(verdict.at)).length;
    set(FAILED, failed + unscored);
    setAttribute(this.#values.get(FAILED), "data-tone", failed + unscored ? "bad" : null);
  }

  tick() {
    const { state, until, why } = this.#connection;
    const node = byId("connection");
    const left = Math.max(0, Math.ceil((until - Date.now()) / 1000));
    const words = { live: "Live", refused: "No access", connecting: "Connecting", lost: left ? `Reconnecting in ${left} s` : "Reconnecting" };
    setText(node, words[state]);
    setAttribute(node, "data-tone", { live: "good", lost: "bad", refused: "bad" }[state] ?? "idle");
    setAttribute(node, "title", why || null);
    setAttribute(document.documentElement, "data-connection", state);
    const { daemon, now } = this.#store;
    if (daemon && this.live) setText(this.#values.get("Up"), counting(now - daemon.started_at));
  }
}

/** Who this page acts for. */
export function showCaller(caller) {
  const known = { token: caller.name, link: "by a link", cookie: "by a link" }[caller.how] ?? "no token needed";
  setText(byId("caller"), `${known} · ${caller.scope}`);
}

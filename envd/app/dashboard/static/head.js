// The top of the page: which daemon this is, whether it lives, whether a reset can be served, and what it has in hand.

import { byId, el, setAttribute, setHidden, setText } from "./dom.js";
import { counting } from "./format.js";
import { may } from "./api.js";

const FIGURES = ["Playing", "Resetting", "Queue", "Spares", "Failed, last hour", "Up"];

export class Head {
  #store;
  #connection = { state: "connecting", until: 0, why: "" };
  #values = new Map();

  constructor(store) {
    this.#store = store;
    for (const name of FIGURES) {
      const value = el("dd", { text: "–" });
      this.#values.set(name, value);
      byId("figures").append(el("div", {}, el("dt", { text: name }), value));
    }
  }

  connected(state, facts) {
    this.#connection = { state, until: Date.now() + (facts.waitMs ?? 0), why: facts.why ?? "" };
    this.tick();
  }

  render() {
    const { daemon, stats } = this.#store;
    if (!daemon) return;
    setText(byId("place"), `${daemon.name} · ${daemon.provider} · ${daemon.version}`);
    setAttribute(byId("place"), "title", `${daemon.image}; screen ${daemon.screen.join("×")}; daemon ${daemon.daemon_id}`);
    if (document.title !== `${daemon.name} · envd`) document.title = `${daemon.name} · envd`;
    const { ready, reasons, warnings } = stats.readiness;
    const draining = stats.draining ? ["draining: no new work is taken"] : [];
    const state = stats.draining ? "Draining" : ready ? "Ready" : "Not ready";
    setText(byId("ready"), state);
    setAttribute(byId("ready"), "data-tone", stats.draining ? "warn" : ready ? "good" : "bad");
    const words = [...new Set([...draining, ...reasons, ...warnings])];
    const left = stats.draining && stats.drain_left_s !== null ? ` (${counting(stats.drain_left_s)} left for episodes)` : "";
    const told = words.length ? words.join(" · ") + left : "A reset can be served now.";
    setText(byId("reasons"), told);
    setAttribute(byId("reasons"), "title", told);
    this.#figures();
    const drain = byId("drain");
    setHidden(drain, !may("admin"));
    setText(drain, stats.draining ? "Drain again…" : "Drain…");
    this.tick();
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
    set("Failed, last hour", failed + unscored);
    setAttribute(this.#values.get("Failed, last hour"), "data-tone", failed + unscored ? "bad" : null);
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
    if (daemon) setText(this.#values.get("Up"), counting(now - daemon.started_at));
  }
}

/** Who this page acts for. */
export function showCaller(caller) {
  const known = { token: caller.name, link: "by a link", cookie: "by a link" }[caller.how] ?? "no token needed";
  setText(byId("caller"), `${known} · ${caller.scope}`);
}

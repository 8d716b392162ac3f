// The latest verdicts, with the way to their evidence, and the latest events.

import { outward } from "./commands.js";
import { Keyed, byId, el, setAttribute, setHidden, setText } from "./dom.js";
import { clock, dated } from "./format.js";
import { verdictWords } from "./envs.js";

const SHOWN = 60;
const TROUBLE = new Set(["failed", "expired", "lost"]);

export class Verdicts {
  #store;
  #drawn = null;
  #rows = new Keyed(byId("episodes"), (verdict) => verdict.episode_id, (verdict) => new VerdictRow(verdict));

  constructor(store) {
    this.#store = store;
  }

  render() {
    const { verdicts } = this.#store;
    if (verdicts === this.#drawn) return;
    this.#drawn = verdicts;
    this.#rows.render(verdicts.slice(-SHOWN).reverse());
    setHidden(byId("no-episodes"), verdicts.length > 0);
    const scores = verdicts.filter((verdict) => verdict.score !== null).map((verdict) => verdict.score);
    const mean = scores.length ? `mean score ${(scores.reduce((sum, one) => sum + one, 0) / scores.length).toFixed(2)} of ${scores.length}` : "no scores";
    const without = verdicts.length - scores.length;
    setText(byId("episodes-count"), verdicts.length ? `${mean}${without ? `, ${without} without one` : ""}` : "");
  }
}

class VerdictRow {
  #words = el("span", { class: "verdict-words" });
  #why = el("span", { class: "muted verdict-why" });
  node;

  constructor(verdict) {
    const film = el("a", { class: "button small", href: `#film/${verdict.episode_id}`, text: "Film", "aria-label": `The film of ${verdict.episode_id}` });
    const bundle = outward(`/v1/episodes/${verdict.episode_id}/bundle`, "Bundle", { download: true, label: `Download what ${verdict.episode_id} left` });
    this.node = el(
      "tr",
      {},
      el("td", { class: "number", title: dated(verdict.at), text: clock(verdict.at) }),
      el("td", { class: "number", text: verdict.env }),
      el("td", {}, el("div", { class: "verdict-cell" }, this.#words, this.#why)),
      el("td", { class: "evidence" }, film, bundle),
    );
  }

  update(verdict) {
    const { words, tone, why } = verdictWords(verdict);
    setText(this.#words, words);
    setAttribute(this.#words, "data-tone", tone);
    setText(this.#why, why);
    setAttribute(this.#why, "title", why || null);
  }
}

export class News {
  #store;
  #drawn = null;
  #rows = new Keyed(byId("news"), (one) => one.id ?? one.at, (one) => new NewsRow(one));

  constructor(store) {
    this.#store = store;
  }

  render() {
    if (this.#store.news === this.#drawn) return;
    this.#drawn = this.#store.news;
    this.#rows.render([...this.#store.news].reverse());
  }
}

class NewsRow {
  node;

  constructor(one) {
    const words = worded(one);
    this.node = el(
      "li",
      { "data-tone": isTrouble(one) ? "bad" : null },
      el("time", { class: "number muted", text: clock(one.at), title: dated(one.at) }),
      el("span", { class: "news-where number", text: one.env === null || one.env === undefined ? "" : `env ${one.env}` }),
      el("span", { class: "news-words", text: words, title: words }),
    );
  }

  update() {} // what happened does not change
}

function isTrouble(one) {
  return TROUBLE.has(one.job?.state) || TROUBLE.has(one.data?.state) || one.data?.mask === true || one.data?.record?.outcome === "failed";
}

/** An event as a sentence. */
function worded({ kind, job, data = {} }) {
  switch (kind) {
    case "state":
      return [`${job.kind} ${job.state.replaceAll("_", " ")}`, job.error && `${job.error.code}: ${job.error.detail}`].filter(Boolean).join(": ");
    case "step":
      return `step ${data.step}: ${data.problem || data.actions.map((action) => action.action + (action.outcome === "ok" || action.outcome === "special" ? "" : ` (${action.outcome})`)).join("; ")}`;
    case "setup":
      return data.record ? `set-up ${data.record.index} ${data.record.type}: ${data.record.outcome} ${data.record.detail}` : kind;
    case "episode":
      return data.state === "ended" ? `episode ended after ${data.steps} ${data.steps === 1 ? "step" : "steps"}: ${data.end_reason}` : `episode began (${data.episode_id})`;
    default:
      return data.message ?? kind;
  }
}

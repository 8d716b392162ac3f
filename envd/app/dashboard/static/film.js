// An episode as a film: each step on the picture that it was done on, with what it did drawn in, and the last screen.
// It has an address (#film/EPISODE/STEP), and goes on while its episode does.

import { Problem, get } from "./api.js";
import { follow, isAllowed } from "./commands.js";
import { byId, el, setAttribute, setHidden, setText } from "./dom.js";
import { verdictWords } from "./envs.js";
import { clock, duration } from "./format.js";
import { caption, overlay, spoken } from "./marks.js";
import { release, show } from "./pictures.js";

const THUMB = 240; // px

export class Film {
  #store;
  #dialog = byId("film");
  #strip = byId("film-strip");
  #stage = byId("film-stage");
  #picture = el("img", { class: "film-picture", alt: "" });
  #drawing = null;
  #caption = el("p", { class: "film-caption", hidden: true });
  #episode = null;
  #screen = [16, 9];
  #scenes = []; // what can be shown: {number, frame, step}; `step` is null for the last screen
  #shown = 0;
  #verdict = "";
  #loading = null;
  #observer;

  constructor(store) {
    this.#store = store;
    this.#stage.prepend(this.#picture);
    this.#stage.append(this.#caption);
    byId("film-close").addEventListener("click", () => this.#dialog.close());
    byId("film-back").addEventListener("click", () => this.#go(this.#shown - 1));
    byId("film-on").addEventListener("click", () => this.#go(this.#shown + 1));
    byId("film-bundle").addEventListener("click", (event) => (isAllowed(event.currentTarget) ? follow(event) : event.preventDefault()));
    byId("film-bundle").setAttribute("download", "");
    this.#dialog.addEventListener("close", () => this.#leave());
    this.#dialog.addEventListener("keydown", (event) => this.#key(event));
    this.#observer = new IntersectionObserver((entries) => this.#load(entries), { root: this.#strip, rootMargin: "0px 300px" });
    addEventListener("hashchange", () => this.route());
    store.onStep((env) => {
      if (this.#episode && store.envs.get(env)?.episode?.id === this.#episode) void this.#more(true);
    });
  }

  /** Show what the address names. */
  route() {
    const [, episode, step] = location.hash.match(/^#film\/([\w-]{1,64})(?:\/(\d{1,6}))?$/) ?? [];
    if (episode === undefined) {
      if (this.#dialog.open) this.#dialog.close();
    } else if (episode !== this.#episode) void this.#open(episode, step === undefined ? null : Number(step));
    else if (step !== undefined) this.#go(this.#scenes.findIndex((scene) => scene.number === Number(step)));
  }

  async #open(episode, step) {
    this.#clear();
    this.#episode = episode;
    setText(byId("film-title"), episode);
    setAttribute(byId("film-bundle"), "href", `/v1/episodes/${episode}/bundle`);
    this.#explain("Loading the episode.");
    if (!this.#dialog.open) this.#dialog.showModal();
    await this.#more(false);
    if (this.#episode !== episode || !this.#scenes.length) return;
    const at = step === null ? 0 : this.#scenes.findIndex((scene) => scene.number === step);
    this.#go(Math.max(0, at));
  }

  /** Take what has come since; `follows` keeps whoever looks at the end there. */
  async #more(follows) {
    if (this.#loading) return this.#loading;
    const episode = this.#episode;
    this.#loading = (async () => {
      try {
        const atEnd = this.#shown === this.#scenes.length - 1;
        const steps = this.#scenes.filter((scene) => scene.step !== null).map((scene) => scene.step);
        for (;;) {
          const told = await get(`/v1/episodes/${episode}/steps?after=${steps.at(-1)?.step ?? 0}`);
          if (episode !== this.#episode) return;
          steps.push(...told.steps);
          this.#tell(told);
          if (!told.more) break;
        }
        this.#build(steps);
        if (follows && atEnd) this.#go(this.#scenes.length - 1);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        if (episode === this.#episode) this.#refuse(error);
      }
    })();
    try {
      await this.#loading;
    } finally {
      this.#loading = null;
    }
  }

  #tell({ episode, verdict }) {
    this.#screen = episode.screen ?? this.#screen;
    this.#stage.style.setProperty("--screen", `${this.#screen[0]} / ${this.#screen[1]}`);
    this.#strip.style.setProperty("--screen", `${this.#screen[0]} / ${this.#screen[1]}`);
    const what = [`env ${episode.env ?? "?"}`, episode.task_id, episode.began_at && clock(episode.began_at)].filter((one) => one !== null && one !== undefined);
    setText(byId("film-title"), `${this.#episode} · ${what.join(" · ")}`);
    const { words, tone, why } = verdict ? verdictWords(verdict) : { words: "no verdict", tone: "idle", why: "" };
    this.#verdict = [words, why].filter(Boolean).join(": ");
    setText(byId("film-verdict"), words);
    setAttribute(byId("film-verdict"), "data-tone", tone);
    setAttribute(byId("film-verdict"), "title", why || null);
  }

  /** A step is shown on the picture before it. */
  #build(steps) {
    let frame = 0;
    const scenes = [];
    for (const step of steps) {
      scenes.push({ number: step.step, frame, step });
      if (step.has_frame) frame = step.step;
    }
    scenes.push({ number: (steps.at(-1)?.step ?? 0) + 1, frame, step: null });
    const before = this.#scenes.length;
    this.#scenes = scenes;
    if (before) this.#strip.lastElementChild.remove();
    for (let place = Math.max(0, before - 1); place < scenes.length; place++) this.#strip.append(this.#thumb(place));
  }

  #thumb(place) {
    const { number, step } = this.#scenes[place];
    const image = el("img", { alt: "", decoding: "async" });
    const name = step === null ? "after it" : `${number}`;
    const label = step === null ? "The screen after the last step" : `Step ${number}`;
    const button = el(
      "button",
      { type: "button", class: "thumb", "aria-label": label, on: { click: () => this.#go(place) } },
      el("span", { class: "thumb-picture" }, image, ...(step === null ? [] : drawn(step, this.#screen))),
      el("span", { class: "thumb-name number", text: name }),
    );
    const item = el("li", {}, button);
    item.image = image;
    item.place = place;
    this.#observer.observe(item);
    return item;
  }

  #load(entries) {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      this.#observer.unobserve(target);
      show(target.image, `${this.#path(target.place)}?width=${THUMB}`).catch((error) => setAttribute(target.image, "alt", error.message));
    }
  }

  #path(place) {
    return `/v1/episodes/${this.#episode}/frames/${this.#scenes[place].frame}`;
  }

  #go(place) {
    if (place < 0 || place >= this.#scenes.length) return;
    this.#shown = place;
    const { number, step } = this.#scenes[place];
    history.replaceState(null, "", `#film/${this.#episode}/${number}`);
    [...this.#strip.children].forEach((item, at) => setAttribute(item.firstChild, "aria-current", at === place ? "true" : null));
    this.#strip.children[place]?.scrollIntoView({ block: "nearest", inline: "nearest" });
    setAttribute(byId("film-back"), "aria-disabled", place === 0 ? "true" : null);
    setAttribute(byId("film-on"), "aria-disabled", place === this.#scenes.length - 1 ? "true" : null);
    this.#describe(step, number);
    this.#drawing?.remove();
    this.#drawing = overlay(step?.marks ?? [], this.#screen);
    this.#stage.append(this.#drawing);
    setText(this.#caption, spoken(step?.marks ?? []));
    setHidden(this.#caption, !this.#caption.textContent);
    void this.#project(place);
  }

  async #project(place) {
    const episode = this.#episode;
    const gone = () => episode !== this.#episode || place !== this.#shown;
    try {
      this.#explain("");
      await show(this.#picture, this.#path(place));
      if (gone() && episode === this.#episode) void this.#project(this.#shown);
    } catch (error) {
      if (gone()) return;
      release(this.#picture);
      this.#explain(error.message);
    }
  }

  #describe(step, number) {
    const count = this.#scenes.length - 1;
    setText(byId("film-step"), step === null ? (count ? "After the last step" : "No step yet") : `Step ${number} of ${count}`);
    setText(byId("film-said"), step?.said ?? "");
    const said = step === null ? [this.#verdict] : [...step.marks.map(caption), step.problem, step.error, ...step.actions.map(outcome), step.end_reason && `Ended: ${step.end_reason}`];
    byId("film-actions").replaceChildren(...said.filter(Boolean).map((words) => el("li", { text: words })));
    setAttribute(this.#picture, "alt", step === null ? "The last screen" : `The screen at step ${number}`);
  }

  #key(event) {
    const moves = { ArrowLeft: this.#shown - 1, ArrowRight: this.#shown + 1, Home: 0, End: this.#scenes.length - 1 };
    if (!(event.key in moves) || event.target.closest("pre")) return;
    event.preventDefault();
    this.#go(moves[event.key]);
  }

  /** Where there is no such episode, there is nothing to turn or to take along. */
  #refuse(problem) {
    this.#explain(problem.message);
    if (problem.status !== 404) return;
    setText(byId("film-step"), "There is no such episode.");
    this.#close(true);
  }

  #close(closed) {
    for (const name of ["film-back", "film-on", "film-bundle"]) setAttribute(byId(name), "aria-disabled", closed ? "true" : null);
  }

  #explain(words) {
    setText(byId("film-why"), words);
  }

  #clear() {
    this.#observer.disconnect();
    for (const item of this.#strip.children) release(item.image);
    this.#strip.replaceChildren();
    release(this.#picture);
    this.#drawing?.remove();
    this.#verdict = "";
    setHidden(this.#caption, true);
    this.#scenes = [];
    this.#shown = 0;
    this.#describe(null, 0);
    setText(byId("film-verdict"), "");
    this.#close(false);
  }

  #leave() {
    this.#clear();
    this.#episode = null;
    history.replaceState(null, "", location.pathname + location.search);
  }
}

function drawn(step, screen) {
  const words = spoken(step.marks);
  return [overlay(step.marks, screen, 2), words && el("span", { class: "thumb-caption", text: words })].filter(Boolean);
}

/** What became of an action, where that is worth a word. */
function outcome(action) {
  if (action.outcome === "ok" || action.outcome === "special") return action.seconds >= 1 ? `took ${duration(action.seconds)}` : "";
  return `${action.outcome}: ${action.stderr || action.action}`;
}

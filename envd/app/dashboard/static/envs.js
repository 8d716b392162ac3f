// Each env a card: its screen, what is played on it, who has it, how it last ended.

import { allow, cancel, isAllowed, outward, recycle } from "./commands.js";
import { Keyed, byId, el, setAttribute, setHidden, setText } from "./dom.js";
import { counting, score, shortDesktop } from "./format.js";
import { Phases, Probes } from "./phases.js";
import { Live } from "./pictures.js";

const WIDTHS = [480, 960, 1440]; // px of a picture on a card, by how large that is

const STATES = {
  playing: ["playing", "good"],
  done: ["episode over", "info"],
  resetting: ["resetting", "warn"],
  waiting: ["reset queued", "warn"],
  lost: ["desktop lost", "bad"],
  failed: ["reset failed", "bad"],
  empty: ["empty", "idle"],
};

/** What the env does, as people put it. `failure` is what its last reset failed with, if it did. */
function stateOf(env, failure) {
  if (env.waiting_job_id && env.state !== "resetting") return "waiting";
  if (env.state === "empty" && failure) return "failed";
  return env.state === "playing" && env.episode?.done ? "done" : env.state;
}

/** A score as a number; whatever went wrong as words. */
export function verdictWords(verdict) {
  if (!verdict) return { words: "none yet", tone: "idle", why: "" };
  if (verdict.score !== null) {
    const tone = verdict.score > 0 ? "good" : "info";
    return { words: `score ${score(verdict.score)}`, tone, why: verdict.detail };
  }
  const words = `no score: ${verdict.code ?? verdict.status}`;
  return { words, tone: "bad", why: [verdict.fault && `fault: ${verdict.fault}`, verdict.detail].filter(Boolean).join(". ") };
}

/** As `verdictWords`; the score of an earlier episode must not look like one of the episode that is played. */
function verdictFor(env, latest) {
  const verdict = verdictWords(latest);
  if (!latest || latest.episode_id === env.episode?.id) return verdict;
  const words = env.episode ? `none yet; before: ${verdict.words}` : `before: ${verdict.words}`;
  return { words, tone: "idle", why: verdict.why };
}

const FILTERS = {
  all: () => true,
  playing: (state) => state === "playing",
  resetting: (state) => state === "resetting" || state === "waiting",
  trouble: (state) => state === "lost" || state === "failed",
};

export class Envs {
  #store;
  #filter = "all";
  #buttons = new Map();
  #cards;
  #watch;

  constructor(store) {
    this.#store = store;
    this.#watch = new IntersectionObserver((entries) => {
      for (const entry of entries) entry.target.card?.see(entry.isIntersecting);
    });
    this.#cards = new Keyed(byId("cards"), (env) => env.id, (env) => new Card(env, store, this.#watch));
    for (const name of Object.keys(FILTERS)) {
      const press = () => {
        this.#filter = name;
        this.render();
      };
      const button = el("button", { type: "button", class: "chip", on: { click: press } });
      this.#buttons.set(name, button);
      byId("filter").append(button);
    }
    store.onStep((env) => {
      for (const card of this.#cards.parts) if (card.id === env) card.refresh();
    });
    document.addEventListener("visibilitychange", () => {
      for (const card of this.#cards.parts) card.refresh();
    });
  }

  render() {
    const envs = [...this.#store.envs.values()].sort((a, b) => a.id - b.id);
    const states = envs.map((env) => stateOf(env, this.#store.failureOf.get(env.id)));
    const shown = envs.filter((_, place) => FILTERS[this.#filter](states[place]));
    this.#cards.render(shown);
    setHidden(byId("no-cards"), shown.length > 0);
    for (const [name, button] of this.#buttons) {
      setText(button, `${name} ${states.filter(FILTERS[name]).length}`);
      setAttribute(button, "aria-pressed", name === this.#filter);
    }
  }

  tick() {
    for (const card of this.#cards.parts) card.tick();
  }
}

class Card {
  #store;
  #env;
  #watch;
  #live;
  #title = el("h3");
  #state = el("span", { class: "pill" });
  #image = el("img", { class: "screen-picture", alt: "", decoding: "async", width: 480, height: 270 });
  #why = el("p", { class: "screen-why" });
  #phases = new Phases();
  #probes = new Probes();
  #boot = el("div", { class: "screen-boot", hidden: true }, this.#phases.node, this.#probes.node);
  #screen = el("button", { type: "button", class: "screen" }, this.#image);
  #task = el("p", { class: "task" });
  #meter = el("div", { class: "meter", role: "progressbar", "aria-valuemin": 0 }, el("span"));
  #steps = el("span", { class: "number" });
  #lease = el("dd");
  #desktop = el("dd");
  #verdict = el("dd");
  #vnc;
  #film = el("button", { type: "button", class: "button small", text: "Film" });
  #bundle;
  #act = el("button", { type: "button", class: "button small act" });
  node;

  constructor(env, store, watch) {
    const id = env.id;
    this.#store = store;
    this.#env = env;
    this.#watch = watch;
    this.#live = new Live(this.#image, () => `/v1/envs/${id}/screenshot?width=${this.#width}`, (words) => this.#explain(words));
    this.#vnc = outward(`/v1/envs/${id}/vnc/`, "Screen", { label: `The live screen of env ${id}, in a new tab` });
    this.#bundle = outward("", "Bundle", { download: true, label: `Download what the episode of env ${id} left` });
    for (const link of [this.#vnc, this.#bundle]) link.addEventListener("click", (event) => isAllowed(link) || block(event), true);
    setAttribute(this.#film, "aria-label", `The film of env ${id}'s episode`);
    const openFilm = (button) => () => isAllowed(button) && this.#env.episode && (location.hash = `film/${this.#env.episode.id}`);
    this.#film.addEventListener("click", openFilm(this.#film));
    this.#screen.addEventListener("click", openFilm(this.#film));
    this.#act.addEventListener("click", () => isAllowed(this.#act) && this.#command());
    this.node = el(
      "li",
      { class: "card" },
      el("div", { class: "card-head" }, this.#title, this.#state),
      el("div", { class: "frame" }, this.#screen, this.#why, this.#boot),
      this.#task,
      el("div", { class: "progress" }, this.#meter, this.#steps),
      el(
        "dl",
        { class: "facts" },
        ...[["Lease", this.#lease], ["Desktop", this.#desktop], ["Verdict", this.#verdict]].map(([name, value]) => el("div", {}, el("dt", { text: name }), value)),
      ),
      el("div", { class: "card-end" }, this.#vnc, this.#film, this.#bundle, this.#act),
    );
    setText(this.#title, `Env ${id}`);
    this.node.card = this;
    watch.observe(this.node);
  }

  get id() {
    return this.#env.id;
  }

  see(seen) {
    this.#live.see(seen);
  }

  refresh() {
    this.#live.refresh();
  }

  gone() {
    this.#watch.unobserve(this.node);
    this.#live.end();
  }

  get #width() {
    const shown = this.#image.clientWidth * devicePixelRatio;
    return WIDTHS.find((width) => width >= shown) ?? WIDTHS.at(-1);
  }

  get #job() {
    return this.#store.jobs.get(this.#env.job_id) ?? this.#store.jobs.get(this.#env.waiting_job_id) ?? null;
  }

  update(env) {
    this.#env = env;
    const { episode, desktop } = env;
    const state = stateOf(env, this.#store.failureOf.get(env.id));
    const [words, tone] = STATES[state];
    setText(this.#state, words);
    setAttribute(this.#state, "data-tone", tone);
    setAttribute(this.node, "data-state", state);

    const task = this.#taskOf(env);
    setText(this.#task, task);
    setAttribute(this.#task, "title", [episode?.task_id, task].filter(Boolean).join(": "));
    const count = episode ? (episode.counts === "actions" ? episode.actions : episode.steps) : 0;
    const most = episode?.max_steps ?? 0;
    this.#meter.firstChild.style.width = most ? `${Math.min(100, (100 * count) / most)}%` : "0";
    setAttribute(this.#meter, "aria-valuenow", count);
    setAttribute(this.#meter, "aria-valuemax", most || 1);
    setAttribute(this.#meter, "aria-label", `${episode?.counts ?? "actions"} of env ${env.id}'s episode`);
    const end = episode?.end_reason ? ` · ${episode.end_reason.replaceAll("_", " ")}` : "";
    setText(this.#steps, episode ? `${count} of ${most} ${episode.counts}${end}` : "–");

    setText(this.#desktop, desktop ? `${shortDesktop(desktop.id)}${episode ? ` · ${episode.reset_path}` : ""}` : "none");
    setAttribute(this.#desktop, "title", desktop?.id);
    const verdict = verdictFor(env, this.#store.verdictOf.get(env.id));
    setText(this.#verdict, verdict.words);
    setAttribute(this.#verdict, "data-tone", verdict.tone);
    setAttribute(this.#verdict, "title", verdict.why);

    const hasScreen = env.state === "playing" && desktop !== null;
    this.#live.want(hasScreen);
    setAttribute(this.#screen, "aria-label", `Screen of env ${env.id}: open the film of its episode`);
    if (!hasScreen) this.#explain(this.#absence(env));
    allow(this.#vnc, "play", desktop?.endpoints ? (desktop.endpoints.vnc ? "" : `Desktops of ${desktop.provider} have no VNC.`) : "There is no desktop.");
    allow(this.#film, "read", episode ? "" : "There is no episode.");
    allow(this.#bundle, "read", episode ? "" : "There is no episode.");
    setAttribute(this.#screen, "disabled", episode ? null : true);
    setAttribute(this.#bundle, "href", episode ? `/v1/episodes/${episode.id}/bundle` : "/");
    const job = this.#job;
    const [command, means] = job ? ["Cancel", "the reset of"] : desktop ? ["Recycle", "the desktop of"] : ["Start", "a desktop for"];
    setText(this.#act, command);
    setAttribute(this.#act, "aria-label", `${command} ${means} env ${env.id}`);
    allow(this.#act, "play", job?.cancel_requested ? "It is being cancelled." : this.#store.stats?.draining && !job ? "The daemon takes no new work." : "");
    this.tick();
  }

  /** Why there is no screen: what the last reset failed with, where that is why. */
  #absence({ id, state, detail }) {
    if (state === "resetting") return "";
    if (state === "lost") return detail;
    const error = this.#store.failureOf.get(id);
    return error ? [`The last reset failed: ${error.code}.`, error.detail, error.hint].filter(Boolean).join(" ") : "No desktop. Start, `envd reset " + id + "` or `envd demo` makes one.";
  }

  #taskOf({ episode, state }) {
    if (episode) return episode.instruction || episode.task_id || "No task: a plain desktop.";
    if (state !== "resetting") return "No episode.";
    return this.#job?.task_id ? `Becomes task ${this.#job.task_id}.` : "Becomes a plain desktop.";
  }

  tick() {
    const job = this.#job;
    const boots = job !== null && this.#env.state === "resetting";
    setHidden(this.#boot, !boots);
    if (boots) {
      this.#phases.update(job, this.#store.now);
      this.#probes.update(job);
    }
    const lease = this.#env.lease;
    setText(this.#lease, lease ? `${lease.owner} · ${counting(lease.expires_at - this.#store.now)} left` : "free for all");
    setAttribute(this.#lease, "title", lease ? `${lease.id}…` : null);
  }

  #command() {
    const job = this.#job;
    void (job ? cancel(job) : recycle(this.#env));
  }

  #explain(words) {
    setText(this.#why, words);
    setAttribute(this.#screen, "title", words || null);
    setHidden(this.#why, !words);
  }
}

function block(event) {
  event.preventDefault();
  event.stopImmediatePropagation();
}

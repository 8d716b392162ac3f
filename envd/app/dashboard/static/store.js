// What is known of the daemon: a snapshot, and what has come since. Changes are gathered and told once per frame.

const HOST_SECONDS = 1800;
const HOST_STEP = 8; // seconds between two samples that are kept
const ENDED = 500;
const VERDICTS = 200;
const NEWS = 60;
const LINES = 12;
const UNTOLD = new Set(["position", "probe", "phase", "progress", "env", "stats"]);

export class Store {
  daemon = null;
  stats = null;
  envs = new Map();
  jobs = new Map(); // those that have not ended
  ended = [];
  verdicts = [];
  verdictOf = new Map(); // env → its latest
  failureOf = new Map(); // env → what its last reset failed with, or null
  news = [];
  lines = new Map(); // job → what was said of it lately
  host = [];
  limit = 0;
  #endedIds = new Set();
  #clockOff = 0;
  #listeners = [];
  #stepped = [];
  #due = false;

  /** Call `listener()` once per frame in which something changed. */
  onChange(listener) {
    this.#listeners.push(listener);
  }

  /** Call `listener(env)` when the screen of an env will have changed. */
  onStep(listener) {
    this.#stepped.push(listener);
  }

  /** The daemon's clock, in Unix seconds. */
  get now() {
    return Date.now() / 1000 + this.#clockOff;
  }

  get waiting() {
    return [...this.jobs.values()].filter((job) => job.state === "queued").sort(byPosition);
  }

  get running() {
    return [...this.jobs.values()].filter((job) => job.state !== "queued").sort((a, b) => a.started_at - b.started_at);
  }

  take({ event, data }) {
    if (event === "snapshot") this.#replace(data);
    else if (event === "stats") this.#takeStats(data);
    else if (event === "env") this.envs.set(data.env.id, data.env);
    else this.#takeEvent(event, data);
    this.touch();
  }

  touch() {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      for (const listener of this.#listeners) listener();
    });
  }

  #replace(told) {
    this.daemon = told.daemon;
    this.stats = told.stats;
    this.#clockOff = told.daemon.now - Date.now() / 1000;
    this.limit = told.queue.limit;
    this.envs = new Map(told.envs.map((env) => [env.id, env]));
    this.jobs = new Map(told.jobs.map((job) => [job.id, job]));
    this.ended = told.ended;
    this.#endedIds = new Set(told.ended.map((job) => job.id));
    this.failureOf = new Map(told.ended.map((job) => [job.env, job.error]));
    this.verdicts = told.verdicts;
    this.verdictOf = new Map(told.verdicts.map((verdict) => [verdict.env, verdict]));
    this.news = told.news;
    this.lines = new Map(Object.entries(told.lines));
    this.host = told.host;
    for (const env of this.envs.keys()) this.#tellStep(env);
  }

  #takeStats(told) {
    this.stats = told;
    if (!told.host) return;
    const last = this.host.at(-1);
    if (last && told.host.at - last.at < HOST_STEP) return;
    this.host.push(told.host);
    while (this.host[0].at < told.host.at - HOST_SECONDS) this.host.shift();
  }

  #takeEvent(event, data) {
    if (data.job) this.#takeJob(data.job);
    if (data.job_id && (event === "progress" || event === "note") && data.data.message) {
      const said = { at: data.at, kind: event, message: data.data.message.slice(0, 400) };
      const before = this.lines.get(data.job_id) ?? [];
      // A line that only counts on takes the place of the one before.
      const kept = pattern(before.at(-1)?.message) === pattern(said.message) ? before.slice(0, -1) : before;
      this.lines.set(data.job_id, [...kept, said].slice(-LINES));
    }
    if (event === "verdict" && !this.verdicts.some((one) => one.episode_id === data.data.episode_id)) {
      const verdict = { env: data.env, at: data.at, ...data.data };
      this.verdicts = [...this.verdicts, verdict].slice(-VERDICTS);
      this.verdictOf.set(data.env, verdict);
    }
    if ((event === "step" || event === "episode") && data.env !== null) this.#tellStep(data.env);
    if (!UNTOLD.has(event) && !this.news.some((one) => one.id && one.id === data.id)) {
      this.news = [...this.news, { at: this.now, ...data }].slice(-NEWS);
    }
  }

  #takeJob(job) {
    if (this.#endedIds.has(job.id)) return; // told again after a reconnect
    if (job.ended_at !== null) {
      this.jobs.delete(job.id);
      this.lines.delete(job.id);
      this.#endedIds.add(job.id);
      this.ended = [...this.ended, job].slice(-ENDED);
      this.failureOf.set(job.env, job.error);
    } else if (job.version >= (this.jobs.get(job.id)?.version ?? 0)) this.jobs.set(job.id, job);
  }

  #tellStep(env) {
    for (const listener of this.#stepped) listener(env);
  }
}

const pattern = (words) => words?.replace(/\d+/g, "#");
const byPosition = (a, b) => (a.position ?? Infinity) - (b.position ?? Infinity) || a.created_at - b.created_at;

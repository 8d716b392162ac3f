// What somebody who may can have done: cancel, recycle, drain; and open what the browser opens by itself.

import { may, openable, post } from "./api.js";
import { ask } from "./dialogs.js";
import { el, say, setAttribute } from "./dom.js";
import { plural } from "./format.js";

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    say(error.message, true);
  }
}

export async function cancel(job) {
  const what = job.env === null ? `the ${job.kind}` : `the reset of env ${job.env}`;
  const words =
    job.state === "queued"
      ? "It waits still; nothing was booted for it."
      : "What was made for it so far is removed, unless another job can use it.";
  if (!(await ask({ title: `Cancel ${what}?`, words, yes: "Cancel it" }))) return;
  await attempt(async () => {
    await post(`/v1/jobs/${job.id}/cancel`);
    say(`Asked to cancel ${what}.`);
  });
}

/** Asks first, where there is something to lose. */
export async function recycle(env) {
  const played = env.episode && !env.episode.done;
  const words =
    (played ? `Its episode ends without a verdict after ${plural(env.episode.steps, "step")}. ` : "") +
    "It is reset without a task: its desktop is removed, and a clean one takes its place.";
  if (env.desktop && !(await ask({ title: `Give env ${env.id} a clean desktop?`, words, yes: "Recycle it" }))) return;
  await attempt(async () => {
    await post(`/v1/envs/${env.id}/reset`);
    say(`Env ${env.id} will have a clean desktop.`);
  });
}

export async function drain() {
  const words = "No new work is taken from now on. The daemon ends once its episodes have been judged, or when the time is over.";
  const minutes = await ask({ title: "Drain and end the daemon?", words, yes: "Drain it", minutes: true });
  if (minutes === false) return;
  await attempt(() => post("/v1/drain", { limit_s: minutes * 60 }));
}

/** A link to `path`, which the browser opens itself: in another tab that knows nothing of this page, or as a download. */
export function outward(path, text, { label, download = false } = {}) {
  return el("a", {
    class: "button small",
    href: path,
    text,
    "aria-label": label,
    rel: "noopener noreferrer",
    target: download ? null : "_blank",
    download: download,
    on: { click: (event) => follow(event) },
  });
}

/** Where a token is needed the link is made when it is asked for, since it is good for a short while. */
export function follow(event) {
  const link = event.currentTarget;
  event.preventDefault();
  void attempt(async () => {
    const path = await openable(link.getAttribute("href"));
    const opened = el("a", { href: path, rel: "noopener noreferrer", target: link.target || null, download: link.hasAttribute("download") });
    opened.click();
  });
}

/** Grey out what the caller may not do, and say why. */
export function allow(button, scope, why = "") {
  const reason = may(scope) ? why : `This needs the scope ${scope}.`;
  setAttribute(button, "aria-disabled", reason ? "true" : null);
  setAttribute(button, "title", reason || null);
}

export const isAllowed = (button) => button.getAttribute("aria-disabled") !== "true";

// Puts the page together: what comes over the stream goes into the store, and every part shows what it has of that.

import { Problem, introduce, useToken } from "./api.js";
import { Boots, Queue } from "./boots.js";
import { Failures, HostCharts, Resets } from "./charts.js";
import { drain, outward } from "./commands.js";
import { askForToken } from "./dialogs.js";
import { byId, say, setText } from "./dom.js";
import { Envs } from "./envs.js";
import { Film } from "./film.js";
import { Head, showCaller } from "./head.js";
import { News, Verdicts } from "./lists.js";
import { Store } from "./store.js";
import { follow } from "./stream.js";

const STREAM = "/v1/events?stats=1";
const RETRY_MS = 2000;

const store = new Store();
const head = new Head(store);
const film = new Film(store);
const envs = new Envs(store);
const boots = new Boots(store);
const parts = [head, envs, boots, new Queue(store), new HostCharts(store), new Resets(store), new Failures(store), new Verdicts(store), new News(store)];

let version = null;

store.onChange(() => {
  if (store.daemon === null) return;
  document.documentElement.dataset.state = "known";
  for (const part of parts) part.render();
  if (version !== null && store.daemon.version !== version) {
    say(`The daemon is now ${store.daemon.version}. Reload this page for what is new in it.`);
  }
  version = store.daemon.version;
});

setInterval(() => {
  if (document.hidden) return;
  for (const part of head.live ? [head, envs, boots] : [head]) part.tick(); // nothing goes on that is not told
}, 1000);

byId("drain").addEventListener("click", drain);
byId("ways").append(outward("/docs", "API"), outward("/errors", "Error codes"), outward("/version", "Settings"));

/** Return once the daemon knows who this is. */
async function signIn() {
  for (let refusal = ""; ; ) {
    try {
      showCaller(await introduce());
      store.touch();
      return;
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.status === 401) {
        head.connected("refused", { why: error.message });
        useToken(await askForToken(refusal));
        refusal = "That token is not known here.";
      } else {
        head.connected("lost", { waitMs: RETRY_MS, why: error.message });
        setText(byId("before"), error.message);
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    }
  }
}

async function start() {
  await signIn();
  film.route();
  await follow(STREAM, {
    take: (message) => store.take(message),
    state(name, facts) {
      head.connected(name, facts);
      if (store.daemon === null) setText(byId("before"), facts.why || "Waiting for the daemon.");
    },
    again: signIn,
  });
}

void start();

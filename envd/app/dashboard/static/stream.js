// The stream of everything, for ever: read with fetch, since an EventSource sends no token; taken up again when it ends,
// when the daemon was restarted, and when nothing came for longer than there ever is silence.

import { Problem, request } from "./api.js";

const SILENCE_MS = 15_000; // `stats` come every few seconds
const FIRST_WAIT_MS = 400;
const LONGEST_WAIT_MS = 10_000;

/** Messages of a stream of server-sent events, from pieces of its text. */
export class Parser {
  #rest = "";
  #message = fresh();
  lastId = "";
  retryMs = null;

  *feed(text) {
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line !== "") this.#take(line);
      else if (this.#message.data.length) {
        const { event, data } = this.#message;
        yield { event, data: JSON.parse(data.join("\n")), id: this.lastId };
        this.#message = fresh();
      } else this.#message = fresh();
    }
  }

  #take(line) {
    const colon = line.indexOf(":");
    if (colon === 0) return;
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this.#message.event = value;
    else if (field === "data") this.#message.data.push(value);
    else if (field === "id") this.lastId = value;
    else if (field === "retry" && /^\d+$/.test(value)) this.retryMs = Number(value);
  }
}

const fresh = () => ({ event: "message", data: [] });

/** Call `take(message)` for each message and `state(name, facts)` when the connection is `live`, `lost` (facts: `waitMs`,
 * `why`) or `refused` (facts: `why`). Where it is refused, `again()` is awaited before the next try. */
export async function follow(path, { take, state, again }) {
  let lastId = "";
  let failures = 0;
  for (;;) {
    let why = "";
    let wait = null;
    try {
      await once(path, lastId, {
        state,
        take(message) {
          failures = 0;
          lastId = message.id || lastId;
          if (message.event === "server-shutdown") wait = message.data.data.retry_s * 1000;
          take(message);
        },
      });
      why = "The daemon ended the stream.";
    } catch (error) {
      if (error instanceof Problem && error.status === 401) {
        state("refused", { why: error.message });
        await again();
      }
      if (error instanceof Problem && error.retryAfter) wait = error.retryAfter * 1000;
      why = error.message;
    }
    failures += 1;
    const backoff = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 1.6 ** (failures - 1)) * (0.75 + Math.random() / 2);
    const waitMs = Math.min(LONGEST_WAIT_MS, wait ?? backoff);
    state("lost", { waitMs, why });
    await sleep(waitMs);
  }
}

async function once(path, lastId, { take, state }) {
  const giveUp = new AbortController();
  let watchdog = setTimeout(() => giveUp.abort(), SILENCE_MS);
  try {
    const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
    const response = await request(path, { headers, signal: giveUp.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const parser = new Parser();
    state("live", {});
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(watchdog);
      watchdog = setTimeout(() => giveUp.abort(), SILENCE_MS);
      for (const message of parser.feed(value)) take(message);
    }
  } catch (error) {
    if (giveUp.signal.aborted) throw new Error("Nothing came for too long.");
    throw error;
  } finally {
    clearTimeout(watchdog);
    giveUp.abort();
  }
}

/** Ends early when the network or the page comes back. */
function sleep(ms) {
  return new Promise((resolve) => {
    const wake = () => {
      clearTimeout(timer);
      removeEventListener("online", wake);
      resolve();
    };
    const timer = setTimeout(wake, ms);
    addEventListener("online", wake);
  });
}

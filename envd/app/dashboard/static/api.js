// Requests to the daemon. A token that was given is kept here, in memory and nowhere else: pages of guests share this
// origin, and could read what lies in its storage.

let token = "";
let caller = null;
const SCOPES = ["read", "play", "admin"];
const PATIENCE_MS = 8000; // a way that swallows what is sent must not leave the page waiting for ever

/** What the daemon refused, or that it was not reached. */
export class Problem extends Error {
  constructor(status, told) {
    super([told.detail ?? told.title ?? "The daemon did not answer.", told.hint].filter(Boolean).join(" "));
    this.status = status;
    this.code = told.code ?? "";
    this.retryAfter = told.retry_after_s ?? null;
  }
}

export function useToken(given) {
  token = given;
}

/** A response that is well. Raises Problem, also when nothing comes for too long; a `signal` of the caller's own takes the
 * place of that. */
export async function request(path, how = {}) {
  const headers = new Headers(how.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  const signal = how.signal ?? AbortSignal.timeout(PATIENCE_MS);
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", redirect: "error", ...how, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error.name === "TimeoutError") throw new Problem(0, { detail: "The daemon did not answer in time." });
    throw new Problem(0, { detail: "The daemon could not be reached." });
  }
  if (response.ok) return response;
  let told = {};
  try {
    told = await response.json();
  } catch {
    told = { detail: `The answer was ${response.status}.` };
  }
  throw new Problem(response.status, told);
}

export async function get(path, how) {
  return (await request(path, how)).json();
}

export async function post(path, body = {}) {
  const headers = { "Content-Type": "application/json" };
  return (await request(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

/** Who this page is taken for; raises Problem where that is nobody. */
export async function introduce() {
  caller = await get("/v1/whoami");
  return caller;
}

export const may = (scope) => caller !== null && SCOPES.indexOf(caller.scope) >= SCOPES.indexOf(scope);

/** `path` as something that the browser can open by itself: it sends no token, so a link is asked for instead. */
export async function openable(path) {
  return token ? (await post("/v1/links", { path, seconds: 600 })).path : path;
}

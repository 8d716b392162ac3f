// Numbers and times as people read them.

/** "0.42 s", "12.3 s", "3 min 20 s", "2 h 5 min", "3 d 4 h" */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const s = Math.max(0, seconds);
  if (s < 1) return `${s.toFixed(2)} s`;
  if (s < 60) return `${s.toFixed(1)} s`;
  const whole = Math.round(s);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}

/** As `duration`, in whole seconds: for what counts up or down before the eyes. */
export function counting(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  return s < 60 ? `${s} s` : duration(s);
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  let value = count;
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1000;
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export const percent = (share) => `${Math.round(share * 100)} %`;

const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
const DAY = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

export const clock = (at) => CLOCK.format(at * 1000);
export const dated = (at) => DAY.format(at * 1000);

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

/** "a desktop id" without what all of them begin with */
export const shortDesktop = (id) => id.replace(/^envd-/, "");

/** A score as it is, without a tail of digits. */
export const score = (value) => String(Math.round(value * 1000) / 1000);

// The dialogs that wait for an answer: which token, and whether it is meant.

import { byId, setHidden } from "./dom.js";

/** The token that somebody types; `refusal` is why the last one was not taken. */
export function askForToken(refusal) {
  const dialog = byId("token-dialog");
  const input = byId("token");
  byId("token-refusal").textContent = refusal;
  return new Promise((resolve) => {
    byId("token-form").onsubmit = (event) => {
      event.preventDefault();
      const token = input.value.trim();
      input.value = "";
      if (!token) return;
      dialog.close();
      resolve(token);
    };
    dialog.oncancel = (event) => event.preventDefault(); // without one there is nothing to see
    if (!dialog.open) dialog.showModal();
    input.focus();
  });
}

/** Whether it is meant: false, or true; with `minutes`, how many were given. */
export function ask({ title, words, yes, minutes = false }) {
  const dialog = byId("ask-dialog");
  byId("ask-title").textContent = title;
  byId("ask-words").textContent = words;
  byId("ask-yes").textContent = yes;
  setHidden(byId("ask-field"), !minutes);
  return new Promise((resolve) => {
    const answer = (value) => {
      dialog.onclose = null;
      dialog.close();
      resolve(value);
    };
    byId("ask-form").onsubmit = (event) => {
      event.preventDefault();
      answer(minutes ? Math.max(0, byId("ask-number").valueAsNumber || 0) : true);
    };
    byId("ask-no").onclick = () => answer(false);
    dialog.onclose = () => resolve(false);
    dialog.showModal();
    byId("ask-no").focus();
  });
}

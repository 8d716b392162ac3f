// The theme that was chosen, before anything is painted. "system" follows the browser's own setting.
// A choice is no secret, so it may lie where other pages of this origin could read it.
"use strict";
{
  const THEMES = ["system", "light", "dark"];
  const kept = () => {
    try {
      return localStorage.getItem("envd-theme");
    } catch {
      return null; // storage may be switched off
    }
  };
  let theme = THEMES.includes(kept()) ? kept() : "system";
  const show = () => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  show();
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const say = () => (button.textContent = `Theme: ${theme}`);
    say();
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      try {
        localStorage.setItem("envd-theme", theme);
      } catch {
        // it then holds for this page alone
      }
      show();
      say();
    });
  });
}

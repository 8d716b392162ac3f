// A page of which a part could not be loaded (the network changed under it, the daemon was just ended) loads itself again
// as soon as the daemon answers; else it would wait for ever without a word.
"use strict";
{
  const PAUSE_MS = 1000;
  let broken = false;

  const mend = async () => {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      try {
        if ((await fetch("/livez", { cache: "no-store" })).ok) return location.reload();
      } catch {
        // not yet
      }
    }
  };

  // Caught on its way down: these do not bubble. A module that fails is told of at the script that wanted it.
  addEventListener(
    "error",
    ({ target }) => {
      if (broken || !(target instanceof HTMLScriptElement || target instanceof HTMLLinkElement)) return;
      broken = true;
      void mend();
    },
    true,
  );
}

// Parts of a page that keep themselves up to date, while somebody looks: not in a hidden tab, and not for half an hour after the last touch, so that an idle session ends.
"use strict";

const IDLE_MS = 30 * 60 * 1000;
let waited = 0;
let touched = Date.now();

for (const kind of ["pointerdown", "keydown", "scroll"]) document.addEventListener(kind, () => { touched = Date.now(); }, { passive: true });

setInterval(() => {
  const live = document.querySelector("[data-refresh]");
  if (!live || document.hidden || Date.now() - touched > IDLE_MS || live.contains(document.activeElement)) return;
  waited += 1;
  if (waited >= Number(live.dataset.refresh)) {
    waited = 0;
    live.dispatchEvent(new Event("refresh"));
  }
}, 1000);

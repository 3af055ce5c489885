"use strict";
// Without this script the page shows everything; it only filters ranked lists and ties phrases to their maps.
for (const bar of document.querySelectorAll("[data-filter]")) {
  const lists = document.getElementById(bar.dataset.filter).children;
  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    for (const other of bar.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    for (const list of lists) {
      list.hidden = button.dataset.show !== "all" && list.dataset.kind !== button.dataset.show;
    }
  });
}
for (const article of document.querySelectorAll(".explained")) {
  const parts = article.querySelectorAll("[data-phrase]");
  const light = (number) => {
    for (const part of parts) part.classList.toggle("lit", part.dataset.phrase === number);
  };
  for (const part of parts) {
    part.addEventListener("pointerenter", () => light(part.dataset.phrase));
    part.addEventListener("pointerleave", () => light(null));
  }
}

"use strict";
// Without this script the page shows everything; it only filters, points out and copies.

// Filters: a button hides what is of another kind. Hidden parts carry a class that paper does not know.
for (const bar of document.querySelectorAll("[data-filter]")) {
  const parts = document.getElementById(bar.dataset.filter).querySelectorAll("[data-kind]");
  const buttons = [...bar.querySelectorAll("button")];
  const show = (chosen) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
    const kind = chosen.dataset.show;
    for (const part of parts) part.classList.toggle("off", kind !== "all" && part.dataset.kind !== kind);
  };
  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) show(button);
  });
  bar.hidden = false;
  show(buttons.find((button) => button.getAttribute("aria-pressed") === "true"));
}

// Phrases: pointing at one, or reaching it with the keyboard, lights it and its maps.
for (const article of document.querySelectorAll(".explained")) {
  const parts = article.querySelectorAll("[data-phrase]");
  const light = (number) => {
    for (const part of parts) part.classList.toggle("lit", part.dataset.phrase === number);
  };
  for (const part of parts) {
    for (const name of ["pointerenter", "focus"]) part.addEventListener(name, () => light(part.dataset.phrase));
    for (const name of ["pointerleave", "blur"]) part.addEventListener(name, () => light(null));
  }
}

// Maps of points: one stop of the tab key each, arrow keys inside, a tip at the point.
for (const space of document.querySelectorAll(".space")) {
  const tip = space.querySelector(".tip");
  const pictures = new Map();
  for (const image of space.querySelector("template").content.children) pictures.set(image.dataset.image, image);
  const points = [...space.querySelectorAll(".pt")];
  const hide = () => { tip.hidden = true; };
  const tell = (point) => {
    tip.replaceChildren();
    const picture = pictures.get(point.dataset.image);
    if (picture) tip.append(picture.cloneNode());
    for (const text of point.getAttribute("aria-label").split("; ")) {
      const line = document.createElement("span");
      line.textContent = text;
      tip.append(line);
    }
    tip.hidden = false;
    const room = space.getBoundingClientRect();
    const at = point.getBoundingClientRect();
    const left = at.left - room.left + 14;
    tip.style.left = `${Math.max(0, Math.min(left, room.width - tip.offsetWidth))}px`;
    tip.style.top = `${at.bottom - room.top + 8}px`;
  };
  for (const point of points) {
    point.querySelector("title").remove();
    point.setAttribute("tabindex", "-1");
  }
  const pick = space.querySelector("select");
  const highlight = (person) => {
    for (const cloud of space.querySelectorAll(".cloud > svg")) cloud.classList.toggle("picked", person !== "");
    for (const point of points) {
      const mine = person !== "" && point.dataset.person === person;
      point.classList.toggle("lit", mine);
    }
  };
  pick.parentElement.hidden = false;
  pick.addEventListener("change", () => highlight(pick.value));
  for (const cloud of space.querySelectorAll(".cloud > svg")) {
    const own = [...cloud.querySelectorAll(".pt")];
    if (own.length) own[0].setAttribute("tabindex", "0");
    const go = (point) => {
      for (const other of own) other.setAttribute("tabindex", other === point ? "0" : "-1");
      point.focus();
    };
    const next = (point, key) => {
      const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
      const centre = (item) => { const box = item.getBBox(); return [box.x + box.width / 2, box.y + box.height / 2]; };
      const here = centre(point);
      let best = null, least = Infinity;
      for (const other of own) {
        if (other === point) continue;
        const [dx, dy] = centre(other).map((value, axis) => value - here[axis]);
        const along = dx * x + dy * y, across = Math.abs(dx * y) + Math.abs(dy * x);
        // Within 45 degrees of the arrow, the nearest; far aside counts double.
        if (along > 0 && across <= along && along + across < least) [best, least] = [other, along + across];
      }
      return best;
    };
    cloud.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { hide(); return; }
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      const found = next(event.target, event.key);
      if (found) go(found);
    });
    cloud.addEventListener("pointerover", (event) => { if (event.target.matches(".pt")) tell(event.target); });
    cloud.addEventListener("pointerout", () => {
      // Where the keyboard is stays told, also when the page scrolls away under the pointer.
      if (document.activeElement.matches(".pt:focus-visible")) tell(document.activeElement);
      else hide();
    });
    // On the figure: an <svg> that listens to focus would be a stop of the tab key itself.
    cloud.parentElement.addEventListener("focusin", (event) => { if (event.target.matches(".pt")) tell(event.target); });
    cloud.parentElement.addEventListener("focusout", hide);
    cloud.addEventListener("click", (event) => {
      if (!event.target.matches(".pt")) return;
      pick.value = pick.value === event.target.dataset.person ? "" : event.target.dataset.person;
      highlight(pick.value);
    });
  }
}

// Copying: where the clipboard is closed, the text is selected instead.
for (const button of document.querySelectorAll("[data-copy]")) {
  const source = document.getElementById(button.dataset.copy);
  const said = button.parentElement.querySelector("[role=status]");
  button.parentElement.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      said.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(source);
      said.textContent = "Selected: copy it with the keyboard.";
    }
  });
}

// On paper everything is open but long tables of others' numbers with which nothing compares.
const folded = [];
addEventListener("beforeprint", () => {
  for (const item of document.querySelectorAll("details:not([open]):not(.aside)")) { item.open = true; folded.push(item); }
});
addEventListener("afterprint", () => { for (const item of folded.splice(0)) item.open = false; });

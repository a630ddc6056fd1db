// Replaces sections of the page as the server sends them. Without this script the page reloads itself.
"use strict";
const events = new EventSource("/events");
for (const section of document.querySelectorAll("main > [id]")) {
  events.addEventListener(section.id, (event) => {
    const now = document.getElementById(section.id);
    // Keeps what the reader has unfolded or focused.
    const open = now.querySelector("details[open]") !== null;
    const at = now.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const made = document.createRange().createContextualFragment(event.data).firstElementChild;
    if (open) made.querySelector("details")?.setAttribute("open", "");
    now.replaceWith(made);
    if (at !== null) made.querySelector(`a[href="${CSS.escape(at)}"]`)?.focus({preventScroll: true});
  });
}
events.onopen = () => document.documentElement.classList.remove("stale");
events.onerror = () => document.documentElement.classList.add("stale");

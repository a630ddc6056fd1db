// Replaces sections of a live page as the server sends them, and asks before an action that
// cannot be undone. Without this script the page reloads itself, and forms act at once.
"use strict";
document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});
const live = document.documentElement.dataset.live;
if (live) {
  const events = new EventSource(live);
  for (const section of document.querySelectorAll("main > [id]")) {
    events.addEventListener(section.id, (event) => {
      const now = document.getElementById(section.id);
      // Keeps what the reader has unfolded or focused.
      const open = [...now.querySelectorAll("details[open]")].map((one) => one.id);
      const focused = now.contains(document.activeElement) ? document.activeElement : null;
      const at = focused?.id ? `#${CSS.escape(focused.id)}` :
        focused?.getAttribute("href") ?
          `a[href="${CSS.escape(focused.getAttribute("href"))}"]` : null;
      const made = document.createRange().createContextualFragment(event.data).firstElementChild;
      for (const one of open)
        if (one) made.querySelector(`#${CSS.escape(one)}`)?.setAttribute("open", "");
      // What is the same stays: a click or a selection in it is not lost.
      if (now.isEqualNode(made)) return;
      now.replaceWith(made);
      if (at !== null) made.querySelector(at)?.focus({preventScroll: true});
      if (made.dataset.title) {
        document.title = made.dataset.title;
        document.querySelector("link[rel=icon]").href = made.dataset.icon;
      }
    });
  }
  events.onopen = () => document.documentElement.classList.remove("stale");
  events.onerror = () => document.documentElement.classList.add("stale");
}

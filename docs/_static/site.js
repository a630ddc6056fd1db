// Sphinx's search ignores words of digits. Statuses and ports are worth a search: 504, 9100.
if (typeof Search !== "undefined") {
  const parse = Search._parseQuery;
  Search._parseQuery = (query) => {
    const parsed = parse(query);
    const [, terms, , highlighted] = parsed;
    for (const number of query.match(/\b\d+\b/g) ?? []) {
      terms.add(number);
      highlighted.add(number);
    }
    return parsed;
  };
}

// What furo leaves out of its markup, and screen readers need.
for (const caption of document.querySelectorAll(".caption[role=heading]")) {
  caption.setAttribute("aria-level", "2");
}
document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "Site");
document.querySelector(".toc-drawer")?.setAttribute("aria-label", "Page");
// What is scrolled sideways must be reached by keyboard.
for (const block of document.querySelectorAll("div.highlight pre, .table-wrapper")) {
  block.tabIndex = 0;
}

"use strict";
// A click on a column's name sorts its table: numbers as numbers, and what is empty comes last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    const text = (row) => row.cells[head.cellIndex].textContent.trim();
    const number = (said) => parseFloat(said.replace(/,/g, "").replace("\u2212", "-"));
    const rows = [...body.rows], full = rows.filter((row) => text(row) !== "");
    const numbers = full.every((row) => !Number.isNaN(number(text(row))));
    const order = (a, b) => numbers ? number(text(a)) - number(text(b))
      : text(a).localeCompare(text(b), "en", { numeric: true });
    full.sort((a, b) => (up ? 1 : -1) * order(a, b));
    body.append(...full, ...rows.filter((row) => text(row) === ""));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  });
}
// What is folded away is printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
// Only a page that `--watch` keeps up to date says how often to look again.
const seconds = Number(document.documentElement.dataset.reload);
if (seconds > 0) setTimeout(() => location.reload(), 1000 * seconds);

"use strict";
// A click on a column's name sorts its table: numbers and durations by size, then words, then what is empty.
const SECONDS = { d: 86400, h: 3600, min: 60, s: 1 };
const valueOf = (said) => {
  const plain = said.replace(/,(?=\d{3})/g, "").replace(/\u2212/g, "-");
  if (/^(\d+(\.\d+)? (d|h|min|s) ?)+$/.test(plain))
    return [...plain.matchAll(/([\d.]+) (\w+)/g)].reduce((sum, [, n, unit]) => sum + n * SECONDS[unit], 0);
  const found = /^(<? ?)([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?: to .*)?$/i.exec(plain);  // of an interval its low end
  return found ? Number(found[2]) * (found[1] ? 0.999 : 1) : NaN;
};
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    const found = [...body.rows].map((row) => {
      const text = row.cells[head.cellIndex].textContent.trim(), value = valueOf(text);
      return { row, text, value, kind: text === "" ? 2 : Number(Number.isNaN(value)) };
    });
    const order = (a, b) => a.kind ? a.text.localeCompare(b.text, "en", { numeric: true }) : a.value - b.value;
    found.sort((a, b) => a.kind - b.kind || (up ? 1 : -1) * order(a, b));
    body.append(...found.map((each) => each.row));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  });
}
// What is folded away is printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
// Only a page that `--watch` keeps up to date says how often to look again.
const seconds = Number(document.documentElement.dataset.reload);
if (seconds > 0) setTimeout(() => location.reload(), 1000 * seconds);

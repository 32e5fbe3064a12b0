// Tables sort by their columns, and print whole. Without this script the page says the same.
"use strict";
const units = { "µs": 1e-6, ms: 1e-3, s: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 };

function figure(text) {
  const number = text.match(/[-+]?\d[\d,.]*/), unit = text.match(/\d\s?(µs|ms|s|KiB|MiB|GiB)\b/);
  return number ? +number[0].replaceAll(",", "") * (unit ? units[unit[1]] : 1) : -Infinity;
}

function sort(head, column, figures) {
  const table = head.closest("table"), body = table.tBodies[0];
  const down = head.ariaSort ? head.ariaSort === "ascending" : figures;
  const text = (row) => row.cells[column].textContent.trim();
  const rows = [...body.rows].sort((a, b) => figures ? figure(text(a)) - figure(text(b))
    : text(a).localeCompare(text(b), "en", { numeric: true }));
  body.append(...(down ? rows.reverse() : rows));
  for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
  head.ariaSort = down ? "descending" : "ascending";
  table.classList.add("sorted");
}

for (const head of document.querySelectorAll(".scroll thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  button.onclick = () => sort(head, head.cellIndex, head.classList.contains("figure"));
  head.append(button);
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));

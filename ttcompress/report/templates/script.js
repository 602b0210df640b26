"use strict";
// Sorts tables by a click on the head of a column; without scripts they stay in the order of the network.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const key = (row, place) => {
    const cell = row.cells[place];
    const number = cell.querySelector("data") || (cell.dataset.sort !== undefined ? { value: cell.dataset.sort } : null);
    return number ? Number(number.value) : cell.textContent.trim();
  };
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    if (head.dataset.fixed !== undefined) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...body.rows].sort((one, other) => {
        const a = key(one, place), b = key(other, place);
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
        return rising ? order : -order;
      });
      body.append(...rows);
    });
  });
}
// Everything is printed, also what is folded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
